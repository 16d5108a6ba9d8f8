"""PPO runs that train an adapter alone, or only what is not frozen."""

from safetensors.numpy import load_file

from tests.trainers.conftest import LLAMA


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
