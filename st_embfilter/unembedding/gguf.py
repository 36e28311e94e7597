"""The unembedding matrix of a GGUF file, read with the `gguf` library (extra `gguf`)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from st_embfilter.errors import UnembeddingError
from st_embfilter.files.tensors import StoredTensor

#: Names that the GGUF specification gives to the output and to the input embedding.
_OUTPUT: Final = "output.weight"
_INPUT: Final = "token_embd.weight"


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that is meant: the path itself, or the only one in a folder of nothing else.

    Raises:
        UnembeddingError: If the folder holds several and no other checkpoint.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*config.json")):
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
    try:
        from gguf import GGMLQuantizationType, GGUFReader, dequantize
    except ImportError as error:
        raise UnembeddingError(
            "reading a GGUF file needs the gguf library, got none; install st-embfilter[gguf]"
        ) from error
    try:
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UnembeddingError(
            f"{path.name} must be a GGUF file, got: {error}; it is truncated or damaged"
        ) from error
    name = _OUTPUT if _OUTPUT in tensors else _INPUT
    if name not in tensors:
        raise UnembeddingError(
            f"a GGUF file must hold {_OUTPUT} or {_INPUT}, got {len(tensors)} other tensors in "
            f"{path.name}; of a split model, name the part that holds it"
        )
    tensor = tensors[name]
    kind = tensor.tensor_type
    columns, rows = (int(size) for size in tensor.shape)
    plain = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}

    def read_rows(first: int, last: int) -> Tensor:
        block = tensor.data[first:last]
        return torch.from_numpy(block.copy() if kind in plain else dequantize(block, kind))

    try:
        read_rows(0, 1)
    except NotImplementedError as error:
        raise UnembeddingError(
            f"the gguf library must be able to dequantise the embedding, got {name!r} in "
            f"{kind.name}; take the matrix from the unquantised model (unembedding=)"
        ) from error
    stored = StoredTensor(name, (rows, columns), plain.get(kind, torch.float32), read_rows)
    return stored, name == _INPUT
