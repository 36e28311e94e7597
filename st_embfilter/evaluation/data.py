"""Files of evaluation data: read, checked, errors with file and line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from st_embfilter.errors import DataError
from st_embfilter.text import read_json, reading

TEXT_COLUMNS: Final = ("text",)
LABEL_COLUMNS: Final = ("label", "category")
PAIR_COLUMNS: Final = ("sentence1", "sentence2", "score")

#: Relevance of a document to a query.
_GAIN: Final = re.compile("[+-]?[0-9]{1,9}")

_T = TypeVar("_T")


def read_pairs(file: str | os.PathLike[str]) -> list[tuple[str, str, float]]:
    """Pairs of texts with a similarity score.

    Args:
        file: CSV or TSV (by its name; .gz too), three columns, with the header `sentence1`,
            `sentence2`, `score` or with none. TSV has no quoting.

    Raises:
        DataError: Names the file and the line.
    """
    path = Path(file)
    rows = list(_rows(path))
    header = _header(rows, PAIR_COLUMNS)
    if header is None:
        _check(
            path,
            rows[0][0],
            len(rows[0][1]) == 3 and _is_number(rows[0][1][2]),
            f"needs the columns {', '.join(PAIR_COLUMNS)}, or three columns without a header, the "
            f"third a number, got {_shown(rows[0][1])}",
        )
    columns = header or (0, 1, 2)
    pairs = []
    for line, row in rows[1:] if header else rows:
        first, second, score = _pick(path, line, row, columns)
        _check(path, line, _is_number(score), f"the score must be a number, got {score!r}")
        pairs.append((first, second, float(score)))
    return _enough(path, pairs, 3, "pairs")


def read_labelled(file: str | os.PathLike[str]) -> list[tuple[int, str, str]]:
    """Texts with a label each, and the line on which each stands.

    Args:
        file: CSV or TSV (by its name; .gz too) with the columns `text` and `label` (or `category`);
            or a .txt file with one text on a line beside a `labels.txt` with one label on a line.

    Raises:
        DataError: Names the file and the line.
    """
    path = Path(file)
    if path.suffix == ".txt":
        labels = path.with_name("labels.txt")
        texts = [(i, line.rstrip("\r")) for i, line in enumerate(_lines(path), 1)]
        names = [line.strip() for line in _lines(labels)]
        if len(texts) != len(names):
            raise DataError(
                f"{path} and {labels.name} must have the same number of lines, got {len(texts)} "
                f"and {len(names)}"
            )
        pairs = [(line, text, name) for (line, text), name in zip(texts, names, strict=True)]
        for line, _, name in pairs:
            _check(labels, line, bool(name), "needs a label, got an empty line")
        return _enough(path, pairs, 2, "texts")
    rows = list(_rows(path))
    header = next(filter(None, (_header(rows, (*TEXT_COLUMNS, c)) for c in LABEL_COLUMNS)), None)
    if header is None:
        raise DataError(
            f"{path}, line {rows[0][0]}: needs the columns text and label (or category), got "
            f"{_shown(rows[0][1])}"
        )
    labelled = []
    for line, row in rows[1:]:
        text, label = _pick(path, line, row, header)
        _check(path, line, bool(label.strip()), "needs a label, got an empty field")
        labelled.append((line, text, label.strip()))
    return _enough(path, labelled, 2, "texts")


def read_texts(file: str | os.PathLike[str]) -> list[str]:
    """Texts, one on a line; empty lines are left out.

    Raises:
        DataError: If there are none.
    """
    texts = [line.strip() for line in _lines(Path(file)) if line.strip()]
    return _enough(Path(file), texts, 1, "texts")


def beir_files(folder: str | os.PathLike[str], split: str = "test") -> tuple[Path, Path, Path]:
    """Corpus, queries and judgements of a BEIR folder.

    Raises:
        DataError: Names the missing file.
    """
    place = Path(folder)
    found = []
    for names in (
        ("corpus.jsonl", "corpus.jsonl.gz"),
        ("queries.jsonl", "queries.jsonl.gz"),
        (f"qrels/{split}.tsv", f"qrels-{split}.tsv", "qrels.tsv"),
    ):
        file = next((place / name for name in names if os.path.isfile(place / name)), None)
        if file is None:
            raise DataError(f"a BEIR folder must hold {' or '.join(names)}, got none in {place}")
        found.append(file)
    return found[0], found[1], found[2]


def read_corpus(file: str | os.PathLike[str]) -> dict[str, str]:
    """Documents or queries of a BEIR folder: id to text, the title in front of it.

    Raises:
        DataError: Names the file and the line.
    """
    path = Path(file)
    texts: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        record = _json(path, number, line)
        key, text, title = (record.get(name) for name in ("_id", "text", "title"))
        _check(
            path,
            number,
            isinstance(key, str) and isinstance(text, str) and isinstance(title or "", str),
            f"must be an object with _id and text (strings), got {line[:60]!r}",
        )
        _check(path, number, key not in texts, f"every _id must be there once, got {key!r} again")
        texts[str(key)] = f"{title} {text}".strip() if title else str(text)
    if not texts:
        raise DataError(f"{path} must hold at least one text, got an empty file")
    return texts


def read_judgements(
    file: str | os.PathLike[str], queries: Iterable[str], documents: Iterable[str]
) -> dict[str, dict[str, int]]:
    """Relevance judgements: query id to document id to gain.

    Args:
        file: TSV of query id, document id and an integer, with or without a header.
        queries: Known query ids.
        documents: Known document ids.

    Returns:
        Only queries with at least one relevant document, as MTEB counts them.

    Raises:
        DataError: Names the file and the line.
    """
    path = Path(file)
    known_queries, known_documents = set(queries), set(documents)
    judged: dict[str, dict[str, int]] = {}
    for i, (line, row) in enumerate(_rows(path)):
        if i == 0 and len(row) == 3 and not _is_number(row[2]):
            continue
        _check(
            path,
            line,
            len(row) == 3 and _GAIN.fullmatch(row[2].strip()) is not None,
            f"must be query id, document id and an integer of at most 9 digits, got {_shown(row)}",
        )
        query, document, gain = row[0], row[1], int(row[2])
        _check(path, line, query in known_queries, f"no query has the id {query!r}")
        _check(path, line, document in known_documents, f"no document has the id {document!r}")
        judged.setdefault(query, {})[document] = gain
    judged = {query: gains for query, gains in judged.items() if max(gains.values()) > 0}
    if not judged:
        raise DataError(f"{path} must judge a document relevant for at least one query, got none")
    return judged


def check_classes(
    file: Path, labelled: Sequence[tuple[int, str, str]], known: Mapping[str, object] | None = None
) -> None:
    """Checks that every label can be learnt: two classes, two examples of each.

    Args:
        file: Where the texts stand, for the message.
        labelled: Line, text and label.
        known: Labels of the training texts, for test texts; they may then be there once.

    Raises:
        DataError: Names the file and the line.
    """
    counts: dict[str, int] = {}
    lines: dict[str, int] = {}
    for line, _, label in labelled:
        counts[label] = counts.get(label, 0) + 1
        lines.setdefault(label, line)
    for label, line in lines.items():
        if known is not None:
            _check(file, line, label in known, f"the label {label!r} has no training example")
        else:
            _check(
                file,
                line,
                counts[label] > 1,
                f"the label {label!r} must have two examples, got one",
            )
    if known is None and len(counts) < 2:
        raise DataError(f"{file} must have at least two labels, got {sorted(counts)}")


def file_revision(*files: Path) -> str:
    """A short hash of files, which says what was measured on."""
    digest = hashlib.sha256()
    for file in files:
        with reading(file, DataError):
            digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:12]}"


def _lines(path: Path) -> list[str]:
    with reading(path, DataError):
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode("utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"the file must exist, got {path}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{path}, line {line}: must be UTF-8, got {error.reason}") from error
    # Only line feeds end a line: texts hold other separators.
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and fields of each row that is not empty; at least one."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        raise DataError(f"a table must be a .csv or .tsv file, got {path}")
    lines = (f"{line}\n" for line in _lines(path))
    if name.endswith(".tsv"):
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)
    line, empty = 1, True
    while True:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
        if row:
            empty = False
            yield line, row
        line = reader.line_num + 1
    if empty:
        raise DataError(f"{path} must hold at least one row, got an empty file")


def _header(rows: Sequence[tuple[int, list[str]]], names: Sequence[str]) -> tuple[int, ...] | None:
    first = [field.strip().lower() for field in rows[0][1]]
    return tuple(first.index(name) for name in names) if set(names) <= set(first) else None


def _pick(path: Path, line: int, row: list[str], columns: Sequence[int]) -> list[str]:
    needed = max(columns) + 1
    _check(path, line, len(row) >= needed, f"needs {needed} fields, got {_shown(row)}")
    return [row[column] for column in columns]


def _json(path: Path, number: int, line: str) -> dict[str, Any]:
    record: dict[str, Any] = read_json(line, f"{path}, line {number}:", DataError)
    return record


def _enough(path: Path, items: list[_T], least: int, what: str) -> list[_T]:
    if len(items) < least:
        raise DataError(f"{path} must hold at least {least} {what}, got {len(items)}")
    return items


def _check(path: Path, line: int, holds: bool, rule: str) -> None:
    if not holds:
        raise DataError(f"{path}, line {line}: {rule}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _shown(row: list[str]) -> str:
    text = ", ".join(row)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
