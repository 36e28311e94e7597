"""The spectrum of an unembedding matrix, and the bands of it that a filter keeps.

Pure linear algebra on tensors: no Hub, no transformers. Source of the method: arXiv 2606.07502,
section 4. W_U (V, d) is not centred; W_U = U S V^T with singular values in descending order. A
filter needs only V, so the spectrum is taken from the Gram matrix W_U^T W_U = V S^2 V^T, summed
over row blocks: O(d^2) memory instead of O(V d), and a fraction of the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import torch
from scipy import linalg
from scipy.linalg import blas
from torch import Tensor

from st_embfilter.errors import PrecisionError, UnembeddingError
from st_embfilter.spectrum.band import Band

Precision = Literal["auto", "float32", "float64"]

#: What float32 blocks may cost before "auto" recomputes in float64: the estimate of
#: `Spectrum.subspace_error`, a bound of the sine of the largest principal angle. At the width of
#: 4,096 the estimate was measured as 3.4 times the sine.
FLOAT32_TOLERANCE: Final = 1e-4

_RUN_ROWS: Final = 8192
_PROBES: Final = 4
_PROBE_EVERY: Final = 8
_PIECE_ROWS: Final = 128


@dataclass(frozen=True)
class Spectrum:
    """Right singular vectors and singular values of one unembedding matrix.

    Attributes:
        singular_values: (d,) float64, descending, >= 0.
        directions: (d, d) float64; row i is the right singular vector of singular value i.
        rounding: Measured root mean square error of one entry of the Gram matrix (0.0 where the
            sums were float64 throughout).
    """

    singular_values: Tensor
    directions: Tensor
    rounding: float = 0.0

    @property
    def d(self) -> int:
        """Width of the hidden state."""
        return self.singular_values.shape[0]

    def projection(self, band: Band) -> Tensor:
        """The filter's matrix: the kept directions as rows, in nested order.

        Returns:
            (k, d) float32 with orthonormal rows; `embedding @ projection.T` is the filter.
        """
        return self.directions[band.indices(self.d)].to(torch.float32).contiguous()

    def subspace_error(self, band: Band) -> float:
        """Expected sine of the largest angle between this band's subspace and the exact one.

        First-order perturbation of an invariant subspace: an error E of the Gram matrix turns kept
        direction i towards dropped direction j by |v_i^T E v_j| / |s_i^2 - s_j^2|. The measured
        rounding error stands for every |v_i^T E v_j|; the result is the Frobenius norm over all
        pairs, an upper bound of the largest sine to first order.

        Returns:
            A value in [0, inf]; 0.0 for float64 sums, whose error is not measured.
        """
        if self.rounding == 0.0:
            return 0.0
        kept = torch.zeros(self.d, dtype=torch.bool)
        kept[band.indices(self.d)] = True
        squares = self.singular_values.square()
        gaps = squares[kept][:, None] - squares[~kept][None, :]
        return float(self.rounding * gaps.abs().reciprocal().square().sum().sqrt())


class GramAccumulator:
    """Sums W^T W over row blocks.

    The sum itself is always float64. With float32 blocks, runs of `_RUN_ROWS` rows are summed in
    float32 for speed and then added to it; the rounding error is measured on every eighth run
    against float64 products with random probe vectors.

    Args:
        d: Number of columns of W.
        block_dtype: torch.float32 or torch.float64, the arithmetic inside a block.
        device: Where the products are computed.
    """

    def __init__(
        self,
        d: int,
        *,
        block_dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows = 0
        self.block_dtype = block_dtype
        self.device = torch.device(device)
        self._sum = torch.zeros((d, d), dtype=torch.float64, device=self.device)
        exact = block_dtype == torch.float64
        self._run = self._sum if exact else torch.zeros_like(self._sum, dtype=block_dtype)
        self._run_rows = 0
        self._runs = 0
        self._measured = 0
        self._squared_error = 0.0
        self._probes = _sign_probes(d)
        self._action = torch.zeros_like(self._probes)
        self._converted = torch.empty((0, d), dtype=block_dtype, device=self.device)
        self._piece = torch.empty((_PIECE_ROWS, d), dtype=torch.float64)

    @property
    def d(self) -> int:
        """Number of columns."""
        return self._sum.shape[0]

    def update(self, block: Tensor) -> None:
        """Adds block^T block.

        Args:
            block: (n, d), any floating dtype.

        Raises:
            PrecisionError: If the sums overflow the block dtype.
            UnembeddingError: If the block holds NaN or Inf; the message names the first such row.
        """
        if block.ndim != 2 or block.shape[1] != self.d:
            raise UnembeddingError(
                f"every block of W_U must have shape (n, {self.d}), got {tuple(block.shape)}"
            )
        # The float32 sum of a run starts anew with its first block.
        exact = self.block_dtype == torch.float64
        _add_gram(self._run, self._convert(block), fresh=not exact and self._run_rows == 0)
        if not bool(torch.isfinite(self._run.diagonal()).all()):
            raise self._not_finite(block)
        self.rows += block.shape[0]
        if exact:
            return
        if self._runs % _PROBE_EVERY == 0:
            self._probe(block)
        self._run_rows += block.shape[0]
        if self._run_rows >= _RUN_ROWS:
            self._end_run()

    def spectrum(self) -> Spectrum:
        """The eigendecomposition of the sum, which it takes the memory of: call it once.

        Raises:
            UnembeddingError: If fewer rows than columns were seen, or the matrix is all zero.
        """
        if self.rows < self.d:
            raise UnembeddingError(
                "an unembedding matrix needs at least as many rows (tokens) as columns (hidden "
                f"size), got shape ({self.rows}, {self.d}); check that this is the output embedding"
            )
        if self._run_rows > 0:
            self._end_run()
        gram, rounding = self._sum, self._rounding()
        del self._sum, self._run, self._converted, self._piece
        # Of the negated sum, the ascending order is the spectrum's descending one, and no d x d
        # matrix has to be turned around.
        eigenvalues, directions = _eigh(gram.neg_())
        squares = eigenvalues.neg_()
        if float(squares[0]) <= 0.0:
            raise UnembeddingError(
                "the unembedding matrix is all zero, so it has no directions to keep; check that "
                "the checkpoint holds trained weights"
            )
        return Spectrum(
            singular_values=squares.clamp(min=0.0).sqrt(),
            directions=_fix_signs(directions),
            rounding=rounding,
        )

    def _convert(self, block: Tensor) -> Tensor:
        """The block in the arithmetic's dtype, in memory that is used again for each."""
        if block.dtype == self.block_dtype:
            return block.to(self.device)
        if self._converted.shape[0] < block.shape[0]:
            self._converted = self._converted.new_empty(block.shape)
        return self._converted[: block.shape[0]].copy_(block)

    def _probe(self, block: Tensor) -> None:
        """Adds the exact action of the block's Gram matrix on the probes, in cached pieces."""
        for part in block.to("cpu").split(_PIECE_ROWS):
            rows = self._piece[: part.shape[0]].copy_(part)
            self._action.addmm_(self._probes @ rows.T, rows)

    def _not_finite(self, block: Tensor) -> UnembeddingError:
        bad = ~torch.isfinite(block.float() if block.dtype.itemsize < 4 else block).all(dim=1)
        if bool(bad.any()):
            row = self.rows + int(bad.nonzero()[0])
            return UnembeddingError(
                f"the unembedding matrix must be finite, got NaN or Inf first in row {row} (token "
                f"id {row}); the checkpoint is damaged or was trained to divergence"
            )
        return PrecisionError(
            "the squares of the unembedding matrix must fit its arithmetic, got an overflow of "
            f"{str(self.block_dtype).removeprefix('torch.')}; use precision='float64'"
        )

    def _end_run(self) -> None:
        if self._runs % _PROBE_EVERY == 0:
            self._measured += 1
            self._squared_error += self._squared_error_of(self._run)
            self._action.zero_()
        for first in range(0, self.d, _PIECE_ROWS):  # the lower triangle
            last = first + _PIECE_ROWS
            self._sum[first:last, :last] += self._run[first:last, :last]
        self._run_rows = 0
        self._runs += 1

    def _squared_error_of(self, run: Tensor) -> float:
        """|E|_F^2 of a run's error E: the mean of |x E|^2 over random signs x (Hutchinson)."""
        action = torch.zeros_like(self._action)
        for first in range(0, self.d, _PIECE_ROWS):  # the lower triangle stands for both
            last = min(first + _PIECE_ROWS, self.d)
            rows = run[first:last, :last].to("cpu", torch.float64).tril_(first)
            action[:, :last].addmm_(self._probes[:, first:last], rows)
            action[:, first:last].addmm_(self._probes[:, :last], rows.tril_(first - 1).T)
        return float((action - self._action).square().sum()) / _PROBES

    def _rounding(self) -> float:
        if self._measured == 0:
            return 0.0
        # Errors of different runs are independent, so their squares add up.
        return math.sqrt(self._squared_error * self._runs / self._measured) / self.d


