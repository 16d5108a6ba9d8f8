"""The command line: the folder that it writes, and mistakes in one sentence."""

import html.parser
import json
import os
import subprocess
import sys

import pytest

from rlhf_jax import explore
from rlhf_jax.errors import UserError

PAIRS = [
    {
        "chosen": f"\n\nHuman: <b>{i}</b> & why?\n\nAssistant: since {'so ' * i}",
        "rejected": f"\n\nHuman: <b>{i}</b> & why?\n\nAssistant: <script>no</script>",
        "label": "even" if i % 2 else "odd",
    }
    for i in range(1, 30)
]


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), "utf-8")
    return str(path)


def test_the_folder(data, tmp_path, capsys):
    out = tmp_path / "out"
    page = explore.explore(data, out=str(out))
    assert page == out / "report.html"
    assert sorted(path.name for path in out.iterdir()) == [
        *("labels.png", "length_bias.png", "lengths.png"),
        *("report.html", "report.json", "turns.png"),
    ]
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["kind"] == "preferences"
    assert report["turns"]["rows_by_turns"] == {"2": 29}
    printed = capsys.readouterr().out
    assert "Length and choice" in printed
    assert "report.html" in printed


def test_the_page_needs_no_other_file_and_shows_texts_as_they_are(data, tmp_path):
    written = explore.explore(data, out=str(tmp_path / "out"))
    page = Page()
    page.feed(written.read_text("utf-8"))
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "b", "link"} & set(page.tags)
    assert "<b>1</b> & why?" in page.text
    assert "<script>no</script>" in page.text


def test_mistakes(data, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="no tokenizer at"):
        explore.explore(data, out=out, tokenizer="./nowhere")
    with pytest.raises(UserError, match="needs --tokenizer"):
        explore.explore(data, out=out, max_tokens=9)
    with pytest.raises(UserError, match="there is no file"):
        explore.explore("nothing.jsonl", out=out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to the folder .*--out"):
        explore.explore(data, out=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("builtin:reviews", "builtin_reviews"),
        ("/a/b/x.jsonl.gz", "x"),
        ("hf:owner/name", "name"),
        ("..", "data"),
    ],
)
def test_the_name_of_the_folder(source, name):
    assert explore.short_name(source) == name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data=absent.jsonl"], "there is no file absent.jsonl"),
        (["--dta=x"], "Unknown command line flag 'dta'"),
        (["--data=x.txt", "more"], "unknown argument 'more'"),
    ],
)
def test_the_command_line_says_one_sentence(tmp_path, flags, said):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.explore", *flags],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
