"""Several trainings in a row from one config: base -> SFT -> reward model -> methods.

    python -m rlhf_jax.train --config=configs/pipeline.py

Each stage is an ordinary run in a folder of its own, `<workdir>/<stage>`, which
`rlhf_jax.train` could have made alone. A setting of a stage that reads "stage:sft" is
the run folder of that stage; a reward with several of them is their ensemble, which is
judged on held-out pairs before it is used. A finished stage is skipped, one that was
stopped goes on from its last checkpoint; so the same command ends what a killed one
began. The methods are compared in the end.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import plots, progress, run_files, sharding
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import comparison
from rlhf_jax.evaluation.pages import write_files
from rlhf_jax.evaluation.reward_report import report_pairs
from rlhf_jax.rewards import build_rewards
from rlhf_jax.trainers.common import MAY_CHANGE
from rlhf_jax.trainers.reward_model import load_data

REFERENCE = "stage:"
ENSEMBLE = "ensemble"  # the folder of its report


def stages_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """The stages that `config.method` needs, in order, with their settings filled in.

    Raises:
      UserError: an unknown method, or a reference to a stage that is not before it.
    """
    methods = tuple(config.methods)
    if config.method not in ("all", *methods):
        raise UserError(
            f"config.method={config.method!r} is unknown; take all, "
            + ", ".join(methods)
        )
    left_out = () if config.method == "all" else set(methods) - {config.method}
    stages: dict[str, ConfigDict] = {}
    for name in config.order:
        if name not in config.stages:
            raise UserError(
                f"config.order has the stage {name!r}, which config.stages does not: "
                "it has " + ", ".join(config.stages)
            )
        if name in left_out:
            continue
        stage = ConfigDict(config.stages[name].to_dict())
        _fill_in(stage, stages, name)
        stage.workdir = str(pathlib.Path(config.workdir) / name)
        stage.seed = config.seed + stage.seed
        stages[name] = stage
    return stages


def run(config: ConfigDict, train: Callable[[ConfigDict], None]) -> None:
    """Runs every stage that is not done, then compares the methods.

    Args:
      config: see configs/pipeline.py.
      train: runs one stage's config.
    """
    console = progress.make_console()
    stages = stages_of(config)
    # Each stage's folder says whether its settings are still the same.
    free = ("workdir", "method", "methods", "order", "stages")
    run_files.open_run(config.workdir, config.to_dict(), may_change=free)
    for number, (name, stage) in enumerate(stages.items(), 1):
        title = f"stage {number} of {len(stages)}: {name}"
        if is_done(stage):
            progress.say(console, f"{title} is done: {stage.workdir}")
            continue
        progress.say(console, f"{title}, in {stage.workdir}")
        for reward in _ensembles(stage):
            judge_ensemble(console, config.workdir, stages, reward)
        train(stage)
        jax.clear_caches()  # the next stage's programs are its own
    methods = [name for name in config.methods if name in stages]
    if jax.process_index() == 0 and methods:
        report(console, config.workdir, {name: stages[name] for name in methods})


def is_done(stage: ConfigDict) -> bool:
    """Whether the stage's folder holds its finished run, of the same settings."""
    files = run_files.RunFiles(pathlib.Path(stage.workdir))
    if not (files.summary.exists() and files.export.is_dir()):
        return False
    run_files.open_run(stage.workdir, stage.to_dict(), may_change=MAY_CHANGE)
    summary = json.loads(files.summary.read_text("utf-8"))
    return summary["phases"] == stage.total_phases


def report(console: Console, workdir: str, stages: dict[str, ConfigDict]) -> None:
    """Writes comparison.md, .json and .png, and shows the table."""
    folder = pathlib.Path(workdir)
    workdirs = {name: stage.workdir for name, stage in stages.items()}
    measured = comparison.compare(workdirs)
    (folder / "comparison.json").write_text(comparison.to_json(measured), "utf-8")
    (folder / "comparison.md").write_text(comparison.to_markdown(measured), "utf-8")
    plots.plot_comparison(
        {name: run_files.read_metrics(path) for name, path in workdirs.items()},
        {name: tuple(row.gain) for name, row in measured.items()},
        folder / "comparison.png",
        title=f"Methods compared: {workdir}",
    )
    header, rows = comparison.table(measured)
    progress.show_table(console, "on the same held-out prompts", header, rows)
    for name, path in workdirs.items():
        progress.say(console, f"{name}: {pathlib.Path(path) / 'export'}")
    progress.say(console, f"comparison: {folder / 'comparison.png'}")


def judge_ensemble(
    console: Console, workdir: str, stages: dict[str, ConfigDict], reward: ConfigDict
) -> None:
    """Reports how an ensemble of reward models does on pairs its first one held out.

    Args:
      console: where the figures are shown.
      workdir: of the pipeline; the report goes into its folder `ensemble`, and is not
        made again for the same reward.
      stages: those of the pipeline.
      reward: an entry of a stage's `rewards` with several sources; one whose sources
        are not all reward models of this pipeline is left alone.
    """
    models = {s.workdir: s for s in stages.values() if s.algorithm == "reward_model"}
    if not set(reward.source) <= set(models):
        return
    folder = pathlib.Path(workdir) / ENSEMBLE
    told, entry = folder / "reward.json", json.dumps(reward.to_dict(), sort_keys=True)
    done = told.exists() and told.read_text("utf-8") == entry
    if multihost_utils.broadcast_one_to_all(np.bool_(done)):
        return
    first = models[reward.source[0]]
    mesh = sharding.make_mesh(**first.mesh)
    tokenizer = load_tokenizer(run_files.exported(first.workdir))
    with jax.set_mesh(mesh):
        train, heldout = load_data(first, tokenizer, console)
        prompts = [pair.prompt for pair in heldout]
        (judged,) = build_rewards({"ensemble": reward}, mesh=mesh)
        scores = [
            judged.score(prompts, [getattr(pair, side) for pair in heldout]).scores
            for side in ("chosen", "rejected")
        ]
    if jax.process_index() == 0:
        title = f"Ensemble of {len(reward.source)} reward models"
        pairs = train, heldout, np.stack(scores, axis=1)
        _, facts = report_pairs(folder, *pairs, costs=False, title=title)
        progress.show_summary(console, title, [], facts)
        write_files(folder, {told.name: entry})


def _ensembles(stage: ConfigDict) -> list[ConfigDict]:
    """The rewards of a stage that have several sources."""
    rewards = stage.get("rewards", {}).values()
    return [reward for reward in rewards if not isinstance(reward.source, str)]


def _fill_in(settings: Any, stages: dict[str, ConfigDict], name: str) -> None:
    """Puts run folders in the place of "stage:<name>", at any depth."""
    for key, value in settings.items():
        if isinstance(value, ConfigDict):
            _fill_in(value, stages, name)
        elif isinstance(value, str):
            settings[key] = _folder_of(key, value, stages, name)
        elif isinstance(value, list | tuple):
            folder = lambda one, key=key: _folder_of(key, one, stages, name)
            settings[key] = tuple(map(folder, value))


def _folder_of(key: str, value: Any, stages: dict[str, ConfigDict], name: str) -> Any:
    """The run folder of "stage:<name>"; anything else as it is."""
    if not isinstance(value, str) or not value.startswith(REFERENCE):
        return value
    wanted = value.removeprefix(REFERENCE)
    if wanted not in stages:
        raise UserError(
            f"the stage {name!r} has {key}={value!r}, but no stage of that name comes "
            "before it: see config.order"
        )
    return stages[wanted].workdir
