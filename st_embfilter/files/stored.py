"""Stored matrices that can be read by rows, and safetensors files of which any bytes can be."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, TypeGuard

import torch
from torch import Tensor

from st_embfilter.errors import UnembeddingError
from st_embfilter.text import read_json

#: Every dtype by its name in the safetensors format.
DTYPE_NAMES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

#: The dtypes of a matrix that can be read by rows.
SAFETENSORS_DTYPES: Final[dict[str, torch.dtype]] = {
    name: dtype
    for dtype, name in DTYPE_NAMES.items()
    if dtype.is_floating_point or dtype == torch.int8
}


#: The safetensors format allows headers up to this size.
MAX_HEADER_BYTES: Final = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A matrix that can be read by rows.

    Attributes:
        name: The tensor's key in the checkpoint.
        shape: (rows, columns).
        dtype: The dtype in which it is stored; rows come in it.
        read_rows: Reads rows [start, stop) as a (stop - start, columns) tensor on the CPU.
        file: The file that rows are read from, of a safetensors checkpoint.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    file: SafetensorsFile | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> StoredTensor:
        """A matrix that is already in memory."""
        rows, columns = _matrix_shape(name, tuple(tensor.shape))
        weight = tensor.detach()
        return cls(name, (rows, columns), weight.dtype, lambda a, b: weight[a:b].cpu())

    @property
    def remote(self) -> bool:
        """Whether every read goes over the network, so that reading twice is dear."""
        return self.file is not None and self.file.remote

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class SafetensorsFile(ABC):
    """One safetensors file of which any bytes can be read.

    Attributes:
        name: For errors.
        size: In bytes.
    """

    name: str
    size: int

    @property
    def remote(self) -> bool:
        """Whether it is read over the network."""
        return False

    @abstractmethod
    def read(self, start: int, length: int) -> bytearray:
        """Reads bytes [start, start + length) into memory of their own."""

    @cached_property
    def header(self) -> tuple[dict[str, object], int]:
        """The header without its `__metadata__`, and where the data starts."""
        length = header_length(self.read(0, min(8, self.size)), self.size, self.name)
        header = parse_header(self.read(8, length), self.name)
        check_layout(header, self.size - 8 - length, self.name)
        return header, 8 + length

    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name; only the header is read now."""
        header, data_start = self.header
        if name not in header:
            raise UnembeddingError(
                f"{self.name} must hold the tensor {name!r} that the index places there, got no "
                "such tensor; download the checkpoint again"
            )
        entry = TensorEntry.parse(name, header[name], self.size - data_start)
        stored = entry.stored(lambda start, length: self.read(data_start + start, length))
        return replace(stored, file=self)


