"""The files of a run beside its checkpoints; see `open_run` for the names.

Everything is plain text that other tools read: JSON, JSON lines and Markdown. Whole
files are replaced in one step (written beside, then renamed), so a killed process
leaves the old one or the new one. Only process 0 of a many-host run writes; the other
processes call the same functions, which then do nothing.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.errors import UserError


class RunFiles(NamedTuple):
    """The folder of a run; each property is a file or folder in it."""

    workdir: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The frozen configuration, one JSON object."""
        return self.workdir / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        """One flat JSON object a line, in the order of the phases."""
        return self.workdir / "metrics.jsonl"

    @property
    def responses(self) -> pathlib.Path:
        """The folder of `phase_00050.jsonl`: one JSON object a sample."""
        return self.workdir / "responses"

    @property
    def samples(self) -> pathlib.Path:
        """Sample texts for a person to read, in Markdown."""
        return self.workdir / "samples.md"

    @property
    def summary(self) -> pathlib.Path:
        """The figures of the closing summary, one JSON object."""
        return self.workdir / "summary.json"

    @property
    def alerts(self) -> pathlib.Path:
        """What the monitor said, one JSON object a line."""
        return self.workdir / "alerts.jsonl"

    @property
    def curves(self) -> pathlib.Path:
        """The training curves."""
        return self.workdir / "curves.png"

    @property
    def checkpoints(self) -> pathlib.Path:
        """Orbax's folder."""
        return self.workdir / "checkpoints"

    @property
    def adapter(self) -> pathlib.Path:
        """The trained adapter in PEFT's format, of a run with LoRA."""
        return self.workdir / "adapter"

    @property
    def export(self) -> pathlib.Path:
        """The trained model in Hugging Face's format."""
        return self.workdir / "export"


def exported(source: str) -> str:
    """The exported model of a run's folder; any other source as it is."""
    folder = RunFiles(pathlib.Path(source).expanduser()).export
    return str(folder) if folder.is_dir() else source


