"""Write safetensors files piece by piece, so that no tensor need be in memory whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import torch
from torch import Tensor

from st_embfilter.files.stored import DTYPE_NAMES, SafetensorsFile

_PIECE: Final = 16 * 2**20
_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a file.

    Attributes:
        dtype: Name in the safetensors format, e.g. "BF16".
        shape: The tensor's shape.
        nbytes: The tensor's size in bytes.
    """

    dtype: str
    shape: list[int]
    nbytes: int

    @classmethod
    def of_shape(cls, dtype: torch.dtype, shape: Iterable[int]) -> Slot:
        """The place of a tensor of that dtype and shape."""
        sizes = list(shape)
        return cls(DTYPE_NAMES[dtype], sizes, prod(sizes) * dtype.itemsize)


@dataclass(frozen=True)
class RawTensor(Slot):
    """A tensor as bytes, of any dtype and shape.

    Attributes:
        pieces: Reads its bytes in order.
    """

    pieces: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @classmethod
    def of(cls, tensor: Tensor) -> RawTensor:
        """A tensor in memory, or mapped from a file."""

        def pieces() -> Iterator[memoryview]:
            flat = tensor.detach().cpu().contiguous().view(-1)
            yield memoryview(cast("Any", flat.view(torch.uint8).numpy()))

        size = tensor.numel() * tensor.element_size()
        return cls(DTYPE_NAMES[tensor.dtype], list(tensor.shape), size, pieces)


def raw_tensors(file: SafetensorsFile) -> dict[str, RawTensor]:
    """Every tensor of a safetensors file in the order of its bytes; only the header is read now."""
    header, data_start = file.header

    def entry(record: Any) -> RawTensor:
        start, stop = record["data_offsets"]

        def pieces() -> Iterator[bytearray]:
            for first in range(start, stop, _PIECE):
                yield file.read(data_start + first, min(_PIECE, stop - first))

        return RawTensor(str(record["dtype"]), list(record["shape"]), stop - start, pieces)

    records: dict[str, Any] = header
    ordered = sorted(records.items(), key=lambda item: tuple(item[1]["data_offsets"]))
    return {name: entry(record) for name, record in ordered}


class SafetensorsWriter:
    """Fills the tensors of a new safetensors file in any order, piece by piece.

    Args:
        file: Open for writing, and empty.
        slots: Places by name, in the order of their bytes.
    """

    def __init__(self, file: BinaryIO, slots: Mapping[str, Slot]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._file = file
        self._starts: dict[str, int] = {}
        end = 0
        for name, slot in slots.items():
            self._starts[name], end = end, end + slot.nbytes
            offsets = [self._starts[name], end]
            header[name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        file.write(struct.pack("<Q", len(text)) + text)
        self._data = file.tell()
        file.truncate(self._data + end)

    def write(
        self, name: str, pieces: Iterable[bytes | bytearray | memoryview], start: int = 0
    ) -> None:
        """Writes bytes of a tensor.

        Args:
            name: Name of its slot.
            pieces: The bytes, in order.
            start: Where they begin within the tensor, in bytes.
        """
        self._file.seek(self._data + self._starts[name] + start)
        self._file.writelines(pieces)


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    """Writes tensors in this order, one piece of one tensor in memory at a time.

    Args:
        path: The new file.
        tensors: By name.
    """
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, tensors)
        for name, tensor in tensors.items():
            writer.write(name, tensor.pieces())
