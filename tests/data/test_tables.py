"""Tables from every kind of source, and what is said of bad ones."""

import functools
import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from rlhf_jax.data.tables import (
    hub_splits,
    is_file,
    is_heldout,
    load_table,
    read_texts,
)
from rlhf_jax.errors import UserError

ROWS = [{"text": "one", "label": 1}, {"text": "two", "label": 0}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
# A fixed time: the bytes name the tests below, and every worker must find the same.
GZIPPED = gzip.compress(b'"x"\n' * 99, mtime=0)


def write_rows(path):
    if path.name.endswith(".jsonl"):
        path.write_text(LINES)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".csv":
        path.write_text("text,label\none,1\ntwo,0\n")
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_files_of_every_kind(tmp_path, suffix):
    source = write_rows(tmp_path / f"rows.{suffix}")
    table = load_table(source)
    assert (table.source, table.columns, table.rows) == (source, ("text", "label"), 2)
    assert read_texts(table, "text") == ["one", "two"]
    assert [int(label) for label in table.read("label")] == [1, 0]
    assert table.place(1).startswith(source)


def test_bare_strings_are_the_column_text(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('"one"\n\n"two"\n')
    table = load_table(str(lines))
    assert read_texts(table, "text") == ["one", "two"]
    assert table.place(1) == f"{lines} line 3"  # the blank line counts
    whole = tmp_path / "a.json"
    whole.write_text('["one", {"text": "two"}]')
    assert read_texts(load_table(str(whole)), "text") == ["one", "two"]
    plain = tmp_path / "a.txt"
    plain.write_bytes("\ufeffone \r\n\r\n two".encode())
    assert read_texts(load_table(str(plain)), "text") == ["one ", " two"]


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefftext,x\n"two\nlines, and a comma",1\nlast,2\n'.encode())
    table = load_table(str(path))
    assert read_texts(table, "text") == ["two\nlines, and a comma", "last"]
    assert table.place(1) == f"{path} line 4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not valid JSON: "),
        ("a.jsonl", '"x"\n\n[1]\n', "a.jsonl line 3 should be a JSON object or string"),
        ("a.jsonl", "\n \n", "a.jsonl is empty: no rows in it"),
        ("a.json", '[\n"x",\n]', "a.json line 3 is not valid JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}', "Extra data; one object a line is .jsonl"),
        ("a.json", '{"a": 1}', "should hold a JSON list, not an object"),
        ("a.json", '["x", null]', "item 2 should be a JSON object .* not null"),
        ("a.json", "[]", "a.json is empty"),
        ("a.csv", "text,label\n", "a.csv is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.txt", "", "a.txt is empty"),
        (
            "a.txt",
            b"\xff\xfe\x00",
            "a.txt line 1 is not text in UTF-8, .*byte 0xff: sa",
        ),
        ("a.jsonl", b'"x"\n"\x89PNG"', "a.jsonl line 2 is not text in UTF-8, .*0x89"),
        (
            "a.csv",
            "\ufefftext\n".encode() + b"ol\xe9",
            "a.csv line 2 is not text in UTF",
        ),
        (
            "a.csv",
            "p,c,r\nWhy?,So, then.,No.",
            "line 2 has 4 cells for 3 names in .*: put",
        ),
        ("a.csv", "p,c,p\n1,2,3", "a.csv line 1 calls several columns 'p': give each"),
        ("a.jsonl.gz", "not gzip", "cannot read .*gz: "),
        ("a.jsonl.gz", GZIPPED[:-9], "cannot read .*gz: "),
        ("a.jsonl.gz", GZIPPED[:10] + b"\xff" * 9, "cannot read .*gz: "),
        ("a.parquet", "not parquet", "a.parquet is not a readable Parquet file"),
        ("a.xlsx", "x", r"cannot read .*a.xlsx: expected .* ends with one of \.jsonl"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_table(str(path))
    assert "\n" not in str(caught.value)


def test_an_empty_parquet_file(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    with pytest.raises(UserError, match=r"a\.parquet is empty"):
        load_table(str(path))


def test_missing_and_unknown_sources(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*absent\.jsonl"):
        load_table(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=r"there is no file .*folder\.json"):
        (tmp_path / "folder.json").mkdir()
        load_table(str(tmp_path / "folder.json"))
    for read in (load_table, hub_splits):
        with pytest.raises(UserError, match="expected a folder or a file that ends wi"):
            read(str(tmp_path / "absent"))
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(UserError, match="is a file and has no split 'train'"):
        load_table(str(path), split="train")


def test_missing_columns_and_values(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "n": 1}\n{"n": 2}\n{"text": null, "n": 3}\n')
    table = load_table(str(path))
    with pytest.raises(UserError, match="has no column 'body': it has 'text', 'n'"):
        read_texts(table, "body")
    with pytest.raises(UserError, match="line 2 has no 'text': it has 'n'"):
        read_texts(table, "text")
    with pytest.raises(UserError, match="line 1: 'n' should be a string, not int"):
        read_texts(table, "n")
    path.write_text("text,label\nx,1\n".replace("x,1", ",1\nonly"))
    csv = path.rename(tmp_path / "a.csv")
    with pytest.raises(UserError, match="line 3: 'label' should be a string, not None"):
        read_texts(load_table(str(csv)), "label")


def test_is_file():
    assert is_file("a/b.jsonl.gz") and is_file("x.csv")
    assert not any(map(is_file, ["a/b", "hf:a/b.json", "tfds:x.txt", "a.gz"]))


def test_one_in_ten_is_held_out():
    held = [is_heldout(f"prompt {i}") for i in range(5000)]
    assert 0.08 < np.mean(held) < 0.12


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_of_files(tmp_path, hub_cache, prefix):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text('{"text": "held", "label": 1}\n')
    source = prefix + str(folder)
    table = load_table(source)
    assert (table.columns, table.rows) == (("text", "label"), 2)
    assert read_texts(table, "text") == ["one", "two"]
    assert table.read("label") == [1, 0]
    assert read_texts(load_table(source, split="test"), "text") == ["held"]
    assert load_table(source, split="train[:1]").rows == 1
    assert hub_splits(source) == ("train", "test")
    with pytest.raises(UserError, match=r"no data set for .* split 'dev'"):
        load_table(source, split="dev")
    with pytest.raises(UserError, match="has no column 'prompt'"):
        read_texts(table, "prompt")


def test_an_empty_folder(tmp_path, hub_cache):
    for read in (load_table, hub_splits):
        with pytest.raises(UserError, match="no data set for"):
            read(str(tmp_path))


def test_a_hub_that_cannot_be_reached(hub_cache, monkeypatch):
    monkeypatch.setattr(hub_cache.config, "HF_HUB_OFFLINE", True)
    for source in ("hf:nobody/no-such-data", "nobody/no-such-data", "hf:n/o:config"):
        for read in (load_table, hub_splits):
            with pytest.raises(UserError, match="check the spelling, or the") as caught:
                read(source)
            assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_name_configuration_and_split(hub_cache, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs))
        return hub_cache.Dataset.from_list(ROWS)

    monkeypatch.setattr(hub_cache, "load_dataset", load_dataset)
    assert read_texts(load_table("hf:a/b:c", split="test"), "text") == ["one", "two"]
    assert load_table("a/b").place(1) == "a/b train row 1"
    assert asked == [("a/b", "c", {"split": "test"}), ("a/b", None, {"split": "train"})]


def test_tfds_rows_become_python_values(monkeypatch):
    import tensorflow_datasets as tfds

    rows = [{"text": "olé".encode(), "label": np.int64(1)}, {"text": b"b", "label": 0}]
    asked = []

    def data_source(name, *, split):
        asked.append((name, split))
        return rows if split == "train" else []

    monkeypatch.setattr(tfds, "data_source", data_source)
    table = load_table("tfds:imdb_reviews")
    assert (table.columns, table.rows) == (("text", "label"), 2)
    assert read_texts(table, "text") == ["olé", "b"]
    assert table.read("label") == [1, 0] and type(table.read("label")[0]) is int
    with pytest.raises(UserError, match="has no rows in its split 'test'"):
        load_table("tfds:imdb_reviews", split="test")
    assert asked == [("imdb_reviews", "train"), ("imdb_reviews", "test")]


def test_tfds_errors(monkeypatch):
    import tensorflow_datasets as tfds

    with pytest.raises(UserError, match="has no 'no_such_thing': see its catalog"):
        load_table("tfds:no_such_thing")

    def data_source(name, *, split):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(tfds, "data_source", data_source)
    for read in (load_table, hub_splits):
        with pytest.raises(
            UserError, match=r"cannot be read: no route \(check the spl"
        ):
            read("tfds:imdb_reviews")


def test_tfds_reads_archives_without_tensorflow(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import extractor

    path = tmp_path / "reviews.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("train/0.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"good"))

    def data_source(name, *, split):  # as the builder of IMDb does
        return [{"text": file.read()} for _, file in extractor.iter_tar(path)]

    before = extractor._open_or_pass
    monkeypatch.setattr(tfds, "data_source", data_source)
    table = load_table("tfds:imdb_reviews")
    assert read_texts(table, "text") == ["good"]
    assert extractor._open_or_pass is before


def test_tfds_from_prepared_files_without_tensorflow(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class TinyReviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tfds.core.Path(tmp_path)

        def _info(self):
            label = tfds.features.ClassLabel(num_classes=2)
            features = {"text": tfds.features.Text(), "label": label}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"text": "olé", "label": 1}
            yield 1, {"text": "two", "label": 0}

    tfds.disable_progress_bar()
    TinyReviews(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    here = functools.partial(tfds.data_source, data_dir=tmp_path)
    monkeypatch.setattr(tfds, "data_source", here)
    table = load_table("tfds:tiny_reviews")
    found = dict(zip(read_texts(table, "text"), table.read("label")))
    assert found == {"olé": 1, "two": 0}
    assert hub_splits("tfds:tiny_reviews") == ("train",)
    with pytest.raises(UserError, match="split 'test', cannot be read"):
        load_table("tfds:tiny_reviews", split="test")
