"""Singular values and right singular directions of W_U, and how exact they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from st_embfilter.spectrum.band import Band

_CHUNK: Final = 128


@dataclass(frozen=True)
class Spectrum:
    """Right singular vectors and singular values of one unembedding matrix.

    Attributes:
        singular_values: (d,) float64, descending, >= 0.
        directions: (d, d) float64; row i is the right singular vector of singular value i.
        rounding: (d,) float64, measured norm |E v_i| of the Gram matrix's error E along each
            direction; None where the sums were float64 throughout.
        energy: (d,) float64, by which `float32_errors` bounds; None for a made-up spectrum.
    """

    singular_values: Tensor
    directions: Tensor
    rounding: Tensor | None = None
    energy: Tensor | None = None

    @property
    def d(self) -> int:
        """Width of the hidden state."""
        return self.singular_values.shape[0]

    def float32_errors(self) -> Tensor:
        """What float32 sums may leave along each direction, on any processor, in any order.

        The error of a sum of n products is a sum of at most n roundings, each of mean zero and at
        most u = 2^-24 of a partial sum, which |w_a| |w_b| bounds for the columns a and b of a piece
        (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"). So
        |E v|^2 is in the mean at most sum_p n u^2 |W_p|_F^2 sum_b v_b^2 |w_pb|^2 over the pieces p
        of n rows. A draw is far below it: partial sums come near |w_a| |w_b| only where all columns
        are parallel.

        Returns:
            (d,) float64 bounds of |E v_i|, E the error of the Gram matrix.
        """
        if self.energy is None:
            return torch.zeros(self.d, dtype=torch.float64)
        parts = [rows.square() @ self.energy for rows in self.directions.split(512)]
        return torch.cat(parts).sqrt() * 2.0**-24

    def projection(self, band: Band) -> Tensor:
        """The filter's matrix: the kept directions as rows, in nested order.

        Returns:
            (k, d) float32 with orthonormal rows; `embedding @ projection.T` is the filter.
        """
        return self.directions[band.indices(self.d)].to(torch.float32).contiguous()

    def subspace_error(self, band: Band) -> float:
        """Expected sine of the largest angle between this band's subspace and the exact one.

        First-order perturbation of an invariant subspace: an error E of the Gram matrix turns kept
        direction i towards dropped direction j by |v_i^T E v_j| / |s_i^2 - s_j^2|. Its root mean
        square is taken as |E v_i| |E v_j| / |E|_F, of measured norms. The result is the Frobenius
        norm over all pairs, to first order and in the mean an upper bound of the largest sine;
        where one pair with a small gap rules, the sine is that of one draw, up to 3 times as large.

        Returns:
            A value in [0, inf]; 0.0 for float64 sums, whose error is not measured.
        """
        return float(self.prefix_errors(band)[-1])

    def prefix_errors(self, band: Band) -> Tensor:
        """`subspace_error` of every narrower window of the same family, and of the band itself.

        Returns:
            (k,) float64 in [0, inf]; entry m - 1 is that of the first m directions. A small gap
            between the two sides of a window makes its value large: the subspace itself is badly
            determined there, in any arithmetic.
        """
        kept = band.indices(self.d)
        errors = torch.zeros(len(kept) + 1, dtype=torch.float64)
        if self.rounding is None:
            return errors[1:]
        squares = self.singular_values.square()
        dropped = torch.ones(self.d, dtype=torch.bool)
        dropped[kept] = False
        order = torch.cat([kept, dropped.nonzero()[:, 0]])
        squares, errors_of = squares[order], self.rounding[order].square()
        # 1 / gap^2 of row i, summed over all columns j >= m (positive terms: nothing cancels), and
        # then over the rows i < m: all pairs that a window of m directions takes apart.
        for first in range(0, len(kept), _CHUNK):
            rows = slice(first, min(first + _CHUNK, len(kept)))
            turns = (squares[rows, None] - squares[None, first:]).square_().reciprocal_()
            turns.mul_(errors_of[rows, None]).mul_(errors_of[None, first:])
            turns.diagonal().zero_()
            suffix = turns.flip(1).cumsum(1).flip(1)
            suffix = torch.nn.functional.pad(suffix, (0, 1)).triu_(1)
            errors[first:] += suffix[:, : len(errors) - first].sum(0)
        return (errors[1:] / errors_of.sum()).sqrt()

    def edge_gap(self, band: Band) -> float:
        """The smallest gap of s^2 between neighbours of which the band keeps one, over s_0^2.

        Returns:
            A value in [0, 1]; inf for a band that keeps everything.
        """
        kept = torch.zeros(self.d, dtype=torch.bool)
        kept[band.indices(self.d)] = True
        squares = self.singular_values.square()
        gaps = (squares[:-1] - squares[1:])[kept[:-1] != kept[1:]]
        return float(gaps.min() / squares[0]) if len(gaps) else math.inf
