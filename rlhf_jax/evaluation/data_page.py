"""The report of a data set as one HTML page that needs nothing else, and as files."""

import base64
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from rlhf_jax.evaluation import pages
from rlhf_jax.evaluation.data_tables import Table, tables
from rlhf_jax.evaluation.pages import escape

STYLE = """
h1, .place { overflow-wrap: anywhere; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
img { max-width: 100%; background: white; margin: .5rem 0; }
.texts { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
  gap: 1rem; }
.chosen pre { border-left: 4px solid #2a9d4a; }
.rejected pre { border-left: 4px solid #c9403a; }
.name, .place { font-size: .8rem; opacity: .7; }
@media (max-width: 40rem) {
  table { display: block; overflow-x: auto; }
  .tables > div { max-width: 100%; }
  .texts { grid-auto-flow: row; }
}
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
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents = {
        "report.html": render_page(report, pictures),
        "report.json": text,
        **{f"{name}.png": data for name, data in pictures.items()},
    }
    return pages.write_files(folder, contents)


def render_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page: tables, pictures inside it, near-duplicates and samples in full."""
    first, *others = tables(report)
    body = [
        f"<h1>{escape(report['source'])}</h1>",
        _table(first),
        "<h2>Figures</h2>",
        *(_picture(key, data) for key, data in pictures.items()),
        f'<div class="tables">{"".join(map(_table, others))}</div>',
        *_near_duplicates(report),
        "<h2>Samples</h2>",
        *map(_sample, report["samples"]),
    ]
    return pages.frame(report["source"], STYLE, body)


def _table(table: Table) -> str:
    header, *rows = ([*map(escape, row)] for row in (table.header, *table.rows))
    return f"<div><h3>{escape(table.title)}</h3>{pages.table(header, rows)}</div>"


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
            parts.append(f'<div class="place">{escape(places)}</div>')
            sides = {side: pair[side]["text"] for side in ("first", "second")}
            parts.append(_texts(sides))
    return ["<h2>Near-duplicates</h2>", *parts] if parts else []


def _sample(sample: Mapping[str, str]) -> str:
    texts = {k: v for k, v in sample.items() if k not in ("choice", "place")}
    before = {"prompt": texts.pop("prompt")} if len(texts) > 1 else {}
    return (
        f"<h3>{escape(sample['choice'])}</h3>"
        f'<div class="place">{escape(sample["place"])}</div>'
        + (_texts(before) if before else "")
        + _texts(texts)
    )


def _texts(texts: Mapping[str, str]) -> str:
    """Texts beside each other, under their names, as they are."""
    blocks = [
        f'<div class="{name}"><span class="name">{name}</span>'
        # a browser drops the line break that follows <pre>
        f"<pre>\n{escape(text)}</pre></div>"
        for name, text in texts.items()
    ]
    return f'<div class="texts">{"".join(blocks)}</div>'
