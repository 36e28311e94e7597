"""GGUF files: their header, read here, and their tensors, dequantised by the `gguf` library.

The library's own reader makes an object of every token of the vocabulary, which takes a quarter of
a minute and a gigabyte where there are 262,144.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

from st_embfilter.errors import UnembeddingError
from st_embfilter.files.stored import StoredTensor
from st_embfilter.text import first_line, shown

#: Names that the GGUF specification gives to the output and to the input embedding.
OUTPUT: Final = "output.weight"
INPUT: Final = "token_embd.weight"

#: The name of the gain of the norm before the output embedding.
FINAL_NORM: Final = "output_norm.weight"

#: Versions with this layout; the first one counted in 32 bits.
_VERSIONS: Final = (2, 3)

_STRING, _ARRAY = 8, 9

#: `struct` letters of the other types of metadata, by their number.
_SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip

_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4

#: Bytes of the longest string of a header, and values in all of its lists: each a multiple of what
#: models have, and no one's memory.
_MAX_STRING: Final = 2**28
_MAX_VALUES: Final = 2**24


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in its file.

    Attributes:
        name: E.g. "blk.0.attn_q.weight".
        shape: Sizes as in torch, rows first.
        kind: Number of its quantisation (`gguf.GGMLQuantizationType`).
        start: Place of the tensor's first byte in the file.
        nbytes: Bytes of the tensor in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file: everything but its tensors is in memory.

    Attributes:
        path: The file.
        metadata: Numbers, booleans, strings and lists of them, by key.
        tensors: By name, in the order of the file.
        spans: Where the bytes of each key and its value lie, first and one after the last.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    spans: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Reads the header.

        Raises:
            UnembeddingError: If the library is missing, or the file is none of a whole model in a
                version that is known.
        """
        library()
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise UnembeddingError(f"a GGUF model must be a file, got something else: {path}")
        try:
            with path.open("rb") as file:
                header = _Header(file, path)
                metadata, tensors = header.read()
                spans = header.spans
        except UnembeddingError:
            raise
        except OSError as error:
            raise UnembeddingError(f"cannot read {path}: {error.strerror or error}") from error
        except Exception as error:  # files of strangers fail in many ways, all mean the same
            raise _damaged(path, first_line(error)) from error
        parts = metadata.get("split.count", 0)
        if re.search(r"-\d{5}-of-\d{5}$", path.stem) or (isinstance(parts, int) and parts > 1):
            raise UnembeddingError(
                f"a GGUF model must be one file, got one part of several in {path.name}; join them "
                "with `llama-gguf-split --merge`"
            )
        return cls(path, metadata, tensors, spans)

    def rows(self, tensor: GGUFTensor, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a tensor, dequantised.

        Args:
            tensor: Tensor of this file.
            first: First row.
            last: One after the last row; None for all.

        Returns:
            (last - first, ...) in float16 where it is stored so, else in float32.
        """
        gguf = library()
        kind = gguf.GGMLQuantizationType(tensor.kind)
        count = tensor.shape[0]
        last = count if last is None else last
        size = tensor.nbytes // count
        data = np.fromfile(
            self.path, np.uint8, (last - first) * size, offset=tensor.start + first * size
        )
        shape = (last - first, *tensor.shape[1:])
        plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        if plain is not None:
            return torch.from_numpy(data.view(plain).reshape(shape))
        try:
            values = gguf.dequantize(data.reshape(*shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise UnembeddingError(
                f"the gguf library must be able to dequantise every tensor, got {tensor.name!r} in "
                f"{kind.name}; take an unquantised model"
            ) from error
        return torch.from_numpy(values.reshape(shape))


class _Header:
    """Reads the parts of a header one after the other."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = path.stat().st_size
        self._values = 0
        self.spans: dict[str, tuple[int, int]] = {}

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self._file.read(4) != b"GGUF":
            raise UnembeddingError(f"{self._path.name} must be a GGUF file, got other bytes")
        version = self._numbers("I")[0]
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"big-endian version {swapped}" if swapped in _VERSIONS else f"version {version}"
            raise UnembeddingError(
                f"a GGUF file must be little-endian and of version 2 or 3, got {what} in "
                f"{self._path.name}; convert the model anew"
            )
        tensor_count, key_count = self._numbers("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            start = self._file.tell()
            key = self._string()
            if key in metadata:  # llama.cpp refuses it, and others would take another one
                raise _damaged(self._path, f"the key {key!r:.80} twice")
            metadata[key] = self._value(self._numbers("I")[0])
            self.spans[key] = (start, self._file.tell())
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", _ALIGNMENT))
        if alignment < 1:
            raise _damaged(self._path, f"general.alignment {alignment}")
        start = -(-self._file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in entries:
            tensor = self._tensor(name, shape, kind, start + offset)
            if name in tensors or tensor.start + tensor.nbytes > self._size:
                what = "comes twice" if name in tensors else "reaches beyond the end"
                raise _damaged(self._path, f"the tensor {name!r} {what}")
            tensors[name] = tensor
        return metadata, tensors

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._numbers("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _damaged(self._path, f"a tensor of {dimensions} dimensions")
        sizes = self._numbers(f"{dimensions}Q")
        kind, offset = self._numbers("IQ")
        return name, sizes[::-1], kind, offset

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
        gguf = library()
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise UnembeddingError(
                f"the gguf library must know every quantisation of {self._path.name}, got number "
                f"{kind} for {name!r}; update gguf, or take another quantisation"
            ) from error
        if shape[-1] % block or not prod(shape):
            raise _damaged(self._path, f"the tensor {name!r} has the shape {shape}")
        return GGUFTensor(name, shape, kind, start, prod(shape) // block * size)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(_SCALARS.get(kind, ""))[0]
        kind, length = self._numbers("IQ")
        self._values += length
        if self._values > _MAX_VALUES:
            raise _damaged(self._path, f"lists of {self._values:,} values")
        if kind in _SCALARS:
            return list(self._numbers(f"{length}{_SCALARS[kind]}"))
        return [self._value(kind) for _ in range(length)]

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        return self._bytes(length).decode("utf-8")

    def _numbers(self, form: str) -> tuple[Any, ...]:
        if not form:
            raise _damaged(self._path, "metadata of an unknown type")
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))

    def _bytes(self, length: int) -> bytes:
        if length > min(_MAX_STRING, self._size):
            raise _damaged(self._path, f"{length} bytes of a header")
        data = self._file.read(length)
        if len(data) < length:
            raise _damaged(self._path, "an end within the header")
        return data


def library() -> Any:
    """The `gguf` package.

    Raises:
        UnembeddingError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UnembeddingError(
            "reading a GGUF file needs the gguf library, got none; install st-embfilter[gguf]"
        ) from error
    return gguf


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that is meant: the path itself, or the only one in a folder of nothing else.

    Raises:
        UnembeddingError: If the folder holds several and no other checkpoint.
    """
    if path.suffix == ".gguf" and os.path.isfile(path):
        return path
    if not os.path.isdir(path) or any(path.glob("*config.json")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UnembeddingError(
            f"a folder of GGUF files must hold one, or one must be named, got {len(files)} in "
            f"{path}: {', '.join(file.name for file in files)}"
        )
    return files[0] if files else None


def read_gguf(path: Path) -> tuple[StoredTensor, bool]:
    """The output embedding of a GGUF file, and whether it is the input embedding.

    Quantised rows are dequantised to float32 as they are read: the matrix is then the one that the
    quantised model uses, not the original.

    Raises:
        UnembeddingError: If the library is missing, or the file or its embedding unfit.
    """
    file = GGUFFile.open(path)
    name = OUTPUT if OUTPUT in file.tensors else INPUT
    if name not in file.tensors:
        raise UnembeddingError(
            f"a GGUF file must hold {OUTPUT} or {INPUT}, got {len(file.tensors)} other tensors in "
            f"{path.name}"
        )
    tensor = file.tensors[name]
    if len(tensor.shape) != 2:
        raise _damaged(path, f"{name} of the shape {tensor.shape}")
    dtype = file.rows(tensor, 0, 1).dtype
    read_rows: Callable[[int, int], Tensor] = partial(file.rows, tensor)
    return StoredTensor(name, (tensor.shape[0], tensor.shape[1]), dtype, read_rows), name == INPUT


def read_gguf_gain(path: Path) -> Tensor:
    """The gain of the norm before the output embedding, (d,) float64.

    Raises:
        UnembeddingError: If the file is unfit, or the norm no RMSNorm with a gain.
    """
    file = GGUFFile.open(path)
    rms = f"{file.metadata.get('general.architecture')}.attention.layer_norm_rms_epsilon"
    if FINAL_NORM not in file.tensors or rms not in file.metadata:
        raise UnembeddingError(
            "folding needs an RMSNorm with a gain before the output embedding, got a file without "
            f"{FINAL_NORM if rms in file.metadata else rms} in {path.name}"
        )
    return file.rows(file.tensors[FINAL_NORM]).to(torch.float64)


def _damaged(path: Path, got: str) -> UnembeddingError:
    return UnembeddingError(
        f"{path.name} must be a whole GGUF file, got {shown(got)}; it is truncated or damaged, "
        "download it again"
    )
