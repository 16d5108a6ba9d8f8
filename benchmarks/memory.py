"""The memory that a training phase takes on a CPU, against what the plan said.

    python benchmarks/memory.py
    python benchmarks/memory.py "grpo" "dpo, remat"

Each case runs in a process of its own and is measured in its second phase.

resident   the largest resident memory in that phase, less what was resident before it
           and is no array: interpreter, compiler, programs. The heap gives everything
           above 64 KiB back at once (MALLOC_MMAP_THRESHOLD_), else it would keep what
           earlier programs used and a peak would say nothing of the phase.
programs   the largest sum, over the compiled programs of the phase, of the arrays that
           live as it starts and its own temporaries and results, as XLA tells them.
planned    `rlhf_jax.preflight`, from shapes alone, and how far it is from both.

Of several devices all are added up, for they share the memory of one machine; they do
not reach their peaks at one moment, so `resident` is below what each of them needs.
"""

import gc
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
GRPO = {
    "rollout.prompts": 4,
    "rollout.group": 4,
    "rollout.prompt_tokens": 32,
    "rollout.max_new_tokens": 64,
    "grpo.minibatches": 1,
}
PPO = {
    "rollout.prompts": 16,
    "rollout.prompt_tokens": 32,
    "rollout.max_new_tokens": 64,
    "ppo.minibatches": 1,
}
DPO = {"learning.batch": 8, "sequence_tokens": 128, "learning.steps_per_phase": 2}
ROWS = {"learning.batch": 16, "sequence_tokens": 128, "learning.steps_per_phase": 2}
PLAIN, CHUNKS = {"remat": False}, {"logprob_chunk": 16}
# Name -> algorithm, devices, settings.
CASES = {
    "grpo": ("grpo", 1, GRPO),
    "grpo, remat off": ("grpo", 1, GRPO | PLAIN),
    "grpo, chunks": ("grpo", 1, GRPO | CHUNKS),
    "grpo, 4 minibatches": ("grpo", 1, GRPO | {"grpo.minibatches": 4}),
    "grpo, 64 rows": ("grpo", 1, GRPO | {"rollout.prompts": 16}),
    "ppo": ("ppo", 1, PPO),
    "ppo, remat off": ("ppo", 1, PPO | PLAIN),
    "ppo, accumulation 4": ("ppo", 1, PPO | {"ppo.accumulation": 4}),
    "ppo, chunks": ("ppo", 1, PPO | CHUNKS),
    "dpo": ("dpo", 1, DPO),
    "dpo, remat off": ("dpo", 1, DPO | PLAIN),
    "dpo, chunks": ("dpo", 1, DPO | CHUNKS),
    "sft": ("sft", 1, ROWS),
    "sft, remat off": ("sft", 1, ROWS | PLAIN),
    "reward model": ("reward_model", 1, ROWS),
    "reward model, remat off": ("reward_model", 1, ROWS | PLAIN),
    "grpo, data=8": ("grpo", 8, GRPO | {"rollout.prompts": 16}),
    "grpo, fsdp=8": ("grpo", 8, GRPO | {"rollout.prompts": 16, "mesh.fsdp": 8}),
    "dpo, fsdp=4 tensor=2": ("dpo", 8, DPO | {"mesh.fsdp": 4, "mesh.tensor": 2}),
    "sft, fsdp=8": ("sft", 8, ROWS | {"mesh.fsdp": 8}),
}


def configured(name: str):
    """The config of a case: that of its algorithm, with the small model."""
    from ml_collections import ConfigDict

    algorithm, _, changes = CASES[name]
    config = importlib.import_module(f"configs.{algorithm}").get_config()
    config = ConfigDict(config.to_dict(), type_safe=False)
    config.update({"model": MODEL, "dropout": 0.0, "judges": {}})
    config.optimizer.warmup_steps = 0
    if "rewards" in config:
        config.rewards = {"letters": {"source": "vader", "weight": 1.0}}
    config.update_from_flattened_dict(changes)
    return config


