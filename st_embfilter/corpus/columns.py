"""Columns of Parquet files, nested ones too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from st_embfilter.errors import CorpusError


def find_column(schema: Any, path: str, where: str) -> list[str]:
    """The names that lead to a column."""
    import pyarrow as pa

    if any(schema.names.count(name) > 1 for name in (path, path.split(".", maxsplit=1)[0])):
        raise CorpusError(f"{where} must have every column once, got {path!r} twice; rename one")
    if path in schema.names:
        return [path]
    names, kind = path.split("."), schema
    for name in names:
        inside = kind.names if isinstance(kind, pa.Schema) else [f.name for f in _fields(kind)]
        if name not in inside:
            raise CorpusError(
                f"{where} must have the column {path!r}, got {', '.join(schema.names)[:200]}"
            )
        kind = kind.field(name).type
    return names


def _fields(kind: Any) -> list[Any]:
    import pyarrow as pa

    return [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def column_at(batch: Any, path: Sequence[str]) -> Any:
    """A column, with null where a struct around it is null."""
    import pyarrow.compute as pc

    column = batch.column(path[0])
    return pc.struct_field(column, list(path[1:])) if len(path) > 1 else column


def strings_of(column: Any) -> list[object]:
    """Values of a column; bytes where a string is no UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    binary = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    if not binary:
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            column = column.cast(pa.large_binary())
    return [None if item is None else _decode(item) for item in column.to_pylist()]


def _decode(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
