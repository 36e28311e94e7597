"""Tensors of a checkpoint, read row by row without loading the model.

One mechanism for every form and place: `ModelFiles` finds files, a `Checkpoint` lists tensors, a
`StoredTensor` reads rows.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeGuard, TypeVar

import torch
from torch import Tensor

from st_embfilter.errors import LinkError, UnembeddingError
from st_embfilter.text import read_json

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

_Found = TypeVar("_Found")

#: The safetensors format allows headers up to this size.
MAX_HEADER_BYTES: Final = 100_000_000


#: A name in the same folder, no longer than file systems take.
_PLAIN_NAME: Final = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,255}")


@dataclass(frozen=True)
class StoredTensor:
    """A matrix that can be read by rows.

    Attributes:
        name: Its key in the checkpoint.
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


class Checkpoint(ABC):
    """Named tensors of one model."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Every tensor name."""

    @abstractmethod
    def place(self, name: str) -> str:
        """Name of the file that holds the tensor."""

    @abstractmethod
    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name.

        Raises:
            UnembeddingError: If it is no matrix of a floating dtype, or its file is damaged.
        """


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


class ModelFiles(ABC):
    """The files of one model, in a folder or on the Hub.

    Attributes:
        name: Folder or Hub id.
        where: Names the model in errors.
    """

    name: str
    where: str

    @property
    def commit(self) -> str | None:
        """Hash of the commit on the Hub, as soon as a file was found; None for a folder."""
        return None

    @abstractmethod
    def path(self, file: str) -> Path | None:
        """A local copy of the file, downloaded if need be; None if the model has no such file."""

    @abstractmethod
    def open(self, file: str) -> SafetensorsFile | None:
        """A safetensors file to read from without downloading it; None if there is none."""


class FolderFiles(ModelFiles):
    """The files of a model in a local folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self.name = self.where = str(folder)

    def path(self, file: str) -> Path | None:
        """The file's path.

        Raises:
            LinkError: If it is a symbolic link out of the folder.
        """
        path = self._folder / file
        try:
            if not path.is_file():
                return None
        except (OSError, ValueError):  # a name that no file can have
            return None
        check_inside(path, self._folder)
        return path

    def open(self, file: str) -> SafetensorsFile | None:
        """The file on disk."""
        path = self.path(file)
        return None if path is None else LocalSafetensors(path)


class SafetensorsCheckpoint(Checkpoint):
    """`model.safetensors`, or its shards.

    Args:
        files: The model's files.
        places: Which file holds which tensor.
    """

    def __init__(self, files: ModelFiles, places: dict[str, str]) -> None:
        self._files = files
        self._places = places

    @property
    def names(self) -> frozenset[str]:
        """Every tensor name."""
        return frozenset(self._places)

    def place(self, name: str) -> str:
        """Name of the file that holds the tensor."""
        return self._places[name]

    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name; only its header is read now."""
        file = self._files.open(self._places[name])
        return _shard(file, self._places[name], self._files).tensor(name)


class TorchCheckpoint(Checkpoint):
    """`pytorch_model.bin`, or its shards; unpickled with `weights_only=True`, mapped from disk.

    Args:
        files: The model's files.
        places: Which file holds which tensor; None for one file with all of them.
    """

    def __init__(self, files: ModelFiles, places: dict[str, str] | None = None) -> None:
        self._files = files
        self._places = places or dict.fromkeys(self.load(TORCH_FILE), TORCH_FILE)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor name."""
        return frozenset(self._places)

    def place(self, name: str) -> str:
        """Name of the file that holds the tensor."""
        return self._places[name]

    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name, mapped from disk."""
        tensor = self.load(self._places[name]).get(name)
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(tensor, Tensor) or not dense or not tensor.dtype.is_floating_point:
            raise UnembeddingError(
                f"{self._places[name]} must hold {name!r} as a dense floating tensor, got "
                f"{getattr(tensor, 'layout', '')} {getattr(tensor, 'dtype', type(tensor).__name__)}"
            )
        return StoredTensor.of(name, tensor)

    def load(self, file: str) -> dict[str, Any]:
        """Everything in one of its files by name, mapped from disk.

        Raises:
            UnembeddingError: If it is no plain state dict.
        """
        path = _shard(self._files.path(file), file, self._files)
        try:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of torch < 1.6 are no zip archives and cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise UnembeddingError(
                f"{path.name} must be a plain torch state dict (it is unpickled with "
                "weights_only=True, so it may hold no code), got a file that cannot be read that "
                "way; use a safetensors checkpoint"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise UnembeddingError(
                f"{path.name} must hold a dict of tensors by name, got {type(state).__name__}"
            )
        return state


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """The checkpoint among a model's files, in the order in which transformers looks for it.

    One file goes before shards, safetensors before `.bin`.

    Raises:
        UnembeddingError: If there are no weights, or damaged ones.
    """
    single = files.open(SAFETENSORS_FILE)
    if single is not None:  # before an index, which may be left over from earlier shards
        return SafetensorsCheckpoint(files, dict.fromkeys(single.header[0], SAFETENSORS_FILE))
    index = files.path(SAFETENSORS_INDEX)
    if index is not None:
        return SafetensorsCheckpoint(files, read_index(index))
    if files.path(TORCH_FILE) is not None:
        return TorchCheckpoint(files)
    index = files.path(TORCH_INDEX)
    if index is not None:
        return TorchCheckpoint(files, read_index(index))
    raise UnembeddingError(
        f"a checkpoint must hold {SAFETENSORS_FILE} or {TORCH_FILE} (or their index), got none of "
        f"them in {files.where}"
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


def check_inside(path: Path, folder: Path) -> None:
    """Checks that a file of a model folder lies in it, links resolved.

    A link could make a model of a stranger read, and a saved copy of it publish, any file of this
    machine. Links within a repository of the Hub cache are how that cache works.

    Raises:
        LinkError: If it is a symbolic link out of the folder.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        root = root.parents[1]
    if not path.resolve().is_relative_to(root):
        raise LinkError(
            f"every file of a model must lie in its folder, got the symbolic link {path} out of "
            "it; put the file itself there"
        )


def links_out(folder: Path) -> list[str]:
    """Files and folders in a model folder that are links out of it."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            try:
                check_inside(path, folder)
            except (LinkError, OSError, RuntimeError):
                found.append(path.relative_to(folder).as_posix())
    return found


def read_index(path: Path) -> dict[str, str]:
    """The tensor-to-file map of a sharded checkpoint."""
    try:
        return parse_index(path.read_bytes(), path.name)
    except OSError as error:
        raise UnembeddingError(f"cannot read {path}: {error.strerror or error}") from error


def parse_index(data: bytes, file: str) -> dict[str, str]:
    """The checked `weight_map` of an index file: file names only, no paths out of the folder."""
    files = read_json(data, file, UnembeddingError).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UnembeddingError(
            f"{file} must hold a non-empty object 'weight_map', got {files!r:.80}"
        )
    for shard in files.values():
        if not isinstance(shard, str) or not _PLAIN_NAME.fullmatch(shard):
            raise UnembeddingError(
                f"every file in the weight_map of {file} must be a plain file name, got "
                f"{shard!r:.200}"
            )
    return files


def _shard(found: _Found | None, file: str, files: ModelFiles) -> _Found:
    if found is None:
        raise UnembeddingError(
            f"the checkpoint must hold the shard {file}, got no such file in {files.where}; "
            "download it again"
        )
    return found


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
