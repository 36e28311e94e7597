"""Rows of files: every format, nested columns, bad rows, and places to go on from."""

import csv
import gzip
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_embfilter.corpus.inputs import (
    MARKS,
    Input,
    Position,
    Rows,
    find_inputs,
    id_type,
    index_rows,
)
from st_embfilter.errors import CorpusError

TEXTS = ["one", "", "três, with a comma", 'a "quote"', "  spaces ", "日本語", "last"]


def write(folder: Path, name: str, texts: list[str] = TEXTS) -> Path:
    """A file of texts, with ids k0, k1, ... where the format has columns."""
    path = folder / name
    rows = [{"id": f"k{i}", "deep": {"er": text}, "text": text} for i, text in enumerate(texts)]
    kind = name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        return path
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    elif kind == "csv":
        quoted = [text.replace('"', '""') for text in texts]
        lines = ["id,text", *(f'k{i},"{text}"' for i, text in enumerate(quoted))]
    elif kind == "tsv":
        lines = ["id\ttext", *(f"k{i}\t{text}" for i, text in enumerate(texts))]
    else:
        lines = texts
    content = "".join(f"{line}\n" for line in lines).encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


FORMATS = ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.csv.gz", "a.tsv"]


def rows(path: Path, **options: object) -> Rows:
    return Rows(find_inputs([path]), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*FORMATS, "a.txt", "a.txt.zst"])
def test_every_format_gives_the_texts_in_order(tmp_path: Path, name: str) -> None:
    found = list(rows(write(tmp_path, name)))
    assert [row.text for row in found] == TEXTS
    assert [row.id for row in found] == [row.number for row in found] == list(range(len(TEXTS)))


@pytest.mark.parametrize("name", FORMATS)
def test_ids_by_name(tmp_path: Path, name: str) -> None:
    found = rows(write(tmp_path, name), id="id")
    assert [row.id for row in found] == [f"k{i}" for i in range(len(TEXTS))]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_dots_lead_into_columns(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    assert [row.text for row in rows(path, text="deep.er", id="deep.er")] == TEXTS
    with pytest.raises(CorpusError, match=r"must have the column 'deep\.none', got id, deep, text"):
        list(rows(write(tmp_path, "a.parquet"), text="deep.none"))


@pytest.mark.parametrize("name", [*FORMATS, "a.txt"])
def test_reading_goes_on_from_every_position(tmp_path: Path, name: str) -> None:
    first = write(tmp_path, name)
    inputs = find_inputs([first, first])
    reader = Rows(inputs)
    whole = [(row, reader.position) for row in reader]
    assert len(whole) == 2 * len(TEXTS)
    for i, (_, position) in enumerate(whole):
        assert list(Rows(inputs, start=position)) == [row for row, _ in whole[i + 1 :]]


def test_bad_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"id": 7, "text": "good"}\n\n{"id": 8, "text": null}\n{"id": 9, "text": 3}\n'
        b'not json\n{"id": 1, "text": "\xff"}\n{"id": 1, "text": "\\ud800"}\n'
        b'{"id": null, "text": "x"}\n{"id": true, "text": "x"}\n[]\n{"id": "b", "text": "end"}'
    )
    found = list(rows(path, id="id"))
    assert [(row.number, row.reason) for row in found if row.text is None] == [
        (1, ""),
        (2, "null"),
        (3, "not a string but int"),
        (4, "no JSON"),
        (5, "broken UTF-8"),
        (6, "no JSON"),
        (7, "an id must be a string or an integer, got NoneType"),
        (8, "an id must be a string or an integer, got bool"),
        (9, "no JSON"),
    ]
    assert [(row.id, row.text) for row in found if row.text is not None] == [
        (7, "good"),
        ("b", "end"),
    ]


def test_bad_rows_of_tables_and_parquet(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes(b'text,id\n"two\nlines",1\n\xff,2\nlonely\n\nend,4\n')
    broken_id = tmp_path / "b.csv"
    broken_id.write_bytes(b"text,id\nfirst,\xff\nend,4\n")
    assert [(row.id, row.reason) for row in rows(broken_id, id="id")] == [
        (None, "broken UTF-8 in the id"),
        ("4", ""),
    ]
    assert [(row.text, row.reason) for row in rows(table)] == [
        ("two\nlines", ""),
        (None, "broken UTF-8"),
        (None, "1 fields, the header has 2"),
        (None, ""),
        ("end", ""),
    ]
    broken = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")],
    )
    pq.write_table(pa.table({"text": broken, "n": [1, 2, None]}), tmp_path / "a.parquet")
    found = list(rows(tmp_path / "a.parquet", id="n"))
    assert [row.text for row in found] == ["a", None, None]
    assert found[1].reason == "broken UTF-8"
    nested = pa.array([None, {"text": "b"}], pa.struct({"text": pa.string()}))
    pq.write_table(pa.table({"deep": nested}), tmp_path / "b.parquet")
    assert [row.text for row in rows(tmp_path / "b.parquet", text="deep.text")] == [None, "b"]


