"""The report: whole, safe, and with the numbers of the findings."""

import re

import numpy as np
import pytest

from rlhf_jax.analysis.findings import ColoredAnswer
from rlhf_jax.analysis.report.page import render_page

from . import example_findings
from .example_findings import PARTS, PHASES, Page, make_evidence

SECTIONS = [
    *("Curves", "Over-optimisation", "Phases", "Trends", "Anomalies", "Side by side"),
    *("Token by token", "Weights and inner states"),
]
EVERY = ["healthy", "wrong", "texts_only", "one_phase"]


def page_of(name):
    return Page(render_page(getattr(example_findings, name)()))


def as_number(text):
    """The first number of a cell."""
    return float(re.search(r"[−+]?[\d.]+", text)[0].replace("−", "-"))


def table_with(page, head):
    (found,) = [table for table in page.tables if head in table[0]]
    return found


@pytest.mark.parametrize("name", EVERY)
def test_every_section_is_there_and_every_link_leads_to_it(name):
    page = page_of(name)
    assert page.of["h2"] == SECTIONS
    places = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert len(links) == len(SECTIONS)
    assert {link.removeprefix("#") for link in links} == places


@pytest.mark.parametrize("name", EVERY)
def test_the_page_asks_for_nothing_from_elsewhere(name):
    page = page_of(name)
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "link", "img", "iframe", "object"} & tags
    names = {attr for _, attrs in page.tags for attr in attrs}
    assert not {"src", "srcset", "onload", "onclick"} & names
    written = render_page(getattr(example_findings, name)())
    assert "url(" not in written
    assert "@import" not in written
    assert "http" not in written
    assert '<meta name="viewport"' in written


def test_texts_are_shown_and_do_nothing():
    written = render_page(example_findings.wrong())
    written.encode("utf-8")  # half a surrogate pair would raise
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", written)
    page = Page(written)
    seen = '<script>alert("x")</script> &amp; ␛[31m␀ � <b>'
    assert any(seen in text for text in page.of["ins"])
    assert any(seen in text for text in page.of[".odd"])


def test_the_phases_table_has_the_means_of_the_samples():
    evidence = make_evidence()
    rows = table_with(page_of("healthy"), "anomalies")[1:]
    assert [as_number(row[0].replace("★ ", "")) for row in rows] == list(PHASES)
    for row, samples in zip(rows, evidence.samples.values()):
        reward = samples.scores["reward"].astype(np.float64)
        kl = (samples.logprobs - samples.ref_logprobs).sum(axis=1)
        assert as_number(row[1]) == pytest.approx(reward.mean(), abs=6e-4)
        assert as_number(row[2]) == pytest.approx(reward.std(), abs=6e-4)
        assert as_number(row[3]) == pytest.approx(kl.mean(), abs=6e-4)
        assert as_number(row[4]) == pytest.approx(samples.mask.sum(1).mean(), abs=0.06)


def test_the_headline_has_the_change_and_the_checkpoint():
    page = page_of("healthy")
    evidence = make_evidence()
    first, last = (evidence.samples[phase].scores["reward"] for phase in (0, 20))
    cards = page.of[".card"]
    (card,) = [card for card in cards if card.startswith("reward, first to last")]
    # each prompt gained 0.2 · 20 and what the seeds differ by
    change = as_number(card.removeprefix("reward, first to last phase"))
    assert change == pytest.approx(np.mean(last - first), abs=6e-4)
    take = example_findings.healthy().recommendation.phase
    assert f"phase {take}checkpoints/{take}" in cards[0]
    assert page.of[".verdict"][0].startswith("Healthy")