class LocalSafetensors(SafetensorsFile):
    """A safetensors file on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.name
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise UnembeddingError(f"cannot read {path}: {error.strerror or error}") from error

    def read(self, start: int, length: int) -> bytearray:
        """Reads bytes [start, start + length)."""
        # A mapped file would stay in the process's memory.
        data = bytearray(length)
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(start)
                view = memoryview(data)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise UnembeddingError(f"{self.name} ended early; it is truncated")
                    view = view[count:]
        except OSError as error:
            message = f"cannot read {self._path}: {error.strerror or error}"
            raise UnembeddingError(message) from error
        return data


@dataclass(frozen=True)
class TensorEntry:
    """One matrix in the header of a safetensors file; offsets count from the end of the header."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    start: int
    stop: int

    @classmethod
    def parse(cls, name: str, entry: object, data_size: int) -> TensorEntry:
        """Checks a header entry against the format and the size of the data section.

        Raises:
            UnembeddingError: If dtype, shape, offsets and file size do not fit together.
        """
        if not isinstance(entry, dict):
            raise UnembeddingError(f"the header entry of {name!r} must be an object, got {entry!r}")
        dtype = SAFETENSORS_DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise UnembeddingError(
                f"the unembedding matrix must be stored in one of {', '.join(SAFETENSORS_DTYPES)}, "
                f"got {name!r} in {entry.get('dtype')!r}; use an unquantised checkpoint"
            )
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not (_is_ints(shape) and _is_ints(offsets) and len(offsets) == 2):
            raise UnembeddingError(
                f"the header entry of {name!r} must give shape and data_offsets as whole numbers, "
                f"got shape {shape!r} and data_offsets {offsets!r}"
            )
        # Scales of quantised weights are vectors or single numbers: columns.
        rows, columns = _matrix_shape(name, shape if len(shape) > 1 else [*shape, 1, 1][:2])
        start, stop = offsets
        if not start <= stop <= data_size or stop - start != rows * columns * dtype.itemsize:
            raise UnembeddingError(
                f"{name!r} of shape {(rows, columns)} and dtype {entry['dtype']} needs "
                f"{rows * columns * dtype.itemsize} bytes within {data_size} bytes of data, got "
                f"data_offsets [{start}, {stop}]; the file is truncated or damaged"
            )
        return cls(name, (rows, columns), dtype, start, stop)

    def stored(self, read: Callable[[int, int], bytearray]) -> StoredTensor:
        """The matrix behind this entry.

        Args:
            read: Reads (start, length) bytes, counted as the offsets are.
        """
        row_bytes = self.shape[1] * self.dtype.itemsize

        def read_rows(first: int, last: int) -> Tensor:
            data = read(self.start + first * row_bytes, (last - first) * row_bytes)
            return torch.frombuffer(data, dtype=self.dtype).view(last - first, self.shape[1])

        return StoredTensor(self.name, self.shape, self.dtype, read_rows)


def header_length(prefix: bytes | bytearray, file_size: int, file: str) -> int:
    """Length in bytes of the JSON header, from the first eight bytes of a safetensors file."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
        raise UnembeddingError(
            f"a safetensors file must start with the length of its header (2 to "
            f"{MAX_HEADER_BYTES} bytes, within the file), got {length} in {file}, a file of "
            f"{file_size} bytes; it is truncated or no safetensors file"
        )
    return int(length)


def parse_header(data: bytes | bytearray, file: str) -> dict[str, object]:
    """The JSON header of a safetensors file, without its `__metadata__`."""
    header: dict[str, object] = read_json(data, f"the header of {file}", UnembeddingError)
    header.pop("__metadata__", None)
    return header


def check_layout(header: dict[str, object], data_size: int, file: str) -> None:
    """Checks that the tensors of a safetensors file cover its data, without overlap or holes.

    Raises:
        UnembeddingError: If they do not, or an entry is malformed.
    """
    spans = []
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(entry, dict):
            raise UnembeddingError(f"the header entry of {name!r} must be an object, got {entry!r}")
        if not (_is_ints(offsets) and len(offsets) == 2):
            raise UnembeddingError(
                f"the header entry of {name!r} must give data_offsets as whole numbers, got "
                f"{offsets!r:.80}"
            )
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end or stop < start or stop > data_size:
            raise UnembeddingError(
                f"the tensors of {file} must cover its {data_size} bytes of data without overlap "
                f"or hole, got data_offsets [{start}, {stop}] of {name!r} after byte {end}; the "
                "file is truncated or damaged"
            )
        end = stop
    if end != data_size:
        raise UnembeddingError(
            f"the tensors of {file} must cover its {data_size} bytes of data without overlap or "
            f"hole, got {end} bytes of tensors; the file is damaged"
        )


def _matrix_shape(name: str, shape: Iterable[int]) -> tuple[int, int]:
    shape = tuple(shape)
    if len(shape) != 2 or min(shape) < 1:
        raise UnembeddingError(
            f"the unembedding matrix must have shape (V, d) with V, d >= 1, got {name!r} of shape "
            f"{shape}"
        )
    return shape


def _is_ints(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