def test_a_quote_that_never_closes_does_not_eat_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("st_embfilter.corpus.lines._LONGEST_FIELD", 1000)
    path = tmp_path / "a.csv"
    path.write_text('text\n"never closed\n' + "more\n" * 1000)
    before = csv.field_size_limit()
    with pytest.raises(CorpusError, match="is a quote never closed"):
        list(rows(path))
    csv.field_size_limit(before)


def test_files_folders_globs_and_urls(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    (inside / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt", "_manifest.json", ".hidden.txt"):
        (inside / name).write_text(f"{name}\n")

    def names(*patterns: object) -> list[str]:
        return [Path(item.url).name for item in find_inputs([str(p) for p in patterns])]

    assert names(inside) == ["a.txt", "b.txt", "c.txt"]
    assert names(inside / "[ab].txt") == ["a.txt", "b.txt"]
    assert names(inside / "**" / "c.txt") == ["c.txt"]
    assert names(inside / "b.txt", inside / "a.txt") == ["b.txt", "a.txt"]
    assert names(f"file://{inside}/a.txt") == ["a.txt"]
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/x.txt", b"from memory\n")
    assert [row.text for row in Rows(find_inputs(["memory://corpus/*.txt"]))] == ["from memory"]
    with pytest.raises(CorpusError, match="which matches no file"):
        names(inside / "nothing*")
    (inside / "a.docx").write_text("")
    with pytest.raises(CorpusError, match="an input must end in"):
        names(inside / "a.docx")


def test_files_in_archives_and_behind_caches(tmp_path: Path) -> None:
    import fsspec

    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/a.txt", "first\n")
        archive.writestr("in/b.jsonl", '{"text": "second"}\n')
    memory = fsspec.filesystem("memory")
    memory.pipe("/archives/all.zip", (tmp_path / "all.zip").read_bytes())
    for pattern in (
        f"zip://in/*::{tmp_path}/all.zip",
        f"zip://in::file://{tmp_path}/all.zip",
        "zip://in/*::memory://archives/all.zip",
        "zip://in/*::simplecache::memory://archives/all.zip",
    ):
        inputs = find_inputs([pattern])
        assert [row.text for row in Rows(inputs)] == ["first", "second"]
        again = find_inputs([file.url for file in inputs])
        assert again == inputs
    memory.pipe("/corpus/c.txt", b"third\n")
    assert [r.text for r in Rows(find_inputs(["simplecache::memory://corpus/c*"]))] == ["third"]


def test_type_of_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "s": ["a"]}), tmp_path / "a.parquet")
    inputs = find_inputs([tmp_path / "a.parquet"])
    assert id_type(inputs, None) == id_type(inputs, "n") == "int64"
    assert id_type(inputs, "s") == "string"
    assert id_type([*inputs, *find_inputs([write(tmp_path, "a.jsonl")])], "n") == "string"


@pytest.mark.parametrize("name", [*FORMATS, "a.txt"])
def test_an_index_counts_what_reading_gives(tmp_path: Path, name: str) -> None:
    texts = [f"text {i}" for i in range(2 * MARKS + 5)]
    (file,) = find_inputs([write(tmp_path, name, texts)])
    count, marks = index_rows(file, "text", None)
    assert count == len(texts)
    for i, byte in enumerate(marks):
        start = Position(i * MARKS, 0, i * MARKS, byte)
        row = next(iter(Rows([file], start=start)))
        assert (row.number, row.text) == (i * MARKS, texts[i * MARKS])
    assert bool(marks) == (name in ("a.jsonl", "a.txt"))


def test_long_lines_cross_blocks(tmp_path: Path) -> None:
    texts = ["x" * (3 << 20), "short", "y" * (1 << 20)]
    assert [row.text for row in rows(write(tmp_path, "a.txt", texts))] == texts


@pytest.fixture
def truncated(tmp_path: Path) -> Input:
    path = write(tmp_path, "a.jsonl.gz", [f"{i} " * 50 for i in range(9999)])
    path.write_bytes(path.read_bytes()[:-2000])
    return find_inputs([path])[0]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_an_input_whose_middle_is_damaged(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [f"{i} {i * i}" for i in range(999)])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    with pytest.raises(CorpusError, match="can no longer be read"):
        list(rows(path))


@pytest.mark.parametrize("column", ["text", "id"])
def test_a_column_that_is_named_twice(tmp_path: Path, column: str) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "id", column])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(f"text,id,{column}\na,b,c\n")
    told = f"every column once, got '{column}' twice"
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(CorpusError, match=told):
            list(rows(tmp_path / name, id="id"))
    with pytest.raises(CorpusError, match=told):
        id_type(find_inputs([tmp_path / "a.parquet"]), column)


def test_an_input_that_breaks_off_or_vanishes(tmp_path: Path, truncated: Input) -> None:
    with pytest.raises(CorpusError, match="can no longer be read"):
        list(Rows([truncated]))
    Path(truncated.url).unlink()
    with pytest.raises(CorpusError, match="can no longer be read"):
        list(Rows([truncated]))
