"""Write safetensors files piece by piece, so that no tensor need be in memory whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from st_embfilter.files.stored import SAFETENSORS_DTYPES, SafetensorsFile

_PIECE: Final = 16 * 2**20
_ALIGNMENT: Final = 8

_DTYPES: Final = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes, of any dtype and shape.

    Attributes:
        dtype: As the safetensors format names it, e.g. "BF16".
        shape: Its sizes.
        nbytes: Its size in bytes.
        pieces: Reads its bytes in order.
    """

    dtype: str
    shape: list[int]
    nbytes: int
    pieces: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @classmethod
    def of(cls, tensor: Tensor) -> RawTensor:
        """A tensor in memory, or mapped from a file."""

        def pieces() -> Iterator[memoryview]:
            flat = tensor.detach().cpu().contiguous().view(-1)
            yield memoryview(cast("Any", flat.view(torch.uint8).numpy()))

        size = tensor.numel() * tensor.element_size()
        return cls(_DTYPES[tensor.dtype], list(tensor.shape), size, pieces)


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


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    """Writes tensors in this order, one piece of one tensor in memory at a time.

    Args:
        path: The new file.
        tensors: By name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                file.write(piece)
