"""Files of lines: plain text, JSON Lines, tables."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO, Final

from st_embfilter.errors import CorpusError
from st_embfilter.text import read_json

#: Bytes that are read at a time.
BLOCK: Final = 1 << 20

#: Longest field of a table in bytes. A quote that is never closed would swallow the file.
_LONGEST_FIELD: Final = 1 << 26

#: What is said of a line between records that is none.
BLANK: Final = "blank"


def records_of(
    url: str, kind: str, lines: Iterator[bytes], whole: bool, text: str, id_: str | None
) -> Iterator[tuple[object, object, str, int]]:
    """Text, id, why it is bad, and length in bytes, of each row of a file of lines."""
    if kind in ("csv", "tsv"):
        yield from table_records(url, kind, lines, text, id_)
        return
    for i, line in enumerate(lines):
        content = line.removeprefix(b"\xef\xbb\xbf") if whole and i == 0 else line
        try:
            if kind == "text":
                yield content.rstrip(b"\r\n").decode(), None, "", len(line)
                continue
            if not content.strip():
                yield None, None, BLANK, len(line)  # a line, and no row
                continue
            record = read_json(content.decode(), "row", CorpusError)
        except UnicodeDecodeError:
            yield None, None, "broken UTF-8", len(line)
        except CorpusError:
            yield None, None, "no JSON", len(line)
        else:
            key = None if id_ is None else _nested(record, id_)
            yield _nested(record, text), key, "", len(line)


def table_records(
    url: str, kind: str, lines: Iterator[bytes], text: str, id_: str | None
) -> Iterator[tuple[object, object, str, int]]:
    """The same of a table; its header is no row.

    Raises:
        CorpusError: If a column is missing, or a quote is never closed.
    """
    decoded = (line.decode("utf-8", "surrogateescape") for line in lines)
    csv.field_size_limit(_LONGEST_FIELD)
    if kind == "tsv":
        reader = csv.reader(decoded, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(decoded)
    header = [name.removeprefix("\ufeff") for name in next(reader, [])]
    wanted = [text] if id_ is None else [text, id_]
    for name in wanted:
        if name not in header:
            raise CorpusError(f"{url} must have the column {name!r}, got {', '.join(header)[:200]}")
        if header.count(name) > 1:
            raise CorpusError(f"{url} must have every column once, got {name!r} twice; rename one")
    places = [header.index(name) for name in wanted]
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise CorpusError(
                f"{url}, line {reader.line_num}: {error}; is a quote never closed?"
            ) from error
        if len(fields) != len(header):
            if fields:
                yield None, None, f"{len(fields)} fields, the header has {len(header)}", 0
            else:
                yield None, None, BLANK, 0
        else:
            yield fields[places[0]], fields[places[-1]], "", 0


def split_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines with their ends, whatever their length."""
    parts: list[bytes] = []
    while block := stream.read(BLOCK):
        start = 0
        while (end := block.find(b"\n", start) + 1) > 0:
            yield b"".join([*parts, block[start:end]]) if parts else block[start:end]
            parts, start = [], end
        if start < len(block):
            parts.append(block[start:])
    if parts:
        yield b"".join(parts)


def _nested(record: object, path: str) -> object:
    """A value by its name, or by names with dots between; None if there is none."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for name in path.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record
