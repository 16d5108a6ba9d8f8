"""Findings of made-up runs, and a reader of the page that they make."""

import functools
import html.parser

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.analysis.anomalies import find_anomalies
from rlhf_jax.analysis.evidence import Evidence
from rlhf_jax.analysis.findings import make_findings
from tests.analysis.one_phase import draw_samples

PHASES = (0, 5, 10, 15, 20)
PROMPTS = 24
NASTY = '<script>alert("x")</script> &amp; \x1b[31m\x00 \ud800 <b>'
PARTS = ("embed", "layers/2/attention", "layers/2/mlp", "layers/10/mlp", "all")


def draw_phase(phase, *, wrong_from=None):
    """Rewards rise by 0.2 a phase and the KL with them; a wrong one says one thing."""
    samples = draw_samples(phase, prompts=PROMPTS, phase=phase)
    gain = np.float32(0.002 * phase)
    scores = samples.scores | {"reward": samples.scores["reward"] + 0.2 * phase}
    samples = samples._replace(
        scores=scores, ref_logprobs=samples.ref_logprobs - gain * samples.mask
    )
    if wrong_from is not None and phase >= wrong_from:
        said = [f" the best of all {NASTY}" * 20] * PROMPTS
        worse = samples.scores["judge/kind"] - np.float32(0.1 * phase)
        samples = samples._replace(
            responses=said, scores=samples.scores | {"judge/kind": worse}
        )
    return samples


def make_evidence(phases=PHASES, **settings):
    samples = {phase: draw_phase(phase, **settings) for phase in phases}
    return Evidence(
        samples=samples,
        next_logprobs={p: samples[p].logprobs - 0.01 for p in phases[:-1]},
        weights={
            p: {part: 0.001 * (p + PARTS.index(part)) for part in sorted(PARTS)}
            for p in phases
        },
        states={p: np.array([1.0, 1.0 - p / 1000]) for p in phases},
        skipped={},
    )


def without_weights(evidence):
    """What is left of a run whose checkpoints are gone."""
    nothing = dict.fromkeys(("tokens", "mask", "logprobs", "ref_logprobs"))
    samples = {p: one._replace(**nothing) for p, one in evidence.samples.items()}
    return Evidence(samples, {}, {}, {}, {25: "<i>no such file</i>"})


def find(evidence):
    every = list(evidence.samples.values())
    return make_findings(
        "/runs/example",
        ConfigDict({"algorithm": "ppo"}),
        evidence,
        find_anomalies(every[0], every[1:]),
        lambda tokens: " a" * len(tokens),
    )


@functools.cache
def healthy():
    return find(make_evidence())


@functools.cache
def wrong():
    return find(make_evidence(wrong_from=10))


@functools.cache
def texts_only():
    return find(without_weights(make_evidence(wrong_from=10)))


@functools.cache
def one_phase():
    return find(make_evidence((0,)))


class Page(html.parser.HTMLParser):
    """Reads a page strictly: every tag that opens is closed, in order.

    Attributes:
      tags: name and attributes of every tag.
      text: all that is shown.
      tables: each a list of rows, each a list of the cells' texts.
      of: tag or ".class" -> the texts inside of each.
    """

    VOID = ("meta", "br")

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.tables = [], "", []
        self.of, self._open = {}, []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in self.VOID:
            return
        names = [tag, *(f".{x}" for x in (dict(attrs).get("class") or "").split())]
        self._open.append((tag, names, len(self.text)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        opened, names, start = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        for name in names:
            self.of.setdefault(name, []).append(self.text[start:])
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.text[start:])

    def handle_data(self, data):
        if not self._open or self._open[-1][0] != "style":
            self.text += data