def spectrum_of(
    blocks: Callable[[], Iterable[Tensor]],
    d: int,
    *,
    band: Band | None = None,
    precision: Precision = "float64",
    device: torch.device | str = "cpu",
) -> Spectrum:
    """The spectrum of a matrix that is given as row blocks.

    Args:
        blocks: Called for each pass over the matrix; yields (n, d) row blocks in order.
        d: Number of columns.
        band: The band that "auto" must get right.
        precision: "float64"; "float32" inside blocks; or "auto": float32, and float64 if the
            measured rounding error would turn the band by more than `FLOAT32_TOLERANCE`.
        device: Where the products are computed.

    Raises:
        UnembeddingError: If the matrix is not finite, all zero, or has fewer rows than columns.
    """
    first = torch.float64 if precision == "float64" else torch.float32
    with _one_torch_thread():
        try:
            spectrum = _accumulate(blocks(), d, first, device)
            if precision != "auto" or spectrum.subspace_error(band or Band()) <= FLOAT32_TOLERANCE:
                return spectrum
        except PrecisionError:
            if precision != "auto":
                raise
        return _accumulate(blocks(), d, torch.float64, device)


def spectrum_of_weight(weight: Tensor, *, rows_per_block: int = 8192) -> Spectrum:
    """The spectrum of a matrix in memory, in float64.

    Args:
        weight: W_U, (V, d), any floating dtype.
        rows_per_block: Rows that are converted to float64 at a time.
    """
    if weight.ndim != 2:
        raise UnembeddingError(f"W_U must have shape (V, d), got {tuple(weight.shape)}")
    return spectrum_of(lambda: weight.detach().split(rows_per_block), weight.shape[1])


