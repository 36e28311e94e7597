"""The spectrum of an unembedding matrix, and the bands of it that a filter keeps.

Pure linear algebra on tensors: no Hub, no transformers. Source of the method: arXiv 2606.07502,
section 4. W_U (V, d) is not centred; W_U = U S V^T with singular values in descending order. A
filter needs only V, so the spectrum is taken from the Gram matrix W_U^T W_U = V S^2 V^T, summed
over row blocks: O(d^2) memory instead of O(V d), and a fraction of the arithmetic.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations_with_replacement, pairwise
from typing import Final, Literal

import numpy as np
import torch
from scipy import linalg
from threadpoolctl import threadpool_limits
from torch import Tensor

from st_embfilter.errors import DegenerateEdgeWarning, PrecisionError, UnembeddingError
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.spectrum import Spectrum

Precision = Literal["auto", "float32", "float64"]

#: What float32 products may cost before "auto" recomputes in float64: the estimate of
#: `Spectrum.subspace_error`, a bound of the sine of the largest principal angle.
FLOAT32_TOLERANCE: Final = 1e-4
#: The same for every narrower window that the nested order allows, with three times the estimate:
#: one pair of neighbours with a small gap rules there, and its error is one draw, not a mean.
#: Largest sine over all prefixes measured: 1.3e-4 (Qwen2.5-0.5B), 2.4e-4 (SmolLM2-135M).
PREFIX_TOLERANCE: Final = 1e-3

#: An entry of at least this part of the largest magnitude may decide the sign of a direction.
NEARLY: Final = 0.999

#: Rows that are multiplied at once. Blocks of a multiple of it give the same sums.
PIECE_ROWS: Final = 1024

_TILE_COLUMNS: Final = 256
_PROBES: Final = 4
_PROBE_EVERY: Final = 8
_PROBE_ROWS: Final = 128

# The number of BLAS threads belongs to the process: one fit at a time changes it.
_threads_lock = threading.Lock()


class GramAccumulator:
    """Sums W^T W over row blocks.

    The sum itself is always float64. With float32 blocks, pieces of `PIECE_ROWS` rows are
    multiplied in float32 for speed and then added to it; the rounding error is measured on every
    eighth piece against float64 products with random probe vectors.

    On the CPU the lower triangle is cut into tiles. A tile is computed by one worker with one BLAS
    thread, and pieces are added in order, so the number of workers does not touch the bits.

    Args:
        d: Number of columns of W.
        block_dtype: torch.float32 or torch.float64, the arithmetic inside a piece.
        device: Where the products are computed.
        pool: Workers for the CPU's tiles; None for the calling thread alone.
    """

    def __init__(
        self,
        d: int,
        *,
        block_dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self.rows = 0
        self.block_dtype = block_dtype
        self.device = torch.device(device)
        self._sum = torch.zeros((d, d), dtype=torch.float64, device=self.device)
        self._energy = torch.zeros(d, dtype=torch.float64, device=self.device)
        self._pieces = 0
        self._measured_rows = 0
        self._errors: list[Tensor] = []
        self._probes = _sign_probes(d)
        self._map = map if pool is None else pool.map
        self._converted = torch.empty((PIECE_ROWS, d), dtype=block_dtype, device=self.device)
        self._spans = _spans(d, _TILE_COLUMNS)
        # The large tiles first: no worker is left alone with one at the end.
        tiles = combinations_with_replacement(reversed(self._spans), 2)
        self._tiles = sorted(tiles, key=lambda tile: tile[0] is tile[1])

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
        for piece in block.split(PIECE_ROWS):
            squares = self._sum.diagonal().neg()
            self._add(piece)
            # No entry of a Gram matrix is above the largest of its diagonal.
            if not bool((self._sum.diagonal() <= torch.finfo(self.block_dtype).max).all()):
                raise self._not_finite(piece)
            squares += self._sum.diagonal()
            self._energy += squares.mul(squares.sum() * len(piece))
            self.rows += len(piece)

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
        gram = self._sum
        del self._sum, self._converted
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
            rounding=self._rounding(directions),
            energy=self._energy.cpu(),
        )

    def _rounding(self, directions: Tensor) -> Tensor | None:
        if not self._errors:
            return None
        # |E v|^2 is the mean of (x E v)^2 over random signs x (Hutchinson). The errors of different
        # pieces are independent, so their squares add up.
        along = torch.cat(self._errors) @ directions.T
        share = self.rows / self._measured_rows
        return (along.square().sum(0) * (share / _PROBES)).sqrt()

    def _add(self, piece: Tensor) -> None:
        rows = piece.to(self.device) if piece.dtype == self.block_dtype else self._convert(piece)
        measured = self.block_dtype == torch.float32 and self._pieces % _PROBE_EVERY == 0
        self._pieces += 1
        action = torch.zeros_like(self._probes)
        if self.device.type == "cpu":
            total, columns = self._sum.numpy(), rows.contiguous().numpy()
            probes = self._probes.numpy() if measured else None
            done = self._map(
                lambda tile: _add_tile(total, columns, tile[0], tile[1], probes), self._tiles
            )
            for (i, j), shares in zip(self._tiles, done, strict=True):
                for span, share in zip((j, i), shares, strict=False):
                    action[:, span] += torch.from_numpy(share)
        else:
            product = rows.T @ rows
            self._sum += product
            if measured:
                action = self._probes @ product.to("cpu", torch.float64)
        if measured:
            for exact in self._map(self._exact_action, piece.split(_PROBE_ROWS)):
                action -= exact
            self._errors.append(action)
            self._measured_rows += piece.shape[0]

    def _convert(self, piece: Tensor) -> Tensor:
        """The piece in the arithmetic's dtype, in memory that is used again for each."""
        converted = self._converted[: piece.shape[0]]
        parts = zip(converted.split(_PROBE_ROWS), piece.split(_PROBE_ROWS), strict=True)
        for _ in self._map(lambda pair: pair[0].copy_(pair[1]), parts):
            pass
        return converted

    def _exact_action(self, rows: Tensor) -> Tensor:
        exact = rows.to("cpu", torch.float64).numpy()
        return torch.from_numpy((self._probes.numpy() @ exact.T) @ exact)

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
        band: The band that "auto" must get right; None for half of the bulk, and no warning.
        precision: "float64"; "float32" inside blocks; or "auto": float32, and float64 if the
            measured rounding error would turn the band by more than `FLOAT32_TOLERANCE`, or any
            prefix of it by more than `PREFIX_TOLERANCE`.
        device: Where the products are computed.

    On the CPU the result is the same, bit for bit, for every number of threads; other fits wait, as
    the BLAS of the whole process has one thread meanwhile. Float64 leaves an error of the Gram
    matrix of at most about d eps s_0^2: a window whose edge has the gap g = |s_i^2 - s_j^2| is
    right to a sine of d eps s_0^2 / g, and no arithmetic in float64 promises more.

    Warns:
        DegenerateEdgeWarning: If that exceeds `FLOAT32_TOLERANCE` at the edge of the given band.

    Raises:
        UnembeddingError: If the matrix is not finite, all zero, or has fewer rows than columns.
    """
    first = torch.float64 if precision == "float64" else torch.float32
    with _workers() as pool:
        try:
            spectrum = _accumulate(blocks(), d, first, device, pool)
            enough = precision != "auto" or _is_enough(spectrum, band or Band())
        except PrecisionError:
            if precision != "auto":
                raise
            enough = False
        if not enough:
            spectrum = _accumulate(blocks(), d, torch.float64, device, pool)
    if band is not None:
        _warn_of_degenerate_edge(spectrum, band)
    return spectrum


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
    blocks: Iterable[Tensor],
    d: int,
    dtype: torch.dtype,
    device: torch.device | str,
    pool: ThreadPoolExecutor,
) -> Spectrum:
    gram = GramAccumulator(d, block_dtype=dtype, device=device, pool=pool)
    for block in blocks:
        gram.update(block)
    return gram.spectrum()


def _is_enough(spectrum: Spectrum, band: Band) -> bool:
    errors = spectrum.prefix_errors(band)
    return bool(errors[-1] <= FLOAT32_TOLERANCE and 3 * errors.max() <= PREFIX_TOLERANCE)


def _warn_of_degenerate_edge(spectrum: Spectrum, band: Band) -> None:
    gap = spectrum.edge_gap(band)
    # What float64 sums and their eigenvectors can tell apart: an error of the Gram matrix of
    # d eps s_0^2 (Weyl; Higham, "Accuracy and Stability", 3.5) turns the edge by that over the gap.
    error = spectrum.d * torch.finfo(torch.float64).eps
    if error > gap * FLOAT32_TOLERANCE:
        warnings.warn(
            f"the directions at the edge of the window {band} of {band.width(spectrum.d)} have "
            f"(nearly) equal singular values, relative gap of their squares {gap:.1e}: which of "
            "them are kept is arbitrary; choose another keep or band",
            DegenerateEdgeWarning,
            stacklevel=3,
        )


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch had threads; torch and BLAS have one thread meanwhile.

    BLAS splits its sums by its number of threads, and its threads, like torch's, spin on the cores
    between small steps: with another busy process beside it they were measured 40 times slower.
    """
    with _threads_lock, threadpool_limits(1, user_api="blas"):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="gram") as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)


