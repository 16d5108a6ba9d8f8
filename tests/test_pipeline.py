"""Stages in their order, skipped when done, from runs that a stand-in writes."""

import pytest
from ml_collections import ConfigDict

from rlhf_jax import pipeline, run_files
from rlhf_jax.errors import UserError


def make_config(folder, **changes):
    learner = {"model": "stage:sft", "total_phases": 2, "workdir": "", "seed": 9}
    judged = {"rewards": {"human": {"source": "stage:reward_model"}}}
    rollout = {"rollout": {"prompts": 4}}
    config = ConfigDict(
        {
            "workdir": str(folder),
            "seed": 3,
            "method": "all",
            "methods": ("ppo", "dpo"),
            "order": ("sft", "reward_model", "ppo", "dpo"),
            "stages": {
                "sft": learner | {"model": "builtin"},
                "reward_model": learner,
                "ppo": learner | judged | rollout,
                "dpo": learner | judged | rollout,
            },
        }
    )
    config.update(changes)
    return config


def train_into_files(stage, done):
    """What a trainer leaves behind, without training."""
    files = run_files.open_run(stage.workdir, stage.to_dict())
    for phase in (0, stage.total_phases):
        reward = float(phase)
        row = {"phase": phase, "heldout/reward_mean": reward, "heldout/kl": 0.1}
        run_files.append_metrics(files, row | {"time/phase_s": 1.0})
        rows = [
            {
                **{"split": "heldout", "index": i, "prompt": "x", "tokens": 3},
                **{"response": "a b c", "reward": reward + 0.1 * i},
            }
            for i in range(3)
        ]
        run_files.write_responses(files, phase, rows)
    run_files.write_summary(files, {"phases": stage.total_phases})
    files.export.mkdir()
    done.append(stage)


def test_stages_run_once_in_order_and_are_compared(tmp_path, capsys):
    config, done = make_config(tmp_path / "all"), []
    pipeline.run(config, lambda stage: train_into_files(stage, done))
    folder = tmp_path / "all"
    names = ["sft", "reward_model", "ppo", "dpo"]
    assert [stage.workdir for stage in done] == [str(folder / name) for name in names]
    assert {stage.seed for stage in done} == {9 + 3}
    assert done[0].model == "builtin"
    assert done[2].model == str(folder / "sft")
    assert done[3].rewards.human.source == str(folder / "reward_model")
    assert "| gain, ± is 95 % | +2.00 ± 0.00" in (folder / "comparison.md").read_text()
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert (folder / "comparison.json").exists()
    assert "stage 4 of 4: dpo" in capsys.readouterr().out

    pipeline.run(config, lambda stage: pytest.fail("it was done"))
    assert "stage 2 of 4: reward_model is done" in capsys.readouterr().out


def test_a_stage_that_stopped_goes_on(tmp_path):
    config, done = make_config(tmp_path), []

    def stop_in_ppo(stage):
        if stage.workdir.endswith("ppo"):
            raise KeyboardInterrupt
        train_into_files(stage, done)

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, stop_in_ppo)
    again = []
    pipeline.run(config, lambda stage: train_into_files(stage, again))
    assert [stage.workdir.rpartition("/")[2] for stage in again] == ["ppo", "dpo"]


def test_one_method_alone(tmp_path):
    stages = pipeline.stages_of(make_config(tmp_path, method="dpo"))
    assert list(stages) == ["sft", "reward_model", "dpo"]


def test_a_finished_stage_with_other_settings_is_not_taken(tmp_path):
    config = make_config(tmp_path)
    pipeline.run(config, lambda stage: train_into_files(stage, []))
    config.stages.ppo.rollout.prompts = 8
    with pytest.raises(UserError, match=r"rollout\.prompts was 4 and is now 8"):
        pipeline.run(config, lambda stage: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "pp"}, "config.method='pp' is unknown; take all, ppo, dpo"),
        ({"order": ("sft", "rm")}, "the stage 'rm', which config.stages does not"),
        (
            {"order": ("ppo", "sft")},
            "stage 'ppo' has model='stage:sft', but no stage of that name comes before",
        ),
    ],
)
def test_orders_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        pipeline.stages_of(make_config(tmp_path, **changes))


def test_several_stages_are_an_ensemble_that_is_judged_first(tmp_path, monkeypatch):
    config, events = make_config(tmp_path), []
    config.stages.other = ConfigDict(config.stages.reward_model.to_dict())
    config.order = ("sft", "reward_model", "other", "ppo", "dpo")
    pair = {"source": ("stage:reward_model", "stage:other")}
    for name in ("ppo", "dpo"):
        config.stages[name].rewards = ConfigDict({"human": pair})
    members = tuple(str(tmp_path / name) for name in ("reward_model", "other"))
    monkeypatch.setattr(
        pipeline,
        "judge_ensemble",
        lambda console, workdir, stages, reward: events.append(reward.source),
    )
    done = []

    def train(stage):
        events.append(stage.workdir.rpartition("/")[2])
        train_into_files(stage, done)

    pipeline.run(config, train)
    assert events == ["sft", "reward_model", "other", members, "ppo", members, "dpo"]
    assert done[3].rewards.human.source == members
