"""Baking a filter into the weights: the rotation, and a matrix's rows after it, block by block.

With the gains of the norms folded into the linear layers and the residual stream rotated by V in
nested order, a model's logits stay and its pooled state is the filtered embedding at full width:
its first k numbers are the filter of width k, in every runtime. See `bake` for the algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import spectrum_of
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.unembedding.residual import check_gain, rotated_columns

#: Values of a matrix that are worked on at a time.
BLOCK_VALUES: Final = 2**20

#: Reads rows [start, stop) of a matrix.
ReadRows = Callable[[int, int], Tensor]


def row_spans(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows, first and one after the last, of about `BLOCK_VALUES` values each."""
    step = max(1, BLOCK_VALUES // columns)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def folded_spectrum(read_rows: ReadRows, shape: tuple[int, int], gain: Tensor) -> Spectrum:
    """The spectrum of W_U diag(g), in float64.

    Args:
        read_rows: Reads rows of W_U.
        shape: (V, d).
        gain: g, (d,), of the norm before it.

    Raises:
        UnembeddingError: If a gain is zero, or W_U is unfit.
    """
    check_gain(gain)
    wide = gain.to(torch.float64)

    def blocks() -> Iterator[Tensor]:
        for first, last in row_spans(*shape):
            yield read_rows(first, last).to(torch.float64) * wide

    return spectrum_of(blocks, shape[1])


def rotation_of(spectrum: Spectrum, band: Band) -> Tensor:
    """Every singular direction once, those of the band first and in nested order.

    Returns:
        R, (d, d) float64, orthogonal; R n is the filtered state at full width.
    """
    return spectrum.directions[rotation_order(band, spectrum.d)]


def rotation_order(band: Band, d: int) -> Tensor:
    """The singular direction at every place of a rotated state, (d,): nested, then the rest."""
    kept = band.at(d - (band.offset or 0)).indices(d)
    rest = torch.ones(d, dtype=torch.bool)
    rest[kept] = False
    return torch.cat([kept, rest.nonzero()[:, 0]])


def reading_rows(
    read_rows: ReadRows, shape: tuple[int, int], rotation: Tensor, gain: Tensor | None = None
) -> Iterator[Tensor]:
    """The rows of W diag(gain) R^T, of a matrix W that reads the stream, in blocks."""
    for first, last in row_spans(*shape):
        yield rotated_columns(read_rows(first, last), rotation, gain)


def writing_rows(read_rows: ReadRows, shape: tuple[int, int], rotation: Tensor) -> Iterator[Tensor]:
    """The rows of R W, of a matrix W that adds to the stream, in blocks.

    Each of them hangs on all rows of W, which is in memory once, in the dtype that it is read in.
    """
    matrix = torch.empty(shape, dtype=read_rows(0, 1).dtype)
    for first, last in row_spans(*shape):
        matrix[first:last] = read_rows(first, last)
    for first, last in row_spans(*shape):
        parts = matrix.split(max(1, BLOCK_VALUES // shape[0]), dim=1)
        yield torch.cat([rotation[first:last] @ part.to(rotation.dtype) for part in parts], dim=1)
