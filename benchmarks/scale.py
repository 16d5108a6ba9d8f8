"""What a training step of a large model moves between devices, and what it holds.

    python benchmarks/scale.py 8B 64 --fsdp=64
    python benchmarks/scale.py 8B 64 --fsdp=64 --compiler=tpu
    python benchmarks/scale.py table

The library's own step of supervised fine-tuning (loss, gradients, Adam; bfloat16,
layers recomputed backwards, logits in chunks) is compiled for that many devices and
never run: no such device is needed. Rows are 2048 tokens, one for each batch shard.

"partitioned" is the program as XLA's partitioner leaves it, before a backend changes
it, on virtual CPU devices: each collective there, times the turns of the loops around
it. Bytes are what one device sends, by a ring over n devices: (n−1)/n of the result of
an all-gather or the operand of a reduce-scatter, twice that for an all-reduce. An
all-reduce of which each device keeps only its slice is a reduce-scatter: the CPU has no
pass that says so, TPUs and GPUs have. "theory" is what the layout needs at least.

--compiler=tpu compiles with the TPU's own compiler, which `pip install libtpu` brings,
for v5p chips: its memory a chip, or what it says if that is more than a chip has.
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from hlo import AXES, COLLECTIVES, Collective, collectives

T, CHUNK = 2048, 256
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
}
# Llama 3.2 1B, 3.1 8B and 3.1 70B.
MODELS = {
    "1B": LLAMA
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "8B": LLAMA
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "70B": LLAMA
    | {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "head_dim": 128,
        "intermediate_size": 28672,
        "tie_word_embeddings": False,
    },
}
CHIPS = {8: "v5p:2x2x2", 64: "v5p:4x4x4", 256: "v5p:4x8x8"}
# (data, fsdp, tensor) of each model on 8, 64 and 256 devices.
CASES = (
    *(("1B", mesh) for mesh in ((8, 1, 1), (1, 8, 1), (8, 8, 1), (1, 64, 1))),
    *(("8B", mesh) for mesh in ((1, 8, 1), (1, 4, 2), (1, 64, 1), (8, 8, 1))),
    *(("8B", mesh) for mesh in ((1, 32, 2), (4, 64, 1))),
    *(("70B", mesh) for mesh in ((1, 64, 1), (1, 16, 4), (1, 8, 8))),
    *(("70B", mesh) for mesh in ((1, 256, 1), (4, 64, 1), (1, 64, 4))),
)

# What it should be, and what it is.


def weights_of(hf_config: dict) -> dict[str, int]:
    """How many weights lie in the layers' matrices, and in one table of tokens."""
    D, F = hf_config["hidden_size"], hf_config["intermediate_size"]
    h = hf_config["head_dim"]
    H, K = hf_config["num_attention_heads"], hf_config["num_key_value_heads"]
    layer = 2 * D * H * h + 2 * D * K * h + 3 * D * F
    tables = 1 if hf_config["tie_word_embeddings"] else 2
    return {
        "layers": layer * hf_config["num_hidden_layers"],
        "table": hf_config["vocab_size"] * D,
        "tables": tables,
    }


def theory(hf_config: dict, mesh: tuple[int, int, int]) -> dict[str, float]:
    """Bytes that one device must send in a step.

    weights      bfloat16, over fsdp: the layers' forward and again backward, each
                 table once
    gradients    float32: scattered over fsdp, then added up over data
    activations  bfloat16 [1, T, D] over tensor: attention and feed-forward, forward
                 and backward, and attention once more where it is recomputed; the
                 embedding's forward, the unembedding's backward
    """
    data, fsdp, tensor = mesh
    found = weights_of(hf_config)
    layers, tables = found["layers"] / tensor, found["tables"] * found["table"] / tensor
    kept = (fsdp - 1) / fsdp
    stream = 2 * T * hf_config["hidden_size"] * 2 * (tensor - 1) / tensor
    whole = 4 * (layers + tables)
    return {
        "weights": 2 * (2 * layers + tables) * kept,
        "gradients": whole * kept + 2 * (data - 1) / data * whole / fsdp,
        "activations": stream * (5 * hf_config["num_hidden_layers"] + 2),
    }


def by_purpose(found: list[Collective]) -> dict[str, float]:
    """Bytes sent for weights, gradients and activations, told by axes and kind."""
    sent = dict.fromkeys(("weights", "gradients", "activations", "other"), 0.0)
    for c in found:
        if "tensor" in c.axes:
            purpose = "activations" if c.axes == ("tensor",) else "other"
        elif c.kind == "all-gather":
            purpose = "weights"
        elif c.kind in ("all-reduce", "reduce-scatter"):
            purpose = "gradients"
        else:
            purpose = "other"
        sent[purpose] += c.sent
    return sent


# One case.


def prepare(compiler: str, devices: int, dump: str) -> None:
    """Sets the environment that JAX reads as it starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = f"--xla_force_host_platform_device_count={devices}"
    if compiler == "cpu":
        flags += f" --xla_dump_to={dump} --xla_dump_hlo_pass_re=spmd-partitioning"
        flags += " --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_update"
    else:  # no such chips are here: what libtpu asks the machine for
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        os.environ["TPU_ACCELERATOR_TYPE"] = f"v5p-{2 * devices}"
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["XLA_FLAGS"] = flags


def chips(devices: int) -> list:
    """Descriptions of TPU v5p chips that are not there."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(CHIPS[devices], platform="tpu").devices


