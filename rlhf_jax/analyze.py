"""Shows when and why a policy went wrong, from the checkpoints of its run.

    python -m rlhf_jax.analyze --run=runs/ppo
    python -m rlhf_jax.analyze --run=runs/ppo --phases=0,10,30 --num_samples=128

It asks the policy of every saved phase the same held-out prompts, from the same keys,
compares them in pairs, prints what it found and writes a folder, `analysis` in that of
the run: report.html (one page that holds everything), analysis.json and
full_responses_history.json. The run may be going on.
"""

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from rlhf_jax.analysis.analyzer import AlignmentAnalyzer
from rlhf_jax.command_line import run_with_flags
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import joined
from rlhf_jax.train import train


def train_and_analyze(config: ConfigDict) -> AlignmentAnalyzer:
    """Trains as a config says, or goes on with that run, and hands back its analyzer.

    Every saved phase can be asked then; `config.checkpoint.every` says which are.

    Raises:
      UserError: the config, the files it names or the machine do not allow it.
    """
    lacking = [name for name in ("rollout", "rewards") if name not in config]
    if lacking:
        raise UserError(
            f"a {config.algorithm} config has no {' and no '.join(lacking)}: what is "
            "analysed are policies that answer prompts for a reward (ppo, grpo, dpo)"
        )
    train(config)
    return AlignmentAnalyzer(config.workdir)


def analyze(
    run: str,
    *,
    out: str = "",
    phases: Sequence[str] = (),
    num_samples: int = 64,
    seed: int = 0,
) -> list[pathlib.Path]:
    """Analyses a run; the flags of the command line say what each argument is.

    Returns:
      The paths of what was written, the page first.

    Raises:
      UserError: there is no such run, or none of the phases can be read.
    """
    analyzer = AlignmentAnalyzer(run, num_samples=num_samples, seed=seed)
    return analyzer.write_report(out or None, phases=_numbers(phases) or None)


def _numbers(phases: Sequence[str]) -> list[int]:
    wrong = [phase for phase in phases if not phase.strip().isdecimal()]
    if wrong:
        raise UserError(
            f"--phases has {wrong[0]!r}: give numbers of phases, as --phases=0,10,20"
        )
    return [int(phase) for phase in phases]


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "The folder of a run.")
    flags.DEFINE_string("out", "", "Where to; by default `analysis` in that folder.")
    flags.DEFINE_list("phases", "", "Which phases; by default all that were saved.")
    flags.DEFINE_integer("num_samples", 64, "Answers of each phase.", 2)
    flags.DEFINE_integer("seed", 0, "Of the bootstrap and the permutation tests.", 0)
    flags.mark_flag_as_required("run")


def main() -> None:
    """The command line."""
    _define_flags()
    run_with_flags(joined()(analyze), "run")


if __name__ == "__main__":
    main()
