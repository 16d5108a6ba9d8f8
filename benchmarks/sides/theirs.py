"""The other side of the benchmark: transformers' generation and log-probabilities.

python theirs.py <case> <folder>, started by ../peers.py
"""

import functools
import logging
import pathlib
import sys

import numpy as np
import torch
from cases import LONGEST, NEW, PROMPT, REQUESTS, ROWS, TRAIN_TOKENS, tokens
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)
from trl.trainer.utils import selective_log_softmax
from worker import Case, serve

torch.set_num_threads(1)
logging.disable(logging.WARNING)


def load(folder: str, name: str) -> torch.nn.Module:
    """The model in float32 with torch's own attention kernels."""
    return AutoModelForCausalLM.from_pretrained(
        pathlib.Path(folder) / name, attn_implementation="sdpa", dtype=torch.float32
    )


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, its forward pass compiled: twice as fast with a static cache."""
    model.forward = torch.compile(model.forward)
    return model


def score(model: torch.nn.Module, ids: torch.Tensor, first: int) -> torch.Tensor:
    """Log-probabilities of tokens `first` to the last; logits of those alone."""
    logits = model(ids, logits_to_keep=ids.shape[1] - first + 1, use_cache=False).logits
    return selective_log_softmax(logits[:, :-1], ids[:, first:])


def generation(
    folder: str,
    *,
    top_p: float = 1.0,
    rows: int = ROWS,
    name: str = "fixed",
    static: bool = True,
) -> Case:
    """Responses of equal length; see ours.py for what is compared."""
    plain = load(folder, name).eval()
    model = compiled(load(folder, name).eval()) if static else plain
    prompts = torch.from_numpy(tokens("prompts", rows, PROMPT))
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": NEW}
    if name == "gpt2":
        options |= {"eos_token_id": None, "pad_token_id": 50256}
    if static:
        options["cache_implementation"] = "static"

    @torch.inference_mode()
    def draw(number: int, **settings) -> torch.Tensor:
        torch.manual_seed(number)
        settings = {"do_sample": True, "top_k": 0, "top_p": top_p} | settings
        return model.generate(prompts, **options, **settings)

    @torch.inference_mode()
    def outputs():
        greedy = draw(0, do_sample=False, top_p=1.0)[:, PROMPT:]
        told = [score(plain, draw(number).clone(), PROMPT) for number in range(4)]
        return {"greedy": greedy, "sampled": torch.stack(told).mean()}

    def run(number: int):
        draw(number)

    return Case(run, outputs)


def requests(folder: str) -> Case:
    """Responses of all lengths to many prompts, in batches of 16."""
    model = compiled(load(folder, "requests").eval())
    prompts = torch.from_numpy(tokens("requests", REQUESTS, PROMPT))

    @torch.inference_mode()
    def answer(number: int) -> np.ndarray:
        torch.manual_seed(number)
        found = []
        for batch in prompts.split(ROWS):
            options = {"attention_mask": torch.ones_like(batch), "top_k": 0}
            options |= {"cache_implementation": "static", "do_sample": True}
            drawn = model.generate(batch, max_new_tokens=LONGEST, **options)
            found += [length(row) for row in drawn[:, PROMPT:].numpy()]
        return np.array(found)

    return _of_lengths(answer)


def length(row: np.ndarray) -> int:
    """Tokens of a response, EOS included."""
    ends = np.flatnonzero(row == 8191)
    return int(ends[0]) + 1 if len(ends) else len(row)


def _of_lengths(answer) -> Case:
    def outputs():
        drawn = np.concatenate([answer(number) for number in range(4)])
        return {"mean length": drawn.mean()}

    return Case(lambda number: float(answer(number).sum()), outputs)


def requests_paged(folder: str) -> Case:
    """The same by continuous batching, which refills a slot as soon as it is free."""
    model = load(folder, "requests").eval()
    prompts = tokens("requests", REQUESTS, PROMPT).tolist()
    # Of 16 requests: by default the cache would take most of the memory.
    slots = ContinuousBatchingConfig(
        page_size=32, num_blocks=96, max_batch_tokens=512, max_requests_per_batch=ROWS
    )
    settings = GenerationConfig(
        max_new_tokens=LONGEST,
        do_sample=True,
        top_k=0,
        eos_token_id=8191,
        pad_token_id=8190,
    )

    def answer(number: int) -> np.ndarray:
        torch.manual_seed(number)
        found = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=slots
        )
        return np.array([len(one.generated_tokens) for one in found.values()])

    return _of_lengths(answer)


def logprobs(folder: str, *, name: str = "fixed", rows: int = ROWS) -> Case:
    """Log-probabilities of given tokens."""
    model = compiled(load(folder, name).eval())
    given = torch.from_numpy(tokens("logprobs", rows, TRAIN_TOKENS))

    @torch.inference_mode()
    def run(number: int):
        score(model, given, 1)

    @torch.inference_mode()
    def outputs():
        return {"logprobs": score(model, given, 1)}

    return Case(run, outputs)


BUILDERS = {
    "generate": generation,
    "generate_eager": functools.partial(generation, static=False),
    "top_p": functools.partial(generation, top_p=0.9),
    "top_p_eager": functools.partial(generation, top_p=0.9, static=False),
    "requests": requests,
    "requests_paged": requests_paged,
    "logprobs": logprobs,
    "gpt2_generate": functools.partial(generation, name="gpt2"),
    "gpt2_top_p": functools.partial(generation, name="gpt2", top_p=0.9),
    "gpt2_logprobs": functools.partial(logprobs, name="gpt2"),
}


if __name__ == "__main__":
    if sys.argv[1] in BUILDERS:
        serve(BUILDERS)
    else:
        import theirs_training

        serve(theirs_training.BUILDERS)