def lower(hf_config: dict, mesh):
    """The library's step of supervised fine-tuning on that mesh, not compiled yet."""
    import jax
    import jax.numpy as jnp

    from configs import sft as defaults
    from rlhf_jax import backend, sharding
    from rlhf_jax.data.packing import Rows
    from rlhf_jax.models.families import config_from_hf
    from rlhf_jax.models.transformer import make_model
    from rlhf_jax.trainers import offline, sft
    from rlhf_jax.trainers.optimizer import make_optimizer

    backend.on_cpu = lambda: False  # the program is an accelerator's
    config = defaults.get_config()
    config.logprob_chunk = CHUNK
    model = make_model(config_from_hf(hf_config), dtype="bfloat16", remat=True)
    optimizer = make_optimizer(config.optimizer, 1e-5, 100)
    params = jax.eval_shape(model.init, jax.random.key(0))
    moments = jax.eval_shape(optimizer.init, params)

    def lay(shapes, shardings):
        put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return jax.tree.map(put, shapes, shardings)

    state = offline.State(
        lay(params, sharding.param_shardings(params, mesh)),
        lay(moments, sharding.optimizer_shardings(optimizer, params, mesh)),
    )
    shape = 1, mesh.shape["data"] * mesh.shape["fsdp"], T
    layout = jax.NamedSharding(mesh, jax.P(None, sharding.BATCH))
    kinds = jnp.int32, jnp.int32, jnp.bool_
    rows = Rows(*(jax.ShapeDtypeStruct(shape, k, sharding=layout) for k in kinds))
    key = jax.eval_shape(lambda: jax.random.key(0))
    update = offline.make_update(
        sft.make_loss(model, config), optimizer, counts=sft.count_learned
    )
    with jax.set_mesh(mesh):
        return update.lower(state, rows, lay(key, sharding.replicated(mesh)))


def measure(name: str, sizes: tuple[int, int, int], compiler: str) -> dict:
    """Compiles one case, in this process, whose JAX must not have started."""
    devices = math.prod(sizes)
    with tempfile.TemporaryDirectory() as dump:
        prepare(compiler, devices, dump)
        from rlhf_jax import sharding

        there = None if compiler == "cpu" else chips(devices)
        mesh = sharding.make_mesh(*sizes, devices=there)
        started = time.perf_counter()
        row = {"model": name, "mesh": sizes, "theory": theory(MODELS[name], sizes)}
        try:
            compiled = lower(MODELS[name], mesh).compile()
        except Exception as error:  # the compiler's own, of a program too large
            needed = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))
            if needed is None:
                raise
            return row | {"gib": float(needed[1]), "fits": False}
        text = compiled.as_text()
        if compiler == "cpu":
            (path,) = pathlib.Path(dump).glob("*after_spmd-partitioning*")
            text = path.read_text()
    found = collectives(text, sizes)
    memory = compiled.memory_analysis()
    total = sum(
        getattr(memory, f"{part}_size_in_bytes") for part in ("argument", "temp")
    )
    kinds = {k: sum(c.sent for c in found if c.kind == k) for k in COLLECTIVES}
    largest = sorted(found, key=lambda c: -c.sent)[:40]
    return row | {
        "sent": by_purpose(found),
        "kinds": kinds,
        "gib": total / 2**30,
        "fits": True,
        "seconds": time.perf_counter() - started,
        "largest": [c._asdict() for c in largest],
    }


def show(row: dict) -> str:
    """One case as a line of the table."""
    gb = lambda x: f"{x / 1e9:.2f}"
    sizes = " x ".join(map(str, row["mesh"]))
    told = [row["model"], str(math.prod(row["mesh"])), sizes, f"{row['gib']:.1f}"]
    if not row["fits"]:
        told[-1] += ", too much"
    for purpose, needed in row["theory"].items():
        sent = gb(row["sent"][purpose]) if "sent" in row else "-"
        told.append(f"{sent} / {gb(needed)}")
    told.append(gb(row["sent"]["other"]) if "sent" in row else "-")
    return f"| {' | '.join(told)} |"


HEADER = (
    "| model | devices | data x fsdp x tensor | GiB | weights | gradients "
    "| activations | other |\n|---|---|---|---|---|---|---|---|"
)


def table(compiler: str, only: str) -> None:
    """All cases, each in a process of its own; GB a device sends, and theory's."""
    print(HEADER)
    cases = [case for case in CASES if only in ("", case[0])]
    for name, (data, fsdp, tensor) in cases:
        done = subprocess.run(
            [
                *(sys.executable, __file__, name, str(data * fsdp * tensor), "--json"),
                *(f"--data={data}", f"--fsdp={fsdp}", f"--tensor={tensor}"),
                f"--compiler={compiler}",
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(show(json.loads(done.stdout.splitlines()[-1])), flush=True)


def main() -> None:
    """Run one case, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[*MODELS, "table"])
    parser.add_argument("devices", type=int, nargs="?", choices=CHIPS)
    for axis, size in zip(AXES, (0, 1, 1)):
        parser.add_argument(f"--{axis}", type=int, default=size)
    parser.add_argument("--compiler", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--json", action="store_true", help="one line, for programs")
    parser.add_argument("--only", default="", help="of the table: this model")
    given = parser.parse_args()
    if given.model == "table":
        return table(given.compiler, given.only)
    data = given.data or given.devices // (given.fsdp * given.tensor)
    row = measure(given.model, (data, given.fsdp, given.tensor), given.compiler)
    if given.json:
        return print(json.dumps(row))
    print(f"{HEADER}\n{show(row)}")
    for c in row.get("largest", ())[:20]:
        print(
            f"{c['sent'] / 1e9:9.3f} GB {c['kind']:18} {'x'.join(c['axes']):12} "
            f"{c['times']:3} times {c['type'][:40]:40} {c['where'][-60:]}"
        )
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    main()