def resident() -> float:
    """The memory of this process now, in bytes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text("ascii").split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def live_bytes() -> int:
    """Of all arrays on all devices."""
    import jax

    # `addressable_shards` would make arrays that are counted too.
    of_shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(
        of_shard(x) * len(x.sharding.addressable_devices) for x in jax.live_arrays()
    )


def record_programs(found: dict) -> None:
    """Makes `jax.jit` note, by name, the most memory that each program needs."""
    import jax

    jit = jax.jit

    def recording(function=None, **options):
        if function is None:
            return lambda function: recording(function, **options)
        compiled, seen = jit(function, **options), {}

        def call(*arguments, **named):
            leaves, tree = jax.tree.flatten((arguments, named))
            key = tree, tuple(getattr(x, "shape", x) for x in leaves)
            if key not in seen:
                seen[key] = compiled.lower(*arguments, **named).compile()
            told = seen[key].memory_analysis()
            size = told.temp_size_in_bytes
            size += told.output_size_in_bytes - told.alias_size_in_bytes
            total = live_bytes() + size * jax.device_count()
            name = getattr(function, "__name__", "program")
            found[name] = max(found.get(name, 0), total)
            return compiled(*arguments, **named)

        call.lower = compiled.lower
        return call

    jax.jit = recording


def online_phase(config, mesh):
    """(state, run_phase) of PPO or GRPO, with texts that ship with the package."""
    from rlhf_jax import loading, sharding, trainable
    from rlhf_jax.data.prompts import load_both
    from rlhf_jax.rewards import build_rewards
    from rlhf_jax.rollout.sampler import sampler_of
    from rlhf_jax.trainers import grpo, ppo
    from rlhf_jax.trainers.optimizer import make_optimizer

    del sharding
    tokenizer = loading.load_tokenizer(loading.BUILTIN["builtin"])
    rewards = build_rewards(config.rewards, mesh=mesh)
    prompts, _ = load_both(
        config.data, tokenizer, prompt_tokens=config.rollout.prompt_tokens
    )

    def start():
        policy = loading.load_model(config.model, config, mesh)
        sample = sampler_of(config.rollout, policy.model, tokenizer, mesh)
        parts = trainable.cut(config, policy.params, mesh)
        reference = trainable.reference_of(config, parts)
        shared = mesh, policy.model, sample, rewards, prompts, reference, parts.frozen
        if config.algorithm == "ppo":
            models, state, optimizer = ppo.make_state(
                config, policy, parts.trained, mesh
            )
            mesh_, _, *others = shared
            return state, ppo.make_phase(config, mesh_, models, optimizer, *others)
        optimizer = make_optimizer(config.optimizer, config.optimizer.lr, 100)
        opt_state = loading.init_optimizer(optimizer, parts.trained, mesh)
        state = grpo.State(parts.trained, opt_state)
        mesh_, model, *others = shared
        return state, grpo.make_phase(config, mesh_, model, optimizer, *others)

    return start


def offline_phase(config, mesh):
    """(state, run_phase) of SFT, a reward model or DPO, with rows of random tokens."""
    import numpy as np

    from rlhf_jax import loading, trainable
    from rlhf_jax.data import labelled_pairs
    from rlhf_jax.data.packing import Rows
    from rlhf_jax.trainers import dpo, offline, reward_model, sft

    N, length = 64, config.sequence_tokens
    drawn = np.random.default_rng(0)

    def start():
        head = config.algorithm == "reward_model"
        loaded = loading.load_model(config.model, config, mesh, head=head)
        trained, frozen = trainable.cut(config, loaded.params, mesh)
        reference = None
        if config.algorithm == "dpo" and config.evaluate_kl:
            reference = trainable.reference_of(config, trainable.Parts(trained, frozen))
        state, optimizer = offline.make_state(config, trained, mesh)
        model, kept = loaded.model, {"frozen": frozen}
        shape = (N, length) if config.algorithm == "sft" else (N, 2, length)
        tokens = drawn.integers(2, MODEL["vocab_size"], shape).astype(np.int32)
        real = np.ones(shape, bool)
        if config.algorithm == "sft":
            rows = Rows(tokens, real.astype(np.int32), real)
            run = sft.make_phase(config, mesh, model, optimizer, rows, frozen)
        elif config.algorithm == "dpo":
            rows = dpo.Pairs(tokens, real, real, np.zeros((N, 2), np.float32))
            kept |= {"accumulation": config.learning.accumulation, "counts": dpo.count}
            loss = dpo.make_loss(model, config)
            run = offline.make_phase(config, mesh, loss, optimizer, rows, **kept)
        else:
            rows = labelled_pairs.Pairs(tokens, real, None, None, None)
            run = reward_model.make_phase(config, mesh, model, optimizer, rows, frozen)
        # The reference stays, as in a run that reports a KL.
        return state, lambda state, phase: (*run(state, phase), reference)[:3]

    return start


def measure(name: str) -> dict:
    """Runs a case in this process; bytes."""
    found: dict[str, int] = {}
    import jax

    record_programs(found)
    from rlhf_jax import memory, preflight, sharding

    config = configured(name)
    mesh = sharding.make_mesh(**config.mesh)
    online = config.algorithm in ("ppo", "grpo")
    with jax.set_mesh(mesh):
        start = (online_phase if online else offline_phase)(config, mesh)
        state, run_phase = start()
        state, *_ = run_phase(state, 1)
        jax.block_until_ready(state)
        found.clear()
        gc.collect()
        time.sleep(2)  # the last program's memory is given back a moment later
        memory.reset_peak_memory()
        before = resident() - live_bytes()
        state, *_ = run_phase(state, 2)
        jax.block_until_ready(state)
        peak = memory.peak_memory() - before
    needs = preflight.estimate(config, mesh)
    planned = needs.total * mesh.size
    return {"resident": peak, "programs": found, "planned": planned}


def run(name: str) -> dict:
    """`measure` of one case, in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={CASES[name][1]}",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "2",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--case", name],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(names: list[str]) -> None:
    """A table of the cases that are named, or of all."""
    mb = lambda x: f"{x / 1e6:,.0f}"
    print(
        "| case | resident MB | programs MB | planned MB | to resident | to programs |"
    )
    print("|---|---|---|---|---|---|")
    for name in names or CASES:
        row = run(name)
        told = max(row["programs"].values())
        figures = [mb(x) for x in (row["resident"], told, row["planned"])]
        figures += [f"{row['planned'] / x - 1:+.1%}" for x in (row["resident"], told)]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(sys.argv[1:])
