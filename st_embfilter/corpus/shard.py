"""One shard: what its bytes depend on, how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from st_embfilter.corpus.inputs import Input, Position

Precision = Literal["float32", "float16", "int8", "binary"]

#: Folder of the `.npy` files.
NPY: Final = "_npy"

#: Raised when the bytes of a corpus change.
_FORMAT: Final = 1

Vectors = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """What the bytes of a corpus folder depend on.

    Attributes:
        model: sha256 of the model, of `fingerprint`.
        width: Dimensions of the model's vectors.
        inputs: The files.
        text: Column of the texts.
        id: Column of the ids, None for row numbers.
        id_type: "int64" or "string".
        dims: Widths that are written, each a prefix of the model's vector.
        precision: Number type of sentence-transformers' `encode`; float16 is numpy's.
        normalize: Whether each width has unit length.
        queries: Whether texts are encoded as queries, not documents.
        npy: Whether each shard is also written as `.npy`.
        batch_size: Texts in a batch of the model.
        shard_rows: Input rows behind a shard.
        device: "cpu", "cuda", ...; "pool:cpu" if several processes share the work.
    """

    model: str
    width: int
    inputs: tuple[Input, ...]
    text: str
    id: str | None
    id_type: str
    dims: tuple[int, ...]
    precision: Precision
    normalize: bool
    queries: bool
    npy: bool
    batch_size: int
    shard_rows: int
    device: str

    def columns(self) -> dict[int, str]:
        """Widths and the columns that hold them."""
        if len(self.dims) == 1:
            return {self.dims[0]: "embedding"}
        return {width: f"embedding_{width}" for width in self.dims}

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        found: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))
        return found


@dataclass(frozen=True)
class Shard:
    """A finished shard.

    Attributes:
        number: From 0.
        rows: Vectors in it.
        bad: Rows that gave none.
        start: Before its first input row.
        end: After its last.
        files: Name in the folder to size in bytes and sha256.
    """

    number: int
    rows: int
    bad: int
    start: Position
    end: Position
    files: Mapping[str, tuple[int, str]] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "number": self.number,
            "first_row": self.start.number,
            "rows": self.rows,
            "bad": self.bad,
            "files": {name: {"size": s, "sha256": d} for name, (s, d) in self.files.items()},
        }

    @classmethod
    def of_json(cls, record: Mapping[str, Any]) -> Shard:
        """The shard of a line of the journal."""
        return cls(
            record["number"],
            record["rows"],
            record["bad"],
            Position(**record["start"]),
            Position(**record["end"]),
            {name: (size, digest) for name, (size, digest) in record["files"].items()},
        )


class ShardWriter:
    """Writes one shard: its files appear, whole, when it is closed.

    Args:
        path: The folder.
        settings: The run's settings.
        number: The shard's number, from 0.
        start: Before its first input row.
    """

    def __init__(self, path: Path, settings: Settings, number: int, start: Position) -> None:
        self.path, self.settings, self.number, self.start = path, settings, number, start
        self._files: dict[str, tuple[IO[bytes], str]] = {}
        self._writer: Any = None
        self.rows = self.bad = 0

    def write(self, ids: Sequence[object], vectors: Mapping[int, Vectors]) -> None:
        """Appends a row group.

        Args:
            ids: n of them.
            vectors: Width to array (n, width) in the precision of the run; (n, ceil(width / 8)) if
                that is binary.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = self.settings.columns()
        arrays = {names[width]: _lists(array) for width, array in vectors.items()}
        kind = pa.int64() if self.settings.id_type == "int64" else pa.string()
        keys = ids if kind == pa.int64() else [str(key) for key in ids]
        table = pa.table({"id": pa.array(keys, kind), **arrays})
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._open(f"shard-{self.number:06d}.parquet"),
                table.schema,
                compression="none",  # vectors hold no patterns
                use_dictionary=False,
                write_statistics=["id"],
            )
        self._writer.write_table(table, row_group_size=max(1, len(ids)))
        if self.settings.npy:
            for width, array in vectors.items():
                suffix = "" if len(vectors) == 1 else f".{width}"
                name = f"{NPY}/shard-{self.number:06d}{suffix}.npy"
                if name not in self._files:
                    _npy_header(self._open(name), array, 0)
                self._files[name][0].write(np.ascontiguousarray(array).data)
        self.rows += len(ids)

    def reject(self, record: Mapping[str, Any]) -> None:
        """Appends a row to the side file."""
        name = f"_bad-{self.number:06d}.jsonl"
        file = self._files[name][0] if name in self._files else self._open(name)
        file.write(json.dumps(record).encode() + b"\n")
        self.bad += 1

    def close(self, end: Position, like: Mapping[int, Vectors]) -> Shard:
        """Finishes the files and renames them.

        Args:
            end: After the last input row.
            like: Arrays (0, width) as in `write`, for a shard without rows.
        """
        if self._writer is None:
            self.write([], like)
        self._writer.close()
        for name, (file, _) in self._files.items():
            if name.endswith(".npy"):
                width = int(name.split(".")[-2]) if name.count(".") > 1 else self.settings.dims[0]
                file.seek(0)
                _npy_header(file, like[width], self.rows)
        files = {}
        for name, (file, temporary) in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            files[name] = (os.path.getsize(temporary), _sha256(temporary))
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path / name)
        return Shard(self.number, self.rows, self.bad, self.start, end, dict(sorted(files.items())))

    def abort(self) -> None:
        """Removes what was written."""
        for file, temporary in self._files.values():
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                os.unlink(temporary)

    def _open(self, name: str) -> IO[bytes]:
        place = (self.path / name).parent
        place.mkdir(exist_ok=True)
        # A name of its own: on a cluster, a shard may for a moment have two writers.
        descriptor, temporary = tempfile.mkstemp(
            prefix=f".shard-{self.number:06d}.", suffix=".tmp", dir=place
        )
        file = os.fdopen(descriptor, "wb")
        self._files[name] = (file, temporary)
        return file


def _lists(array: Vectors) -> Any:
    """Rows of an array (n, width) as fixed-size lists."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _npy_header(file: IO[bytes], array: Vectors, rows: int) -> None:
    """A header that keeps its length when the number of rows is filled in."""
    np.lib.format.write_array_header_1_0(
        file,
        {
            "descr": np.lib.format.dtype_to_descr(array.dtype),
            "fortran_order": False,
            "shape": (rows, array.shape[1]),
        },
    )


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
