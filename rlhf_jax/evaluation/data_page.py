"""The report of a data set as one HTML page that needs nothing else, and as files."""

import base64
import html
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.data_tables import Table, tables

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
img { max-width: 100%; background: white; margin: .5rem 0; }
.texts { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
  gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: .6rem; margin: .2rem 0; max-height: 24rem; overflow-y: auto; }
.chosen pre { border-left: 4px solid #2a9d4a; }
.rejected pre { border-left: 4px solid #c9403a; }
.name, .place { font-size: .8rem; opacity: .7; }
"""
CAPTIONS = {
    "lengths": "How long the texts are",
    "length_bias": "Whether people chose the longer response",
    "turns": "How long the dialogues are",
    "labels": "Labels",
}


def write_report(
    folder: str | os.PathLike, report: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> list[pathlib.Path]:
    """Writes report.json, report.html and the pictures, each in one step.

    Args:
      folder: is made if it is not there; files of the same names are replaced.
      report: from `data_report.examine`.
      pictures: name -> PNG.

    Returns:
      The paths written, the page first.

    Raises:
      UserError: the folder cannot be written to.
    """
    folder = pathlib.Path(folder).expanduser()
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {
        "report.html": encode(render_page(report, pictures)),
        "report.json": encode(text),
        **{f"{name}.png": data for name, data in pictures.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            beside = folder / (name + ".tmp")
            beside.write_bytes(data)
            os.replace(beside, folder / name)
    except OSError as error:
        raise UserError(
            f"cannot write the report to {folder}: {error.strerror or error}; give "
            "another folder by --out"
        ) from error
    return [folder / name for name in contents]


def encode(text: str) -> bytes:
    """UTF-8; half a surrogate pair, which JSON can hold, becomes a question mark."""
    return text.encode("utf-8", errors="replace")


def render_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page: tables, pictures inside it, near-duplicates and samples in full."""
    name = html.escape(report["source"])
    first, *others = tables(report)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title><style>{STYLE}</style></head><body>",
        f"<h1>{name}</h1>",
        _table(first),
        "<h2>Figures</h2>",
        *(_picture(key, data) for key, data in pictures.items()),
        f'<div class="tables">{"".join(map(_table, others))}</div>',
        *_near_duplicates(report),
        "<h2>Samples</h2>",
        *map(_sample, report["samples"]),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _table(table: Table) -> str:
    lines = [f"<tr>{_cells('th', table.header)}</tr>"]
    lines += [f"<tr>{_cells('td', row)}</tr>" for row in table.rows]
    title = html.escape(table.title)
    return f"<div><h3>{title}</h3><table>{''.join(lines)}</table></div>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _picture(name: str, data: bytes) -> str:
    inside = base64.b64encode(data).decode("ascii")
    caption = CAPTIONS.get(name, name)
    return f'<img alt="{caption}" src="data:image/png;base64,{inside}">'


def _near_duplicates(report: Mapping[str, Any]) -> list[str]:
    found = report["near_duplicates"]
    parts = []
    for name in ("row", "prompt"):
        for pair in found.get(name, {}).get("examples", ()):
            places = f"{pair['first']['place']} and {pair['second']['place']}"
            parts.append(f"<h3>{name}s alike by {pair['similarity']:.0%}</h3>")
            parts.append(f'<div class="place">{html.escape(places)}</div>')
            sides = {side: pair[side]["text"] for side in ("first", "second")}
            parts.append(_texts(sides))
    return ["<h2>Near-duplicates</h2>", *parts] if parts else []


def _sample(sample: Mapping[str, str]) -> str:
    texts = {k: v for k, v in sample.items() if k not in ("choice", "place")}
    before = {"prompt": texts.pop("prompt")} if len(texts) > 1 else {}
    return (
        f"<h3>{html.escape(sample['choice'])}</h3>"
        f'<div class="place">{html.escape(sample["place"])}</div>'
        + (_texts(before) if before else "")
        + _texts(texts)
    )


def _texts(texts: Mapping[str, str]) -> str:
    """Texts beside each other, under their names, as they are."""
    blocks = [
        f'<div class="{name}"><span class="name">{name}</span>'
        # a browser drops the line break that follows <pre>
        f"<pre>\n{html.escape(text)}</pre></div>"
        for name, text in texts.items()
    ]
    return f'<div class="texts">{"".join(blocks)}</div>'
