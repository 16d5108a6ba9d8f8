"""PPO runs that train an adapter alone, or only what is not frozen."""

from safetensors.numpy import load_file

from tests.trainers.conftest import LLAMA
from tests.trainers.runs import metrics_of


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def test_ppo_with_an_adapter_moves_nothing_else(world, run, tmp_path):
    changes = {"lora__rank": 2, "lora__targets": ("query", "down"), "lora__alpha": 8.0}
    run(world.ppo_config(tmp_path, total_phases=3, critic__shared=True, **changes))
    before, after = tensors_of(world.policy), tensors_of(tmp_path / "export")
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {name for name in before if "q_proj" in name or "down_proj" in name}
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * LLAMA["num_hidden_layers"]
    saved = sum(
        f.stat().st_size for f in (tmp_path / "checkpoints/3/policy").rglob("*")
    )
    assert saved < 0.8 * (world.policy / "model.safetensors").stat().st_size


def test_ppo_with_frozen_weights_moves_the_others(world, run, tmp_path):
    run(world.ppo_config(tmp_path, total_phases=3, freeze=("embed", "norm")))
    before, after = tensors_of(world.policy), tensors_of(tmp_path / "export")
    stayed = {name for name in before if (before[name] == after[name]).all()}
    assert stayed == {name for name in before if "embed" in name or "norm" in name}


def test_ppo_goes_on_from_the_adapter_of_a_run(world, run, tmp_path):
    """It starts where that run ended, and this is what its KL is measured from."""
    changes = {"lora__rank": 2, "lora__alpha": 8.0, "critic__shared": True}
    run(world.ppo_config(tmp_path / "first", total_phases=3, **changes))
    start = {"lora__start": str(tmp_path / "first")}
    run(world.ppo_config(tmp_path / "second", total_phases=1, **changes, **start))
    *_, last = metrics_of(tmp_path / "first")
    first, after = metrics_of(tmp_path / "second")
    for key in ("heldout/reward_mean", "heldout/tokens"):
        assert first[key] == last[key]
    assert first["heldout/kl"] == 0 < last["heldout/kl"]
    assert 0 != abs(after["heldout/kl"]) < last["heldout/kl"]
    before, trained = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("first", "second")
    )
    assert before.keys() == trained.keys()
    assert all((before[name] != trained[name]).any() for name in before)
