"""Heads stored in 8 bits with scales: multiplied out row by row. Packed ones are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from st_embfilter.errors import UnembeddingError
from st_embfilter.files.stored import StoredTensor
from st_embfilter.files.tensors import Checkpoint

#: Tensors beside an 8-bit "weight" that it is multiplied by, and the factor on top: block scales of
#: fine-grained FP8, scales of compressed-tensors and others, row maxima of bitsandbytes.
_SCALES: Final = {"weight_scale_inv": 1.0, "weight_scale": 1.0, "SCB": 1 / 127}

#: Tensors that stand for a weight of fewer bits: GPTQ and AWQ, compressed-tensors, bitsandbytes.
_PACKED: Final = (
    "qweight",
    "weight_packed",
    "weight.absmax",
    "weight.quant_map",
    "weight_zero_point",
)


def dequantized(checkpoint: Checkpoint, name: str, block: tuple[int, int]) -> StoredTensor:
    """The matrix of that name in a floating dtype: as stored, or times its scales in float32.

    Args:
        checkpoint: The named tensors.
        name: Name of the matrix.
        block: Rows and columns that share a scale where the scales are a grid of blocks.

    Raises:
        UnembeddingError: If it is packed, or 8-bit integers without scales that fit.
    """
    check_not_packed([name], checkpoint.names)
    stored = checkpoint.tensor(name)
    if stored.dtype.itemsize > 1:
        return stored
    stem = name.removesuffix("weight")
    for key, factor in _SCALES.items():
        if stem + key in checkpoint.names:
            scales = checkpoint.tensor(stem + key)
            grid = scales.read_rows(0, scales.shape[0]).to(torch.float32) * factor
            return _scaled(stored, grid, block)
    if stored.dtype == torch.int8:
        raise UnembeddingError(
            f"an unembedding matrix of 8-bit integers needs scales ({stem}SCB or "
            f"{stem}weight_scale), got {name!r} without; use an unquantised checkpoint"
        )
    return stored


def check_not_packed(names: Iterable[str], keys: frozenset[str]) -> None:
    """Checks that no weight of these names is stored in packed form.

    Raises:
        UnembeddingError: Says which tensor shows it, and where to get the matrix instead.
    """
    for name in names:
        stem = name.removesuffix("weight")
        for suffix in _PACKED:
            if stem + suffix in keys:
                raise UnembeddingError(
                    "the unembedding matrix must be stored unquantised or in 8 bits with scales, "
                    f"got the packed {stem + suffix!r}; take it from the unquantised model "
                    "(unembedding=)"
                )


def _scaled(stored: StoredTensor, scales: Tensor, block: tuple[int, int]) -> StoredTensor:
    rows, columns = stored.shape
    row_size = _cell(rows, scales.shape[0], block[0])
    column_size = _cell(columns, scales.shape[1], block[1])
    if row_size is None or column_size is None:
        raise UnembeddingError(
            f"the scales of {stored.name!r} of shape {stored.shape} must be one for all, one a row "
            f"or a grid of blocks, got shape {tuple(scales.shape)}; use an unquantised checkpoint"
        )
    across = torch.arange(columns) // column_size

    def read_rows(first: int, last: int) -> Tensor:
        down = torch.arange(first, last) // row_size
        return stored.read_rows(first, last).to(torch.float32) * scales[down][:, across]

    return replace(stored, dtype=torch.float32, read_rows=read_rows)


def _cell(size: int, scales: int, block: int) -> int | None:
    """How many neighbours share a scale."""
    if -(-size // block) == scales:
        return block
    return size // scales if size % scales == 0 else None
