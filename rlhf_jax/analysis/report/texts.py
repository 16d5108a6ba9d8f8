"""The texts of a report: two phases side by side, and answers token by token."""

from collections.abc import Sequence

from rlhf_jax.analysis.compared import Comparison, Pair, Piece
from rlhf_jax.analysis.findings import ColoredAnswer, Findings
from rlhf_jax.analysis.report.labels import number
from rlhf_jax.analysis.report.style import LEVELS
from rlhf_jax.evaluation.pages import escape

CHANGED, UNCHANGED = 12, 3  # pairs shown
LONGEST = 4000  # characters of one text
SHORT = 160  # characters that are shown without a click
LEAST_SCALE = 1.0  # nats of the strongest colour, at least


def side_by_side(findings: Findings) -> str:
    """The answers to some prompts before, at the recommended phase, and at the last."""
    last = next(reversed(findings.comparisons.values()))
    chosen = findings.recommendation.phase
    between = findings.comparisons.get(chosen) if chosen != last.after else None
    middle = {pair.sample_idx: pair for pair in between.pairs} if between else {}
    changed = [pair for pair in last.pairs if pair.before != pair.after][:CHANGED]
    same = [pair for pair in last.pairs if pair.before == pair.after]
    parts = [
        _pair(last, pair, between, middle.get(pair.sample_idx)) for pair in changed
    ]
    if same:
        parts.append(f"<h3>Unchanged: {len(same)} of {len(last.pairs)} prompts</h3>")
        parts += [_unchanged(pair) for pair in same[:UNCHANGED]]
    return "".join(parts)


def colored_answers(answers: Sequence[ColoredAnswer]) -> str:
    """The answers with their tokens coloured, and what the colours mean."""
    ratios = sorted(abs(ratio) for one in answers for _, ratio in one.tokens)
    most = ratios[int(0.98 * (len(ratios) - 1))] if ratios else 0.0
    scale = max(most, LEAST_SCALE)
    legend = (
        f'<div class="legend"><span>−{scale:.1f} nats, said less willingly</span>'
        f"<i></i><span>+{scale:.1f} nats, more willingly</span></div>"
    )
    blocks = [
        _block(one.prompt, one.reward, "".join(_token(*t, scale) for t in one.tokens))
        for one in answers
    ]
    return legend + "".join(blocks)


def folded(text: str) -> str:
    """A text; of a long one the start, and all of it after a click."""
    if len(text) <= SHORT:
        return f'<div class="text">{escape(text)}</div>'
    start = f'<span class="start">{escape(text[:SHORT])}…</span>'
    whole = f'<span class="all">{len(text):,} characters</span>'
    return (
        f"<details><summary>{start}{whole}</summary>"
        f'<div class="text">{escape(text[:LONGEST])}{_rest(len(text))}</div></details>'
    )


def _pair(last: Comparison, pair: Pair, between: Comparison | None, middle) -> str:
    sides = [
        (last.before, pair.reward_before, _marked(pair.pieces, "removed", "del")),
        (last.after, pair.reward_after, _marked(pair.pieces, "added", "ins")),
    ]
    if between and middle:
        text = _marked(middle.pieces, "added", "ins")
        sides.insert(1, (between.after, middle.reward_after, text))
    return _sides(pair.prompt, sides, pair.reward_after - pair.reward_before)


def _unchanged(pair: Pair) -> str:
    text = f"{escape(pair.after[:LONGEST])}{_rest(len(pair.after))}"
    return _block(pair.prompt, pair.reward_after, text)


def _block(prompt: str, reward: float, text: str) -> str:
    """One answer in its box."""
    asked = _asked(prompt, reward)
    return f'<div class="pair">{asked}<div class="text">{text}</div></div>'


def _sides(prompt: str, sides: Sequence[tuple[int, float, str]], gained: float) -> str:
    blocks = [
        f'<div><span class="quiet">phase {phase}, reward {number(reward, "+.2f")}'
        f'</span><div class="text">{text}</div></div>'
        for phase, reward, text in sides
    ]
    return (
        f'<div class="pair">{_asked(prompt, gained)}'
        f'<div class="sides">{"".join(blocks)}</div></div>'
    )


def _asked(prompt: str, reward: float) -> str:
    told = f'<span class="quiet">reward {number(reward, "+.2f")}</span>'
    return f'<p class="asked"><b>{escape(prompt[:LONGEST])}</b> {told}</p>'


def _marked(pieces: Sequence[Piece], kind: str, tag: str) -> str:
    """One side of a pair: what both have, and in marks what it alone has."""
    parts, length = [], sum(len(p.text) for p in pieces if p.kind in ("same", kind))
    left = LONGEST
    for piece in pieces:
        if piece.kind not in ("same", kind) or not left:
            continue
        text = piece.text[:left]
        left -= len(text)
        space, word = _parted(text)
        shown = escape(word)
        marked = shown if piece.kind == "same" else f"<{tag}>{shown}</{tag}>"
        parts.append(escape(space) + marked)
    return "".join(parts) + _rest(length)


def _rest(length: int) -> str:
    more = length - LONGEST
    return f' <span class="quiet">… {more:,} characters more</span>' if more > 0 else ""


def _token(text: str, ratio: float, scale: float) -> str:
    level = min(LEVELS, round(LEVELS * abs(ratio) / scale))
    style = f' class="{"m" if ratio > 0 else "l"}{level}"' if level else ""
    space, word = _parted(text)
    told = f'title="{number(ratio, "+.3f")} nats"'
    return f"{escape(space)}<span{style} {told}>{escape(word)}</span>"


def _parted(text: str) -> tuple[str, str]:
    """The space before a word, which looks better without colour, and the word."""
    word = text.lstrip() or text
    return text[: len(text) - len(word)], word