def _spans(length: int, longest: int) -> list[slice]:
    """Equal spans that cover a length, but for one."""
    count = -(-length // longest)
    edges = [length * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def _add_tile(
    total: np.ndarray, rows: np.ndarray, i: slice, j: slice, probes: np.ndarray | None
) -> list[np.ndarray]:
    """Adds one tile of rows^T rows to the total; i >= j.

    Returns:
        With probes (p, d): their products with the tile, (p, width of j), and, off the diagonal,
        with its mirror image, (p, width of i), float64.
    """
    with np.errstate(all="ignore"):  # what is not finite shows on the diagonal
        tile = rows[:, i].T @ rows[:, j]
        if i is j or probes is not None:
            tile = tile.astype(np.float64, copy=False)
        if i is j and rows.dtype == np.float32:
            # Sums of squares only grow, so their errors lean to one side and add up over the
            # pieces: 98% of |E|_F^2 of two language models lay here.
            np.fill_diagonal(tile, np.square(rows[:, i], dtype=np.float64).sum(axis=0))
        total[i, j] += tile
        if probes is None:
            return []
        actions = [probes[:, i] @ tile]
        return actions if i is j else [*actions, probes[:, j] @ tile.T]


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


def signs(rows: Tensor, nearly: float = NEARLY) -> Tensor:
    """The sign by which a direction is told from its negative.

    That of the first entry of (nearly) largest magnitude. "Nearly" keeps exact ties, e.g. rows of
    +-1/sqrt(d), independent of the last bits.

    Args:
        rows: (n, d).
        nearly: Share of the largest magnitude from which an entry counts as the largest.

    Returns:
        (n, 1), each 1.0 or -1.0.
    """
    magnitude = rows.abs()
    candidate = magnitude >= magnitude.amax(dim=1, keepdim=True) * nearly
    first = candidate.to(torch.uint8).argmax(dim=1, keepdim=True)
    return torch.where(rows.gather(1, first) < 0, -1.0, 1.0).to(rows.dtype)


def _fix_signs(directions: Tensor) -> Tensor:
    """Gives each row its sign, in place."""
    for rows in directions.split(512):
        rows.mul_(signs(rows))
    return directions
