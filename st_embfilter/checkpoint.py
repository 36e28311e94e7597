"""Tensors of a local checkpoint folder, read row by row without loading the model.

One mechanism for every form: a `Checkpoint` lists names, a `StoredTensor` reads rows.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor

from st_embfilter.errors import UnembeddingError

SAFETENSORS_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}

SAFETENSORS_FILE: Final = "model.safetensors"
SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
TORCH_FILE: Final = "pytorch_model.bin"
TORCH_INDEX: Final = "pytorch_model.bin.index.json"

#: The safetensors format allows headers up to this size.
MAX_HEADER_BYTES: Final = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A matrix that can be read by rows.

    Attributes:
        name: Its key in the checkpoint.
        shape: (rows, columns).
        dtype: The dtype in which it is stored; rows come in it.
        read_rows: Reads rows [start, stop) as a (stop - start, columns) tensor on the CPU.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> StoredTensor:
        """A matrix that is already in memory."""
        rows, columns = _matrix_shape(name, tuple(tensor.shape))
        weight = tensor.detach()
        return cls(name, (rows, columns), weight.dtype, lambda a, b: weight[a:b].cpu())

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class Checkpoint(ABC):
    """Named tensors of one model."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Every tensor name."""

    @abstractmethod
    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name.

        Raises:
            UnembeddingError: If it is no matrix of a floating dtype, or its file is damaged.
        """


class SafetensorsFolder(Checkpoint):
    """`model.safetensors`, or its shards and their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / SAFETENSORS_INDEX
        if index.is_file():
            self._files = read_index(index)
        else:
            header, _ = read_header(folder / SAFETENSORS_FILE)
            self._files = dict.fromkeys(header, SAFETENSORS_FILE)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor name."""
        return frozenset(self._files)

    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name; only its header is read now."""
        path = shard_path(self._folder, self._files[name])
        header, data_start = read_header(path)
        if name not in header:
            raise UnembeddingError(
                f"{path.name} must hold the tensor {name!r} that the index places there, got no "
                "such tensor; download the checkpoint again"
            )
        entry = TensorEntry.parse(name, header[name], path.stat().st_size - data_start)
        return entry.stored(lambda start, length: _pread(path, data_start + start, length))


class TorchFolder(Checkpoint):
    """`pytorch_model.bin`, or its shards; unpickled with `weights_only=True`, mapped from disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / TORCH_INDEX
        if index.is_file():
            self._files = read_index(index)
        else:
            self._files = dict.fromkeys(self._load(TORCH_FILE), TORCH_FILE)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor name."""
        return frozenset(self._files)

    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name, mapped from disk."""
        tensor = self._load(self._files[name]).get(name)
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            raise UnembeddingError(
                f"{self._files[name]} must hold {name!r} as a floating tensor, got "
                f"{getattr(tensor, 'dtype', type(tensor).__name__)}"
            )
        return StoredTensor.of(name, tensor)

    def _load(self, file: str) -> dict[str, Any]:
        path = shard_path(self._folder, file)
        try:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of torch < 1.6 are no zip archives and cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UnembeddingError(
                f"{path.name} must be a plain torch state dict (it is unpickled with "
                "weights_only=True, so it may hold no code), got a file that cannot be read that "
                "way; use a safetensors checkpoint"
            ) from error
        if not isinstance(state, dict):
            raise UnembeddingError(f"{path.name} must hold a dict of tensors, got {type(state)}")
        return state


def open_folder(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a local folder; safetensors first, then `.bin`.

    Raises:
        UnembeddingError: If the folder holds no weights, or damaged ones.
    """
    folder = Path(folder)
    if (folder / SAFETENSORS_INDEX).is_file() or (folder / SAFETENSORS_FILE).is_file():
        return SafetensorsFolder(folder)
    if (folder / TORCH_INDEX).is_file() or (folder / TORCH_FILE).is_file():
        return TorchFolder(folder)
    raise UnembeddingError(
        f"a checkpoint folder must hold {SAFETENSORS_FILE} or {TORCH_FILE} (or their index), got "
        f"none of them in {folder}"
    )


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


def read_header(path: Path) -> tuple[dict[str, object], int]:
    """Header of a safetensors file, without its `__metadata__`, and where its data starts."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(8), size, path.name)
            return parse_header(file.read(length), path.name), 8 + length
    except OSError as error:
        raise UnembeddingError(f"cannot read {path}: {error.strerror or error}") from error


def header_length(prefix: bytes, file_size: int, file: str) -> int:
    """Length in bytes of the JSON header, from the first eight bytes of a safetensors file."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
        raise UnembeddingError(
            f"a safetensors file must start with the length of its header (2 to "
            f"{MAX_HEADER_BYTES} bytes, within the file), got {length} in {file}, a file of "
            f"{file_size} bytes; it is truncated or no safetensors file"
        )
    return int(length)


def parse_header(data: bytes, file: str) -> dict[str, object]:
    """The JSON header of a safetensors file, without its `__metadata__`."""
    header = _json_object(data, f"the header of {file}")
    header.pop("__metadata__", None)
    return header


def read_index(path: Path) -> dict[str, str]:
    """The tensor-to-file map of a sharded checkpoint."""
    try:
        return parse_index(path.read_bytes(), path.name)
    except OSError as error:
        raise UnembeddingError(f"cannot read {path}: {error.strerror or error}") from error


def parse_index(data: bytes, file: str) -> dict[str, str]:
    """The checked `weight_map` of an index file: file names only, no paths out of the folder."""
    files = _json_object(data, file).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UnembeddingError(f"{file} must hold a non-empty object 'weight_map', got {files!r}")
    for shard in files.values():
        plain = isinstance(shard, str) and PurePosixPath(shard).name == shard
        if not plain or shard in ("", "..") or "\\" in shard:
            raise UnembeddingError(
                f"every file in the weight_map of {file} must be a plain file name, got {shard!r}"
            )
    return files


def shard_path(folder: Path, file: str) -> Path:
    """The path of one shard, which must exist."""
    path = folder / file
    if not path.is_file():
        raise UnembeddingError(
            f"the checkpoint must hold the shard {file}, got no such file in {folder}; download "
            "it again"
        )
    return path


def _pread(path: Path, start: int, length: int) -> bytearray:
    """Reads into memory of its own: a mapped file would stay in the process's memory."""
    data = bytearray(length)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view = memoryview(data)
        while view:
            count = file.readinto(view)
            if not count:
                raise UnembeddingError(f"{path.name} ended early; it is truncated")
            view = view[count:]
    return data


def _matrix_shape(name: str, shape: Iterable[int]) -> tuple[int, int]:
    shape = tuple(shape)
    if len(shape) != 2 or min(shape) < 1:
        raise UnembeddingError(
            f"the unembedding matrix must have shape (V, d) with V, d >= 1, got {name!r} of shape "
            f"{shape}"
        )
    return shape


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnembeddingError(f"{what} must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise UnembeddingError(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _is_ints(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
