"""Shows what is in a data set, before anything is trained on it.

    python -m rlhf_jax.explore --data=prompts.jsonl
    python -m rlhf_jax.explore --data=builtin:reviews --tokenizer=gpt2 --max_tokens=256

It prints tables and writes a folder: report.html (one page that holds everything),
report.json and the pictures. Nothing of the data set is changed.
"""

import pathlib
import re
from collections.abc import Sequence

from absl import flags

from rlhf_jax import progress
from rlhf_jax.command_line import run_with_flags
from rlhf_jax.data.dialogues import set_chat_template
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.data_figures import draw_all
from rlhf_jax.evaluation.data_page import write_report
from rlhf_jax.evaluation.data_report import examine
from rlhf_jax.evaluation.data_source import KINDS, open_source
from rlhf_jax.evaluation.data_tables import tables


def explore(
    data: str,
    *,
    out: str = "",
    kind: str = "",
    column: str = "",
    splits: Sequence[str] = (),
    preference: str = "better",
    tokenizer: str = "",
    chat_template: str = "",
    max_tokens: int | None = None,
    samples: int = 3,
    seed: int = 0,
) -> pathlib.Path:
    """Reports on a data set; the flags of the command line say what each argument is.

    Returns:
      The path of the page.

    Raises:
      UserError: whatever is wrong with the source, the tokenizer or the folder.
    """
    if max_tokens is not None and not tokenizer:
        raise UserError("--max_tokens needs --tokenizer, whose tokens are counted")
    folder = pathlib.Path(out or f"runs/explore/{short_name(data)}").expanduser()
    tokens = load_tokenizer(tokenizer) if tokenizer else None
    if chat_template and tokens is None:
        raise UserError("--chat_template needs --tokenizer, to which it is given")
    if chat_template:
        set_chat_template(tokens, chat_template)
    source = open_source(
        data, kind=kind, column=column, splits=splits, preference=preference
    )
    check_writable(folder)
    findings = examine(
        source, tokenizer=tokens, max_tokens=max_tokens, samples=samples, seed=seed
    )
    pictures = draw_all(findings, max_tokens=max_tokens)
    written = write_report(folder, findings.report, pictures)
    console = progress.make_console()
    for table in tables(findings.report):
        progress.show_table(console, *table)
    progress.say(console, "written: " + ", ".join(map(str, written)))
    return written[0]


def short_name(source: str) -> str:
    """A folder's name for a source: the end of its path, without the suffix."""
    name = pathlib.PurePath(source.rstrip("/")).name
    name = re.sub(r"\.(jsonl\.gz|jsonl|json|csv|parquet|txt)$", "", name)
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "data"


def check_writable(folder: pathlib.Path) -> None:
    """Raises a UserError before the work, not after it, if nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "report.json.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {folder}: {error.strerror or error}; give "
            "another one by --out"
        ) from error


def _define_flags() -> None:
    flags.DEFINE_string("data", None, "A file, folder, data set, or builtin:reviews.")
    flags.DEFINE_string("out", "", "Where to; by default runs/explore/<name>.")
    flags.DEFINE_enum("kind", "", ["", *KINDS], "How to read it; told by the columns.")
    flags.DEFINE_string("column", "", "The column of texts, if it has another name.")
    flags.DEFINE_list("splits", "", "Of a data set with splits of its own; all.")
    flags.DEFINE_enum("preference", "better", ["better", "safer"], "Whose choice.")
    flags.DEFINE_string("tokenizer", "", "A directory or hub id; counts tokens.")
    flags.DEFINE_string("chat_template", "", "The path of a Jinja file.")
    flags.DEFINE_integer("max_tokens", None, "The limit, EOS among them.", 1)
    flags.DEFINE_integer("samples", 3, "Rows of each choice shown in full.", 0)
    flags.DEFINE_integer("seed", 0, "Of random samples and of hashes.", 0)
    flags.mark_flag_as_required("data")


def main() -> None:
    """The command line."""
    _define_flags()
    run_with_flags(explore, "data")


if __name__ == "__main__":
    main()
