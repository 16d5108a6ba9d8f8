"""Whole GRPO and PPO phases of a 1B model on an accelerator, and TRL's GRPO step.

    python benchmarks/accelerator_phase.py export /tmp/llama1b
    python benchmarks/accelerator_phase.py grpo /tmp/llama1b
    python benchmarks/accelerator_phase.py ppo /tmp/llama1b
    python benchmarks/accelerator_phase.py trl /tmp/llama1b

The shape of Llama 3.2 1B with fresh weights, 8 prompts of 128 tokens, 8 responses of
128 tokens to each, the share of even tokens as the reward, bfloat16. One epoch of one
minibatch with a reference. Of a phase the busy share is told: how long the device's
stream computes, over how long the phase takes.
"""

import glob
import pathlib
import statistics
import sys
import tempfile
import time

PROMPTS, GROUP, PROMPT, NEW, ROUNDS = 8, 8, 128, 128, 5
V = 128_256
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "pad_token_id": V - 2,
    "eos_token_id": V - 1,
    "bos_token_id": None,
    "dtype": "bfloat16",
}


def prompt_texts():
    """More prompts than are asked, each of PROMPT words of one token."""
    word = lambda i: f"w{i % (V - 2)}"
    rows = range(16 * PROMPTS)
    return [
        " ".join(word(7919 * (row * PROMPT + i)) for i in range(PROMPT)) for row in rows
    ]


def even_share(text):
    """The share of even tokens."""
    numbers = [int(word[1:]) for word in text.split() if word[0] == "w"]
    return sum(n % 2 == 0 for n in numbers) / max(len(numbers), 1)


def export(folder):
    """Writes the model and a tokenizer of words."""
    import jax
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlhf_jax.models.families import config_from_hf
    from rlhf_jax.models.pretrained import Pretrained, save_pretrained
    from rlhf_jax.models.transformer import make_model

    shape = config_from_hf(HF_CONFIG)
    params = jax.jit(make_model(shape).init)(jax.random.key(0))
    save_pretrained(folder, Pretrained(shape, HF_CONFIG, params))
    words = {f"w{i}": i for i in range(V - 2)} | {"<pad>": V - 2, "</s>": V - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)


def config_of(algorithm, folder):
    """configs/<algorithm>.py at the benchmark's sizes."""
    import runpy

    root = pathlib.Path(__file__).parents[1]
    path = root / "configs" / f"{algorithm}.py"
    config = runpy.run_path(str(path))["get_config"]()
    rows = {"grpo": {"prompts": PROMPTS, "group": GROUP}}
    config.rollout.update(rows.get(algorithm, {"prompts": PROMPTS * GROUP}))
    config.rollout.update(
        prompt_tokens=PROMPT, max_new_tokens=NEW, temperature=1.0, reuse_logprobs=True
    )
    config[algorithm].update(epochs=1, minibatches=1)
    config.optimizer.lr = 1e-6
    config.update(model=folder, dtype="bfloat16", remat=False, logprob_chunk=32)
    return config


def reward():
    """The share of even tokens, as a run's only reward."""
    import numpy as np

    from rlhf_jax.rewards import Reward

    def score(prompts, responses):
        return np.array([even_share(text) for text in responses], np.float32)

    return [Reward("even", "", 1.0, score)]


def grpo_phase(folder):
    """(run_phase, state) of GRPO."""
    from rlhf_jax import loading, sharding
    from rlhf_jax.data.prompts import Prompts
    from rlhf_jax.data.tokenizer import load_tokenizer
    from rlhf_jax.rollout.sampler import sampler_of
    from rlhf_jax.trainers import grpo
    from rlhf_jax.trainers.optimizer import make_optimizer

    config = config_of("grpo", folder)
    mesh = sharding.make_mesh()
    loaded = loading.load_model(folder, config, mesh)
    optimizer = make_optimizer(config.optimizer, config.optimizer.lr, 1000)
    sample = sampler_of(config.rollout, loaded.model, load_tokenizer(folder), mesh)
    reference = loading.copy(loaded.params)
    state = grpo.State(
        loaded.params, loading.init_optimizer(optimizer, loaded.params, mesh)
    )
    run_phase = grpo.make_phase(
        *(config, mesh, loaded.model, optimizer, sample, reward()),
        *(Prompts(prompt_texts(), {}), reference, None),
    )
    return run_phase, state


