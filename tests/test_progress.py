"""What is shown, on a terminal and in a log file."""

import io
import re

import pytest
from rich.console import Console

from rlhf_jax import progress

FIELDS = {
    "reward/mean": "reward {:+.3f}",
    "kl": "kl {:.2f}",
    "time/tokens_per_s": "{:,.0f} tok/s",
}
ROW = {"reward/mean": 0.4123, "kl": 2.31, "time/tokens_per_s": 1240.4, "other": 1}


def plain_console():
    return Console(file=io.StringIO(), width=80, _environ={})


def terminal(width=80):
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        color_system=None,
        _environ={"TERM": "xterm"},
    )


def shown(console):
    return console.file.getvalue()


def has_controls(text):
    return any(not c.isprintable() for c in text.replace("\n", ""))


def test_plain_lines(monkeypatch):
    clock = iter([0.0, 30.0, 32.0, 34.0])  # the first phase compiles
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    console = plain_console()
    bar = progress.open_progress(console, 60, FIELDS, first=10)
    bar.update(11, ROW)
    bar.update(12, {"kl": float("nan")})
    bar.update(60, ROW)
    bar.close()
    assert shown(console) == (
        "phase 11/60  reward +0.412  kl 2.31  1,240 tok/s\n"
        "phase 12/60  kl nan  0:01:36 left\n"
        "phase 60/60  reward +0.412  kl 2.31  1,240 tok/s\n"
    )


def test_plain_tables_have_no_control_characters():
    console = plain_console()
    progress.show_plan(console, "PPO", [("model", "builtin"), ("mesh", "2 x 2")])
    progress.show_samples(
        console,
        "phase 3",
        [{"prompt": "p", "response": "\x1b[31mred\r\n[bold]x[/]", "reward": 1.0}],
    )
    progress.show_summary(
        console, "done", [progress.Change("reward", 0.1, 0.5, 0.2, 0.1)], [("KL", "3")]
    )
    progress.say(console, "one [bold] line\x07")
    text = shown(console)
    assert not has_controls(text)
    assert "[bold]x[/]" in text
    assert "one [bold] line�" in text
    assert max(map(len, text.splitlines())) <= 80


def test_terminal_shows_one_bar_and_prints_above_it():
    console = terminal()
    bar = progress.open_progress(console, 60, FIELDS)
    bar.update(12, ROW)
    progress.show_samples(console, "phase 12", [{"prompt": "p", "response": "r"}])
    bar.update(13, ROW | {"kl": 9.75})
    bar.close()
    text = shown(console)
    assert "phase 13/60" in text
    assert "kl 9.75" in text
    assert re.search(r"\d left", text)
    assert "\x1b[" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back
    assert text.index("response") < text.rindex("phase 13/60")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_bar_fits_the_terminal(width):
    console = terminal(width)
    bar = progress.open_progress(console, 60, FIELDS)
    bar.update(12, ROW)
    bar.close()
    visible = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown(console)).replace("\r", "\n")
    assert max(map(len, visible.splitlines())) <= width


def test_at_most_four_samples_and_long_texts_are_cut():
    console = plain_console()
    rows = [{"prompt": f"prompt{i}", "response": "word " * 500} for i in range(9)]
    progress.show_samples(console, "phase 1", rows)
    text = shown(console)
    assert "prompt3" in text
    assert "prompt4" not in text
    assert text.count("…") == 4
    assert text.count("word") < 4 * 90
    progress.show_samples(console, "phase 2", [])
    assert shown(console) == text


def test_counts_are_one_line():
    console = plain_console()
    progress.show_counts(console, "a.jsonl, train", {"tie\x07": 3, "kept": 12345})
    assert shown(console) == "a.jsonl, train: 3 tie�, 12,345 kept\n"


def test_summary_gives_the_gain_in_starting_spreads():
    console = plain_console()
    changes = [
        progress.Change("held-out reward", 0.1, 0.9, 0.4, 0.3),
        progress.Change("judge", 0.25, 0.5),
    ]
    progress.show_summary(console, "done", changes, [("curves", "runs/a/curves.png")])
    text = shown(console)
    # (0.9 - 0.1) / 0.4 = 2
    assert re.search(
        r"\+0.100 ± 0.400 +→ +\+0.900 ± 0.300 +\+0.800 \(\+2.0 std\)", text
    )
    assert re.search(r"judge +\+0.250 +→ +\+0.500 +\+0.250 ", text)
    assert "runs/a/curves.png" in text


def test_other_processes_are_quiet(monkeypatch, capsys):
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    progress.say(progress.make_console(), "hello")
    assert capsys.readouterr().out == ""
