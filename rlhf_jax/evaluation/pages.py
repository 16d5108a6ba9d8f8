"""HTML pages that need nothing else: their frame, texts as they are, and the files.

A page asks for nothing from elsewhere, reads on a phone, and is light or dark as the
reader's system is.
"""

import html
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax

from rlhf_jax.errors import UserError

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
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: .6rem; margin: .2rem 0; max-height: 24rem; overflow-y: auto; }
"""
# what a browser must not get: control characters, and halves of surrogate pairs
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def frame(title: str, style: str, body: Sequence[str]) -> str:
    """A whole page.

    Args:
      title: a text.
      style: CSS after `STYLE`.
      body: HTML, a line each.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>",
        *body,
        "</body></html>\n",
    ]
    return "\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the cells are HTML."""
    lines = [_row("th", header), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def escape(text: str) -> str:
    """A text as HTML shows it; what has no shape gets the sign for it, or �."""
    return html.escape(UNSHOWN.sub(_sign, text))


def write_files(
    folder: str | os.PathLike, contents: Mapping[str, str | bytes]
) -> list[pathlib.Path]:
    """Writes files, each in one step; on many hosts process 0 alone does.

    Args:
      folder: is made if it is not there; files of the same names are replaced.
      contents: name -> a text, which becomes UTF-8 (half a surrogate pair, which JSON
        can hold, a question mark), or bytes.

    Returns:
      The paths, in the order given.

    Raises:
      UserError: the folder cannot be written to.
    """
    folder = pathlib.Path(folder).expanduser()
    paths = [folder / name for name in contents]
    if jax.process_index():
        return paths
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            if isinstance(content, str):
                content = content.encode("utf-8", errors="replace")
            beside = path.with_name(path.name + ".tmp")
            beside.write_bytes(content)
            os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {folder}: {error.strerror or error}; give "
            "another folder"
        ) from error
    return paths


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _sign(found: re.Match[str]) -> str:
    """␀ to ␟ and ␡ of Unicode's control pictures."""
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "�"