def test_a_run_that_went_wrong_says_when_and_why():
    page = page_of("wrong")
    assert page.of[".verdict"][0].startswith("Went wrong from phase 10 on")
    assert "Repetition. From phase 0 to phase 10" in page.of[".verdict"][0]
    assert "wrong from 10" in page.of["text"]
    # phases from the onset on, in the overview of kinds
    (head, *rows) = table_with(page, "kind")
    assert head == ["kind", "10", "15", "20"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["near copies"] == ["●"] * 3


def test_every_measure_has_its_curve():
    page = page_of("healthy")
    captions = page.of["figcaption"]
    for name in ("reward", "judge kind", "KL to the reference", "length", "distinct-2"):
        assert any(caption.startswith(name) for caption in captions)
    told = page.of["title"]
    mean = make_evidence().samples[15].scores["reward"].mean(dtype=np.float64)
    assert any(text.startswith(f"phase 15: +{mean:.3f} [") for text in told)
    # the KL to the next phase is 0.01 nats a token, of all 48 places, at the next
    steps = [text for text in told if "0.480 [0.480, 0.480]" in text]
    assert [text.partition(":")[0] for text in steps] == [
        f"phase {p}" for p in PHASES[1:]
    ]


def test_weights_and_states():
    page = page_of("healthy")
    weights, states = page.tables[-2:]
    assert [row[0] for row in weights] == ["", *PARTS]
    assert [cell.removeprefix("★ ") for cell in weights[0][1:]] == list(
        map(str, PHASES)
    )
    # 0.001 · (20 + 2), the last phase of the third part
    assert weights[3][-1] == "2.20%"
    assert states[2] == ["layer 1", "1.0000", "0.9950", "0.9900", "0.9850", "0.9800"]


def test_tokens_are_coloured_by_their_log_ratio():
    answer = ColoredAnswer(
        "why", 0.5, [(" yes", 2.0), (" no", -1.0), ("", 0.0), (" <b>", 0.1)]
    )
    findings = example_findings.healthy()._replace(colored=[answer])
    page = Page(render_page(findings))
    spans = [
        attrs for tag, attrs in page.tags if tag == "span" and "nats" in str(attrs)
    ]
    # the scale is the 98 % quantile of |log ratio|, here 1: 8 levels to each side
    assert [span.get("class") for span in spans] == ["m8", "l8", None, "m1"]
    assert [span["title"] for span in spans] == [
        *("+2.000 nats", "−1.000 nats", "+0.000 nats", "+0.100 nats")
    ]
    assert " yes no <b>" in page.text


def test_pairs_mark_what_went_and_what_came():
    findings = example_findings.healthy()
    page = page_of("healthy")
    last = findings.comparisons[20]
    for pair in last.pairs[:12]:
        assert pair.before in page.text
        assert pair.after in page.text
    first = last.pairs[0]
    gone = [piece.text for piece in first.pieces if piece.kind == "removed"]
    assert [text.strip() for text in gone] == [
        text.strip() for text in page.of["del"][: len(gone)]
    ]
    # twelve pairs, none that is unchanged, and six answers token by token
    assert len(page.of[".pair"]) == 12 + 6


def test_unchanged_answers_are_counted():
    evidence = make_evidence((0, 5))
    evidence.samples[5] = evidence.samples[5]._replace(
        responses=evidence.samples[0].responses
    )
    page = Page(render_page(example_findings.find(evidence)))
    assert "Unchanged: 24 of 24 prompts" in page.text
    assert "del" not in page.of


def test_many_anomalies_are_cut_and_counted():
    findings = example_findings.wrong()
    answers = [a for a in findings.anomalies if a.sample_idx is not None]
    page = page_of("wrong")
    whole = [a for a in findings.anomalies if a.sample_idx is None]
    assert len(answers) > 60
    assert len(page.of[".odd"]) == len(whole) + 60
    assert f"{len(answers) - 60} more answers of {len(answers)}" in page.text
    assert "characters" in page.of["summary"][-1]  # a long text opens by a click
    kinds = {a.kind.replace("_", " ") for a in answers}
    heads = {text.partition(":")[0] for text in page.of["h3"]}
    assert kinds <= heads


def test_a_run_without_checkpoints_says_what_is_left_out():
    page = page_of("texts_only")
    assert page.text.count("the checkpoints of this run are gone") == 3
    assert "which is gone" in page.of[".card"][0]
    assert "<i>no such file</i>" in page.of["details"][0]
    assert "words a response" in page.text
    assert "tokens a response" not in page.text
    assert not any("KL" in caption for caption in page.of["figcaption"])


def test_one_phase_is_shown_without_comparisons():
    page = page_of("one_phase")
    assert page.text.count("it takes two phases") == 4
    assert "Only phase 0 was looked at" in page.of[".verdict"][0]
    assert len(table_with(page, "anomalies")) == 2


def test_long_runs_stay_small():
    findings = example_findings.healthy()
    phases = range(400)
    row, weights = findings.summaries[0], findings.weights[0]
    findings = findings._replace(
        summaries={phase: row | {"phase": phase} for phase in phases},
        weights=dict.fromkeys(phases, weights),
        comparisons={399: findings.comparisons[20]._replace(after=399)},
        recommendation=findings.recommendation._replace(phase=137),
    )
    written = render_page(findings)
    assert len(written.encode()) < 1_500_000
    page = Page(written)
    heads = next(table for table in page.tables if table[0][0] == "")[0]
    assert len(heads) <= 25
    assert "★ 137" in heads
    assert "376 phases between them are not shown" in page.text
