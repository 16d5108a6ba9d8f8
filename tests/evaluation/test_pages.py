"""Pages and files: texts cannot break them, and no half of a file is left."""

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import pages


def test_texts_are_escaped():
    assert pages.escape('<a href="x">&amp;') == "&lt;a href=&quot;x&quot;&gt;&amp;amp;"
    assert pages.escape("a\tb\nc é 漢") == "a\tb\nc é 漢"


def test_what_a_browser_must_not_get_has_a_sign():
    assert pages.escape("\x00\x1b[31m\r\x7f") == "␀␛[31m␍␡"
    assert pages.escape("\x85 \ud800 \udfff") == "� � �"


def test_a_frame_and_a_table():
    page = pages.frame("a <b>", ".x { }", ["<p>one</p>"])
    assert page.startswith("<!doctype html>")
    assert "<title>a &lt;b&gt;</title>" in page
    assert ".x { }</style>" in page
    assert "<p>one</p>" in page
    assert pages.table(["h"], [["<i>1</i>"]]) == (
        "<table><tr><th>h</th></tr><tr><td><i>1</i></td></tr></table>"
    )


def test_files_are_written_in_order(tmp_path):
    folder = tmp_path / "new" / "folder"
    written = pages.write_files(folder, {"b.html": "é \ud800", "a.png": b"\x89PNG"})
    assert written == [folder / "b.html", folder / "a.png"]
    assert written[0].read_bytes() == "é ?".encode()
    assert written[1].read_bytes() == b"\x89PNG"
    assert sorted(folder.iterdir()) == sorted(written)  # nothing else is left


def test_an_old_file_stays_whole_until_the_new_one_is(tmp_path, monkeypatch):
    pages.write_files(tmp_path, {"a": "old"})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        pages.write_files(tmp_path, {"a": "new"})
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to the folder .*file"):
        pages.write_files(tmp_path / "file", {"a": ""})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pages.jax, "process_index", lambda: 1)
    assert pages.write_files(tmp_path / "x", {"a": ""}) == [tmp_path / "x" / "a"]
    assert not (tmp_path / "x").exists()
