"""Rows of files: Parquet, JSON Lines, tables and plain text, here or behind a URL.

Parquet is read by pyarrow; lines are split and parsed here, because pyarrow's own readers refuse a
whole file over one bad row. Memory holds a few MiB of a file, or its longest row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from st_embfilter.corpus.columns import column_at, find_column, strings_of
from st_embfilter.corpus.lines import BLANK, BLOCK, records_of, split_lines, table_records
from st_embfilter.errors import CorpusError, EmbedFilterError, MissingPackageError
from st_embfilter.text import first_line

Format = Literal["parquet", "jsonl", "csv", "tsv", "text"]

_FORMATS: Final[dict[str, Format]] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
}
_CODECS: Final = {".gz": "gzip", ".zst": "zstd"}

#: Bytes of a Parquet column that are decoded at a time.
_BATCH: Final = 4 << 20

#: What helps with servers that give files in one piece only.
_CACHE: Final = "put simplecache:: before the URL to download it first"

#: Rows between the marks of an index.
MARKS: Final = 4096


@dataclass(frozen=True)
class Input:
    """A file of texts.

    Attributes:
        url: Absolute path, or URL.
        size: In bytes, as stored.
        format: By its suffix.
        codec: "gzip", "zstd" or None.
    """

    url: str
    size: int
    format: Format
    codec: str | None = None


@dataclass(frozen=True)
class Position:
    """A place between two rows.

    Attributes:
        number: Rows before it, over all inputs.
        file: Index of the input.
        row: Rows before it in that input; lines, or records of a table without its header.
        byte: Where that row begins, in an uncompressed file of lines; else 0.
    """

    number: int = 0
    file: int = 0
    row: int = 0
    byte: int = 0


class Row(NamedTuple):
    """One row.

    Attributes:
        number: Rows before it, over all inputs.
        file: Index of its input.
        place: Rows before it in that input.
        id: The input's own id; the row number if it gives none.
        text: None for a bad row, and for a blank line between records.
        reason: Why it is bad.
    """

    number: int
    file: int
    place: int
    id: str | int | None
    text: str | None
    reason: str = ""


def find_inputs(patterns: Sequence[str | os.PathLike[str]]) -> list[Input]:
    """The files behind paths, folders, globs and fsspec URLs, in the order given.

    The files of a folder or glob come in the order of their names; those that begin with `_` or `.`
    are left out of a folder.

    Raises:
        CorpusError: If a pattern matches nothing, or a file's suffix says nothing.
    """
    import fsspec

    found: list[Input] = []
    for pattern in [os.fspath(item) for item in patterns]:
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
            paths = _paths(fs, path, _web(pattern))
            sizes = [_size(fs, p) for p in paths]
        except ImportError as error:
            what = "pip install aiohttp" if "aiohttp" in str(error) else str(error)
            raise MissingPackageError(f"{pattern} needs another package: {what}") from error
        except EmbedFilterError:
            raise
        except Exception as error:  # whatever a file system raises
            reason = first_line(error.__cause__ or error)  # a server's answer lies behind fsspec's
            raise CorpusError(f"inputs must be readable, got {pattern}: {reason}") from error
        if not paths:
            raise CorpusError(f"inputs must exist, got {pattern}, which matches no file")
        local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
        for path, size in zip(paths, sizes, strict=True):
            found.append(_input(path if local else _url(pattern, fs, path), size))
    return found


def _paths(fs: Any, path: str, web: bool) -> list[str]:
    """The files that a path names, matches or contains.

    Args:
        fs: Of fsspec.
        path: In it.
        web: Whether a server of web pages answers: its folders are pages of links and end in a
            slash, and in a URL a question mark is none of a pattern.
    """
    if any(c in path for c in ("*" if web else "*?[")):
        return sorted(p for p in fs.glob(path) if not (p.endswith("/") if web else fs.isdir(p)))
    if path.endswith("/") if web else fs.isdir(path):
        hidden = "_.?" if web else "_."  # "?C=N;O=D" sorts the page
        inside = ((p, p[len(path) :].strip("/").split("/")) for p in fs.find(path))
        return sorted(p for p, parts in inside if not any(x[:1] in hidden for x in parts))
    return [path] if web or fs.exists(path) else []


def _size(fs: Any, path: str) -> int:
    """Bytes of a file, as stored."""
    size = fs.size(path)
    if size is not None:
        return int(size)
    with fs.open(path, "rb") as file:  # a copy in a cache can be measured
        try:
            return int(file.seek(0, os.SEEK_END))
        except ValueError as error:
            raise CorpusError(
                f"a server must tell how long a file is, got no length of {path}; {_CACHE}"
            ) from error


def _named(url: str) -> str:
    """Of a chain, the first link that names a file: of "zip://a.jsonl::s3://bucket/all.zip"."""
    return next((link for link in url.split("::") if "://" in link), url)


def _web(url: str) -> bool:
    return _named(url).startswith(("http://", "https://"))


def _url(pattern: str, fs: Any, path: str) -> str:
    """The URL of a path that a pattern matched: with its cache, or the archive that it lies in."""
    link, chained, rest = pattern.partition("::")
    scheme, named, _ = link.partition("://")
    if chained and not named:
        return f"{link}::{_url(rest, fs, path)}"
    return f"{scheme}://{path.lstrip('/')}::{rest}" if chained else str(fs.unstrip_protocol(path))


def _input(url: str, size: int) -> Input:
    name = urlsplit(_named(url)).path if _web(url) else _named(url)
    stem, suffix = os.path.splitext(name)
    codec = _CODECS.get(suffix.lower())
    if codec is not None:
        suffix = os.path.splitext(stem)[1]
    kind = _FORMATS.get(suffix.lower())
    if kind is None:
        raise CorpusError(
            f"an input must end in {', '.join(_FORMATS)} (lines also in .gz or .zst), got {url}"
        )
    return Input(url, size, kind, codec)


class Rows:
    """The rows of several inputs, one after another, bad ones and blank lines too.

    Args:
        inputs: What `find_inputs` found.
        text: Name of the column that holds the texts; dots lead into nested ones.
        id: Name of the column that identifies rows, None for their numbers.
        start: Where to begin.

    Attributes:
        number: Rows before the next, over all inputs.
        position: Behind the last row given.
        consumed: Bytes of the inputs that were read, as stored.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        *,
        text: str = "text",
        id: str | None = None,  # noqa: A002
        start: Position = Position(),
    ) -> None:
        self._inputs, self._text, self._id = inputs, text, id
        self.number, self._file = start.number, start.file
        self._place, self._byte = start.row, start.byte
        self.consumed = sum(item.size for item in inputs[: start.file])

    @property
    def position(self) -> Position:
        """Behind the last row given."""
        return Position(self.number, self._file, self._place, self._byte)

    def __iter__(self) -> Iterator[Row]:
        while self._file < len(self._inputs):
            file = self._inputs[self._file]
            before = self.consumed
            with _reading(file):
                yield from (self._parquet if file.format == "parquet" else self._lines)(file)
            self.consumed = before + file.size
            self._file, self._place, self._byte = self._file + 1, 0, 0

    def _row(self, value: object, key: object, reason: str = "") -> Row:
        """Checks what a row holds; moves on by one."""
        number, file, place = self.number, self._file, self._place
        self.number, self._place = number + 1, place + 1
        if reason == BLANK:
            return Row(number, file, place, None, None)
        if not reason:
            if not isinstance(value, str):
                reason = "null" if value is None else f"not a string but {type(value).__name__}"
            elif not value.isascii() and not _encodes(value):
                reason = "broken UTF-8"
        if self._id is None:
            key = number
        elif not reason and (not isinstance(key, str | int) or isinstance(key, bool)):
            reason = f"an id must be a string or an integer, got {type(key).__name__}"
        elif not reason and isinstance(key, str) and not key.isascii() and not _encodes(key):
            reason = "broken UTF-8 in the id"
        if reason or not isinstance(value, str) or not isinstance(key, str | int):
            return Row(number, file, place, None, None, reason)
        return Row(number, file, place, key, value)

    def _parquet(self, file: Input) -> Iterator[Row]:
        import pyarrow.parquet as pq

        with open_input(file) as stream, pq.ParquetFile(stream, buffer_size=BLOCK) as table:
            wanted = [self._text] if self._id is None else [self._text, self._id]
            columns = [find_column(table.schema_arrow, name, file.url) for name in wanted]
            before, first = self.consumed, 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group)
                skip = self._place - first
                first += size.num_rows
                if skip >= size.num_rows:
                    continue
                widest = sum(
                    size.column(i).total_uncompressed_size
                    for i in range(size.num_columns)
                    if size.column(i).path_in_schema.split(".")[0]
                    in {path.split(".")[0] for path in wanted}
                )
                rows = max(1, min(4096, _BATCH * size.num_rows // max(widest, 1)))
                batches = table.iter_batches(
                    rows, row_groups=[group], columns=wanted, use_threads=False
                )
                for batch in batches:
                    if skip >= batch.num_rows:
                        skip -= batch.num_rows
                        continue
                    values = [strings_of(column_at(batch, path)[skip:]) for path in columns]
                    for pair in zip(*values, strict=True):
                        key = pair[-1]
                        reason = "broken UTF-8" if isinstance(pair[0], bytes) else ""
                        if isinstance(key, bytes):
                            reason = "broken UTF-8 in the id"
                        yield self._row(pair[0], key, reason)
                    skip = 0
                    done = self._place / max(table.metadata.num_rows, 1)
                    self.consumed = before + int(file.size * done)

    def _lines(self, file: Input) -> Iterator[Row]:
        seekable = file.codec is None and file.format in ("jsonl", "text")
        before = self.consumed
        with open_input(file) as raw, _decompressed(raw, file.codec) as stream:
            byte = self._byte if seekable else 0
            if byte:
                stream.seek(byte)
            skip = 0 if byte else self._place
            records = records_of(
                file.url, file.format, split_lines(stream), byte == 0, self._text, self._id
            )
            for count, (value, key, reason, length) in enumerate(records):
                byte += length
                if count < skip:
                    continue
                row = self._row(value, key, reason)
                if seekable:
                    self._byte = byte
                if count % 1024 == 0:
                    self.consumed = before + raw.tell()
                yield row


def index_rows(file: Input, text: str, id: str | None) -> tuple[int, list[int]]:  # noqa: A002
    """Counts the rows of a file.

    Args:
        file: The file.
        text: Name of the column of texts.
        id: Name of the column of ids.

    Returns:
        Their number and, for an uncompressed file of lines, the byte where every `MARKS`-th begins.
    """
    if file.format == "parquet":
        import pyarrow.parquet as pq

        with _reading(file), open_input(file) as stream:
            return int(pq.read_metadata(stream).num_rows), []
    marks: list[int] = []
    count = byte = 0
    with _reading(file), open_input(file) as raw, _decompressed(raw, file.codec) as stream:
        lines = split_lines(stream)
        if file.format in ("csv", "tsv"):
            return sum(1 for _ in table_records(file.url, file.format, lines, text, id)), []
        for line in lines:
            if count % MARKS == 0 and file.codec is None:
                marks.append(byte)
            count, byte = count + 1, byte + len(line)
    return count, marks


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


@contextmanager
def _reading(file: Input) -> Iterator[None]:
    """Turns what can go wrong while a file is read into one error."""
    try:
        yield
    except EmbedFilterError:
        raise
    except Exception as error:  # whatever a parser or a file system raises
        advice = f"; {_CACHE}" if _web(file.url) and "cache::" not in file.url else ""
        raise CorpusError(
            f"{file.url} can no longer be read: {first_line(error)}{advice}"
        ) from error


@contextmanager
def open_input(file: Input) -> Iterator[IO[bytes]]:
    """The bytes of a file as stored."""
    import fsspec

    with fsspec.open(file.url, "rb", compression=None) as stream:
        yield stream


@contextmanager
def _decompressed(stream: IO[bytes], codec: str | None) -> Iterator[Any]:
    if codec is None:
        yield stream
        return
    import pyarrow as pa

    with pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec) as inner:
        yield inner


def id_type(inputs: Sequence[Input], id: str | None) -> Literal["int64", "string"]:  # noqa: A002
    """What ids are stored as: row numbers, and integers of Parquet files alone, as integers."""
    if id is None:
        return "int64"
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in inputs:
        if file.format != "parquet":
            return "string"
        with _reading(file), open_input(file) as stream:
            schema = pq.read_schema(stream)
            kind: Any = schema
            for name in find_column(schema, id, file.url):
                kind = kind.field(name).type
        if not pa.types.is_integer(kind) or pa.types.is_uint64(kind):
            return "string"
    return "int64"