def _accumulate(
    blocks: Iterable[Tensor], d: int, dtype: torch.dtype, device: torch.device | str
) -> Spectrum:
    gram = GramAccumulator(d, block_dtype=dtype, device=device)
    for block in blocks:
        gram.update(block)
    return gram.spectrum()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Leaves the cores to BLAS: torch's threads spin on them after each small step of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _add_gram(total: Tensor, block: Tensor, *, fresh: bool = False) -> None:
    """Adds block^T block to the total, or puts it in its place.

    On the CPU only the lower triangle, by BLAS syrk: half the work.
    """
    beta = 0.0 if fresh else 1.0
    if block.device.type != "cpu":
        total.addmm_(block.T, block, beta=beta)
        return
    syrk = blas.ssyrk if block.dtype == torch.float32 else blas.dsyrk
    # The transposes of C-ordered arrays are the Fortran-ordered ones that BLAS wants, uncopied;
    # the upper triangle in Fortran order is the lower one in C order.
    rows, sums = block.contiguous().numpy().T, total.numpy().T
    syrk(1.0, rows, beta=beta, c=sums, lower=0, overwrite_c=1)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors as rows, of the lower triangle; on the CPU.

    On the CPU the matrix is overwritten: LAPACK's divide and conquer puts the vectors there.
    """
    if gram.device.type != "cpu":
        values, vectors = torch.linalg.eigh(gram, UPLO="L")
        return values.cpu(), vectors.T.contiguous().cpu()
    # As in `_add_gram`: the transpose has Fortran order, and its upper triangle is the lower one.
    values, columns = linalg.eigh(
        gram.numpy().T, lower=False, overwrite_a=True, check_finite=False, driver="evd"
    )
    return torch.from_numpy(values), torch.from_numpy(columns.T).contiguous()


def _sign_probes(d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (_PROBES, d), generator=generator).to(torch.float64) * 2 - 1


def _fix_signs(directions: Tensor) -> Tensor:
    """Makes the first entry of (nearly) largest magnitude of each row positive, in place.

    "Nearly" keeps exact ties, e.g. rows of +-1/sqrt(d), independent of the last bits.
    """
    for rows in directions.split(512):
        magnitude = rows.abs()
        candidate = magnitude >= magnitude.amax(dim=1, keepdim=True) * 0.999
        first = candidate.to(torch.uint8).argmax(dim=1, keepdim=True)
        rows.mul_(torch.where(rows.gather(1, first) < 0, -1.0, 1.0))
    return directions