def ppo_phase(folder):
    """(run_phase, state) of PPO; the reward is a model, the one that ships."""
    from rlhf_jax import loading, sharding
    from rlhf_jax.data.prompts import Prompts
    from rlhf_jax.data.tokenizer import load_tokenizer
    from rlhf_jax.rewards import build_rewards
    from rlhf_jax.rollout.sampler import sampler_of
    from rlhf_jax.trainers import ppo

    config = config_of("ppo", folder)
    config.logprob_chunk = 32
    mesh = sharding.make_mesh()
    loaded = loading.load_model(folder, config, mesh)
    reference = loading.copy(loaded.params)
    models, state, optimizer = ppo.make_state(config, loaded, loaded.params, mesh)
    sample = sampler_of(config.rollout, loaded.model, load_tokenizer(folder), mesh)
    rewards = build_rewards(config.rewards, mesh=mesh)
    run_phase = ppo.make_phase(
        *(config, mesh, models, optimizer, sample, rewards),
        *(Prompts(prompt_texts(), {}), reference, None),
    )
    return run_phase, state


def busy_seconds(folder):
    """How long the busiest stream of the trace computed."""
    import jax

    path = sorted(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True))[-1]
    data = jax.profiler.ProfileData.from_file(path)
    lines = [
        sum(event.duration_ns for event in line.events)
        for plane in data.planes
        if "/device:" in plane.name
        for line in plane.lines
        if "Stream" in line.name
    ]
    return max(lines, default=0.0) / 1e9


def ours(make, folder):
    """Times phases, then traces one."""
    import jax

    from rlhf_jax import sharding

    with jax.set_mesh(sharding.make_mesh()):
        run_phase, state = make(folder)
        seconds, parts = [], []
        for phase in range(1, ROUNDS + 3):
            started = time.perf_counter()
            state, metrics, _ = run_phase(state, phase)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - started)
            parts.append((metrics["time/rollout_s"], metrics["time/reward_s"]))
        trace = tempfile.mkdtemp()
        with jax.profiler.trace(trace):
            started = time.perf_counter()
            state, metrics, _ = run_phase(state, ROUNDS + 3)
            jax.block_until_ready((state, metrics))
            traced = time.perf_counter() - started
    median = statistics.median(seconds[2:])
    busy = busy_seconds(trace)
    print(
        f"{make.__name__}: {median:.3f} s a phase ({min(seconds[2:]):.3f} to "
        f"{max(seconds[2:]):.3f}), first {seconds[0]:.1f} s; of the last rollout "
        f"{parts[-1][0]:.3f} s, rewards {parts[-1][1]:.3f} s; traced {traced:.3f} s, "
        f"of which the device computed {busy:.3f} s, {busy / traced:.0%}; "
        f"logprob gap {float(metrics['first_step/ratio_deviation']):.3f}; "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    )


def trl(folder):
    """Times steps of GRPOTrainer with `generate` of transformers."""
    import torch
    import transformers
    import trl as library
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    settings = library.GRPOConfig(
        tempfile.mkdtemp(),
        learning_rate=1e-6,
        max_steps=ROUNDS + 2,
        logging_strategy="no",
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=True,
        optim="adamw_torch_fused",
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.04,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    trainer = library.GRPOTrainer(
        model,
        lambda completions, **_: [even_share(text) for text in completions],
        settings,
        train_dataset=Dataset.from_list([{"prompt": x} for x in prompt_texts()]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    started = time.perf_counter()
    trainer.train()
    whole = (time.perf_counter() - started) / (ROUNDS + 2)
    print(
        f"TRL {library.__version__}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}: {statistics.median(seconds[2:]):.3f} s from a step's "
        f"begin to its end, {whole:.3f} s a step in all"
    )


def main(arguments):
    """Runs the part that is named."""
    grpo = lambda folder: ours(grpo_phase, folder)
    ppo = lambda folder: ours(ppo_phase, folder)
    parts = {"export": export, "grpo": grpo, "ppo": ppo, "trl": trl}
    if len(arguments) != 2 or arguments[0] not in parts:
        sys.exit(f"usage: python benchmarks/accelerator_phase.py {'|'.join(parts)} DIR")
    parts[arguments[0]](arguments[1])


if __name__ == "__main__":
    main(sys.argv[1:])