def open_run(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    may_change: Sequence[str] = (),
) -> RunFiles:
    """Makes the run folder, or finds the same run in it to go on with.

    A try that failed before its first phase is no run yet, and binds nobody to its
    config.

    Args:
      workdir: The folder, `runs/<name>`.
      config: The whole configuration, nested dicts of JSON values.
      may_change: Dotted keys that a resumed run may give differently, each with all
        below it: `("workdir", "log")`. config.json then takes the new values.

    Raises:
      UserError: The folder cannot be written, or holds a run with another config.
    """
    files = RunFiles(pathlib.Path(workdir))
    new = json.loads(_json(config))
    try:
        files.workdir.mkdir(parents=True, exist_ok=True)
        if files.config.exists():
            _check_same(files, new, may_change)
        if _writes():
            _replace(files.config, json.dumps(new, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write in the run folder {files.workdir}: {error.strerror}; "
            "choose another workdir"
        ) from error
    return files


def append_metrics(files: RunFiles, row: Mapping[str, Any]) -> None:
    """Appends one row to metrics.jsonl and flushes it.

    Numbers may be Python's, numpy's or jax's. A float is written with the fewest
    digits that give back the same float (a float32 the same float32), so that equal
    runs write equal bytes. JSON has no nan or inf: they become null.
    """
    if not _writes():
        return
    with files.metrics.open("a", encoding="utf-8") as file:
        file.write(_json(row) + "\n")


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads metrics.jsonl back; a half-written last line is left out.

    Nulls come back as nan. A run without the file has no rows.

    Raises:
      UserError: A line before the last is not a JSON object.
    """
    rows = _read_rows(RunFiles(pathlib.Path(workdir)).metrics)
    return [
        {key: math.nan if value is None else value for key, value in row.items()}
        for _, row in rows
    ]


def drop_after(files: RunFiles, phase: int) -> None:
    """Drops what was written of phases past one: resuming writes it anew.

    A half-written last line, as a killed process leaves it, goes too. For a run
    without a checkpoint give -1, and everything goes.
    """
    if not _writes():
        return
    for path in (files.metrics, files.alerts):
        if path.exists():
            kept = [line for line, row in _read_rows(path) if row["phase"] <= phase]
            _replace(path, "".join(line + "\n" for line in kept))
    for path in files.responses.glob("phase_*"):
        number = re.fullmatch(r"phase_(\d+)\.jsonl", path.name)
        if not number or int(number[1]) > phase:
            path.unlink()
    if files.samples.exists():
        tables = re.split(
            r"^(?=## Phase )", files.samples.read_text("utf-8"), flags=re.M
        )
        kept = [t for t in tables if t and int(t.split(maxsplit=3)[2]) <= phase]
        _replace(files.samples, "".join(kept))


def write_responses(
    files: RunFiles, phase: int, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes responses/phase_<phase>.jsonl, one JSON object a sample."""
    if not _writes():
        return
    files.responses.mkdir(exist_ok=True)
    path = files.responses / f"phase_{phase:05d}.jsonl"
    _replace(path, "".join(_json(row) + "\n" for row in rows))


def read_responses(workdir: str | os.PathLike, phase: int) -> list[dict[str, Any]]:
    """Reads the responses of one phase.

    Raises:
      UserError: The run saved no responses for this phase.
    """
    files = RunFiles(pathlib.Path(workdir))
    path = files.responses / f"phase_{phase:05d}.jsonl"
    if not path.exists():
        have = response_phases(workdir)
        raise UserError(
            f"{files.workdir} has no responses of phase {phase}; "
            f"saved phases: {', '.join(map(str, have)) or 'none'}"
        )
    return [row for _, row in _read_rows(path)]


def response_phases(workdir: str | os.PathLike, split: str = "") -> list[int]:
    """The phases with saved responses, in order; with a split, with some of it."""
    folder = RunFiles(pathlib.Path(workdir)).responses
    found = sorted(int(path.stem[6:]) for path in folder.glob("phase_*.jsonl"))
    if not split:
        return found
    has = lambda phase: any(
        row.get("split") == split for row in read_responses(workdir, phase)
    )
    return [phase for phase in found if has(phase)]


def append_samples(
    files: RunFiles, phase: int, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Adds a table of sample texts to samples.md; the first row names the columns."""
    if not _writes() or not rows:
        return
    columns = list(rows[0])
    lines = [f"## Phase {phase}", "", _markdown_row(columns)]
    lines.append("|" + " --- |" * len(columns))
    lines += [_markdown_row([row.get(c, "") for c in columns]) for row in rows]
    with files.samples.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")


def write_summary(files: RunFiles, summary: Mapping[str, Any]) -> None:
    """Writes summary.json, in the order given."""
    if _writes():
        _replace(files.summary, json.dumps(json.loads(_json(summary)), indent=2) + "\n")


def _writes() -> bool:
    return jax.process_index() == 0


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a whole file in one step."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """Turns a value into what JSON knows, arrays into numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, jax.Array):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        return _plain(list(value) if value.ndim else value[()])
    if hasattr(value, "dtype"):
        # str gives the shortest decimal of this width: float32 0.1 is 0.1, where
        # float() would make it 0.10000000149011612.
        exact = np.issubdtype(value.dtype, np.integer) or value.dtype == bool
        value = value.item() if exact else float(str(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_rows(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads (line, object) pairs, without a last line that was cut short."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):
            break  # behind the last newline: nothing, or a half-written row
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"line {number} of {path} is not a JSON object: {line[:60]!r}; "
                "delete that line"
            )
        rows.append((line, row))
    return rows


def _check_same(files: RunFiles, new: dict, may_change: Sequence[str]) -> None:
    """Raises UserError if the run's config differs in a key that may not change."""
    path = files.config
    try:
        old = dict(_leaves(json.loads(path.read_text("utf-8"))))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a configuration ({error}); choose another workdir, or "
            f"delete {path.parent} to start afresh"
        ) from error
    begun = files.metrics.exists() or any(files.checkpoints.glob("[0-9]*"))
    if "algorithm" in old and not begun:
        return
    now = dict(_leaves(new))
    free = tuple(f"{key}." for key in may_change)
    differ = [
        f"{key} was {_shown(old, key)} and is now {_shown(now, key)}"
        for key in sorted(old.keys() | now.keys())
        if _shown(old, key) != _shown(now, key) and not f"{key}.".startswith(free)
    ]
    if differ:
        more = f" (and {len(differ) - 6} more)" if len(differ) > 6 else ""
        raise UserError(
            f"{path.parent} holds a run with another configuration: "
            f"{', '.join(differ[:6])}{more}; choose another workdir, or delete "
            f"{path.parent} to start afresh"
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key]) if key in leaves else "unset"


def _markdown_row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(_markdown_cell, cells)) + " |"


def _markdown_cell(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    # A text's own line breaks must not end the table's row.
    return "<br>".join(text.splitlines())
