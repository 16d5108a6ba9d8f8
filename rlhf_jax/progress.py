"""What a person sees while a run goes on: a live bar on a terminal, lines elsewhere.

Everything takes the `rich` console that `make_console` gives, so that tables print
above the live bar. A log file or a pipe gets one short line a phase, and no control
characters.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich import box, panel, progress
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

MAX_SAMPLES = 4
MAX_SAMPLE_CHARACTERS = 400


class Progress(NamedTuple):
    """update(phase, row) shows the phases done and a row of metrics; then close()."""

    update: Callable[[int, Mapping[str, Any]], None]
    close: Callable[[], None]


class Change(NamedTuple):
    """A figure before and after training, with its spread over samples if known."""

    label: str
    before: float
    after: float
    before_std: float | None = None
    after_std: float | None = None


def make_console() -> Console:
    """Returns the console on stdout; all but process 0 of a many-host run are quiet."""
    return Console(quiet=jax.process_index() != 0)


def watched(console: Console) -> bool:
    """Whether a person watches a terminal that can redraw a line."""
    return console.is_terminal and not console.is_dumb_terminal


def open_progress(
    console: Console, total: int, fields: Mapping[str, str], *, first: int = 0
) -> Progress:
    """Starts to show phases `first` to `total`.

    Args:
      console: From `make_console`.
      total: Phases of the whole run.
      fields: Metrics key -> how it reads, in the order shown, as
        `{"reward/mean": "reward {:+.3f}", "time/tokens_per_s": "{:,.0f} tok/s"}`.
        A row without the key leaves the field out.
      first: Phases done before, in a resumed run.
    """
    time_left = _make_clock(total, first)
    if not watched(console):

        def print_line(phase: int, row: Mapping[str, Any]) -> None:
            width = len(str(total))
            parts = [f"phase {phase:>{width}}/{total}", *_readings(fields, row)]
            parts.append(time_left(phase))
            say(console, "  ".join(part for part in parts if part))

        return Progress(print_line, lambda: None)

    bar = progress.Progress(
        progress.TextColumn("phase {task.completed}/{task.total}"),
        progress.BarColumn(bar_width=None),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}", markup=False),
        expand=True,
    )
    task = bar.add_task("", total=total, completed=first, left="")
    live = Live(bar, console=console, refresh_per_second=4)
    live.start()

    def move_bar(phase: int, row: Mapping[str, Any]) -> None:
        bar.update(task, completed=phase, left=time_left(phase))
        live.update(Group(bar, Text("  ".join(_readings(fields, row)))))

    return Progress(move_bar, live.stop)


def say(console: Console, text: str) -> None:
    """Prints one line as it is, above the bar if there is one."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def show_plan(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Shows what is about to run: a table of (what, value)."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(printable(str(value))))
    console.print(table)


def show_counts(console: Console, title: str, counts: Mapping[str, int]) -> None:
    """Says in a line how many rows of a source are kept, and why others are not."""
    told = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    say(console, f"{title}: {told}")


def show_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Shows figures: the first column names them, the others hold them."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for number, name in enumerate(header):
        justify = "right" if number else "left"
        table.add_column(Text(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def show_samples(
    console: Console, title: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Shows at most four sample texts.

    Args:
      console: From `make_console`.
      title: Say which phase.
      rows: Texts and numbers by column name, as
        `{"prompt": ..., "response": ..., "reward": 1.2, "kl": 0.4}`.
    """
    rows = rows[:MAX_SAMPLES]
    if not rows:
        return
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_lines=True
    )
    for name, value in rows[0].items():
        if isinstance(value, str):
            table.add_column(name, overflow="fold", ratio=1 if name == "prompt" else 2)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_sample_cell(value) for value in row.values()))
    console.print(table)


def show_summary(
    console: Console,
    title: str,
    changes: Sequence[Change],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Shows the closing panel: figures before and after, then (label, text) facts."""
    figures = Table(box=None, show_header=False, pad_edge=False)
    for change in changes:
        before = _with_spread(change.before, change.before_std)
        after = _with_spread(change.after, change.after_std)
        gain = f"{change.after - change.before:+.3f}"
        if change.before_std:
            gain += f" ({(change.after - change.before) / change.before_std:+.1f} std)"
        figures.add_row(
            Text(change.label, "bold"), before, "→", Text(after, "bold"), Text(gain)
        )
    listing = Table(box=None, show_header=False, pad_edge=False)
    listing.add_column(style="bold", no_wrap=True)
    listing.add_column(overflow="fold")
    for label, text in facts:
        listing.add_row(Text(label), Text(printable(str(text))))
    body = Group(figures, Text(), listing) if changes else listing
    console.print(panel.Panel(body, title=title, title_align="left", expand=False))


def printable(text: str) -> str:
    """Shows line breaks as ⏎ and drops what could steer a terminal."""
    text = re.sub(r"\s*\n\s*", " ⏎ ", text.replace("\t", " "))
    return "".join(c if c.isprintable() else "�" for c in text)


def _make_clock(total: int, first: int) -> Callable[[int], str]:
    """Returns a function: phases done -> "0:01:30 left", guessed from the pace."""
    paces: list[float] = []
    before, then = first, time.monotonic()

    def left(phase: int) -> str:
        nonlocal before, then
        now = time.monotonic()
        if phase > before:
            paces.append((now - then) / (phase - before))
            before, then = phase, now
        # The first phase compiles; the last few tell what is to come.
        recent = paces[1:][-20:]
        if not recent or phase >= total:
            return ""
        seconds = (total - phase) * sum(recent) / len(recent)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    return left


def _readings(fields: Mapping[str, str], row: Mapping[str, Any]) -> list[str]:
    return [text.format(float(row[key])) for key, text in fields.items() if key in row]


def _sample_cell(value: Any) -> Text:
    if not isinstance(value, str):
        return Text(f"{float(value):.2f}")
    if len(value) > MAX_SAMPLE_CHARACTERS:
        value = value[:MAX_SAMPLE_CHARACTERS] + "…"
    return Text(printable(value))


def _with_spread(mean: float, std: float | None) -> str:
    return f"{mean:+.3f}" if std is None else f"{mean:+.3f} ± {std:.3f}"
