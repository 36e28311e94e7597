"""Tensors of a checkpoint, read row by row without loading the model.

One mechanism for every form and place: `ModelFiles` finds files, a `Checkpoint` lists tensors, a
`StoredTensor` reads rows.
"""

from __future__ import annotations

import pickle
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from st_embfilter.errors import UnembeddingError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.stored import SafetensorsFile, StoredTensor
from st_embfilter.text import read_json

SAFETENSORS_FILE: Final = "model.safetensors"
SAFETENSORS_INDEX: Final = "model.safetensors.index.json"
TORCH_FILE: Final = "pytorch_model.bin"
TORCH_INDEX: Final = "pytorch_model.bin.index.json"

_Found = TypeVar("_Found")


#: A name in the same folder, no longer than file systems take.
_PLAIN_NAME: Final = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,255}")


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


class SafetensorsCheckpoint(Checkpoint):
    """`model.safetensors`, or its shards.

    Args:
        files: The model's files.
        places: Which file holds which tensor.
    """

    def __init__(self, files: ModelFiles, places: dict[str, str]) -> None:
        self._files = files
        self._places = places
        self._opened: dict[str, SafetensorsFile] = {}  # with a header each

    @property
    def names(self) -> frozenset[str]:
        """Every tensor name."""
        return frozenset(self._places)

    def place(self, name: str) -> str:
        """Name of the file that holds the tensor."""
        return self._places[name]

    def tensor(self, name: str) -> StoredTensor:
        """The matrix of that name; only the header of its file is read, at the first one."""
        place = self._places[name]
        if place not in self._opened:
            self._opened[place] = _shard(self._files.open(place), place, self._files)
        return self._opened[place].tensor(name)


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
