"""An unembedding matrix W_U that was found: its blocks, its spectrum, its hash."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from st_embfilter.files.stored import StoredTensor
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import PIECE_ROWS, Precision, spectrum_of
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.text import progress_bar

logger = logging.getLogger(__name__)

#: Called with (bytes done, bytes in all) after each block that is read.
Progress = Callable[[int, int], None]

_BLOCK_BYTES: Final = 64 * 2**20
_LARGE_BYTES: Final = 32 * 2**20


@dataclass(frozen=True)
class Provenance:
    """Which unembedding matrix a filter was made from.

    Attributes:
        tensor: Name of the tensor in the checkpoint.
        shape: (V, d).
        dtype: Stored dtype, e.g. "bfloat16".
        tied: Whether the model shares it with its input embedding.
        sha256: Hash of the tensor's stored bytes, row by row, little-endian.
        model_id: Hub id, or the name of a local folder; None for a bare tensor.
        revision: Commit hash on the Hub, where known.
        gguf_sha256: Hash of the GGUF file of that name, if the model was made from one.
    """

    tensor: str
    shape: tuple[int, int]
    dtype: str
    tied: bool
    sha256: str
    model_id: str | None = None
    revision: str | None = None
    gguf_sha256: str | None = None


@dataclass(frozen=True)
class Unembedding:
    """A found unembedding matrix that can be streamed.

    Attributes:
        stored: The matrix.
        tied: Whether the model shares it with its input embedding.
        model_id: Hub id, or the name of a local folder; None for a bare tensor.
        revision: Commit hash on the Hub, where known.
        gguf_sha256: Hash of the GGUF file of that name, if the model was made from one.
        gain: g, (d,) float64, of the norm before it, if it is to be folded in: the spectrum is then
            that of W_U diag(g).
    """

    stored: StoredTensor
    tied: bool = False
    model_id: str | None = None
    revision: str | None = None
    gguf_sha256: str | None = None
    gain: Tensor | None = None

    @property
    def d(self) -> int:
        """Width of the hidden state."""
        return self.stored.shape[1]

    def blocks(
        self, rows: int | None = None, *, seen: Callable[[Tensor], object] | None = None
    ) -> Iterator[Tensor]:
        """Row blocks in order, each read while the one before is worked on.

        Args:
            rows: Rows of a block; by default as many as fill 64 MiB in float64.
            seen: Called with each block in order, in the thread that reads.

        Yields:
            (n, d) tensors in the stored dtype, on the CPU.
        """
        total = self.stored.shape[0]
        rows = rows or max(256, _BLOCK_BYTES // (8 * self.d))
        spans = [(first, min(first + rows, total)) for first in range(0, total, rows)]

        def read(first: int, last: int) -> Tensor:
            block = self.stored.read_rows(first, last)
            if seen is not None:
                seen(block)
            return block

        with ThreadPoolExecutor(1, thread_name_prefix="read-unembedding") as reader:
            upcoming = reader.submit(read, *spans[0])
            for span in [*spans[1:], None]:
                block = upcoming.result()
                if span is not None:
                    upcoming = reader.submit(read, *span)
                yield block
                del block  # two are in memory, not three

    def folded_blocks(self) -> Iterator[Tensor]:
        """Row blocks of W_U diag(g) in float64, of W_U where no gain is folded in."""
        for block in self.blocks():
            wide = block.to(torch.float64)
            yield wide if self.gain is None else wide * self.gain

    def fit(
        self,
        band: Band | None = None,
        *,
        precision: Precision | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> tuple[Spectrum, Provenance]:
        """Spectrum and provenance, in one pass over the matrix.

        Args:
            band: The band that must be exact.
            precision: Arithmetic inside a block, see `spectrum_of`. By default "auto" for matrices
                stored in 16 bits or less with more than 32 MiB, and "float64" for all others and
                for remote ones, which "auto" may have to read twice.
            device: Where the products are computed.
            progress: Called after each block.
        """
        digest = hashlib.sha256()
        passes = 0

        def hashed_blocks() -> Iterator[Tensor]:
            nonlocal passes
            passes += 1
            done = 0
            hashing = (lambda block: digest.update(_bytes(block))) if passes == 1 else None
            for block in self.blocks(seen=hashing):
                if self.gain is None:
                    yield block
                else:  # in pieces, for a block of 16 bits takes four times the memory in float64
                    yield from (p.to(torch.float64) * self.gain for p in block.split(PIECE_ROWS))
                done += block.nbytes
                del block
                if progress is not None:
                    progress(done, self.stored.nbytes)

        if precision is None:
            large = self.stored.nbytes > _LARGE_BYTES
            quick = large and self.stored.dtype.itemsize <= 2 and not self.stored.remote
            precision = "auto" if quick else "float64"
        spectrum = spectrum_of(hashed_blocks, self.d, band=band, precision=precision, device=device)
        if passes > 1:
            logger.info("float32 blocks were not exact enough for this band; summed in float64")
        return spectrum, self._provenance(digest.hexdigest())

    def provenance(self, dtype: torch.dtype | None = None) -> Provenance:
        """Provenance alone: one pass that only hashes.

        Args:
            dtype: Hash the matrix as if stored in this dtype, where it loses nothing: so a model
                that was loaded in a wider one hashes as its checkpoint does.
        """
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(_bytes(block if dtype is None else _narrowed(block, dtype)))
        return self._provenance(digest.hexdigest())

    def made_as(self, made_from: Provenance, found: Provenance | None = None) -> Provenance:
        """Provenance to hold against that of a filter, hashed in the dtype that it was made from.

        Args:
            made_from: Provenance of the filter.
            found: That of this matrix, if it was read before; it is read again only where the dtype
                may make the difference.
        """
        dtype = getattr(torch, made_from.dtype, None)
        if found is not None and (
            found.sha256 == made_from.sha256 or dtype in (None, self.stored.dtype)
        ):
            return found
        return self.provenance(dtype)

    @contextmanager
    def progress_bar(self, show: bool) -> Iterator[Progress]:
        """A bar for one `fit`, where a person watches."""
        with progress_bar(
            f"Spectrum of {self.stored.name}", "B", self.stored.nbytes, show=show, scaled=True
        ) as bar:
            yield lambda done, total: bar.update(max(0, done - bar.n))

    def _provenance(self, sha256: str) -> Provenance:
        return Provenance(
            tensor=self.stored.name,
            shape=self.stored.shape,
            dtype=str(self.stored.dtype).removeprefix("torch."),
            tied=self.tied,
            sha256=sha256,
            model_id=self.model_id,
            revision=self.revision,
            gguf_sha256=self.gguf_sha256,
        )


def unembedding_of_tensor(weight: Tensor, name: str = "weight") -> Unembedding:
    """An unembedding matrix given as a tensor (V, d)."""
    return Unembedding(StoredTensor.of(name, weight))


def _narrowed(block: Tensor, dtype: torch.dtype) -> Tensor:
    if block.dtype == dtype:
        return block
    cast = block.to(dtype)
    return cast if torch.equal(cast.to(block.dtype), block) else block


def _bytes(block: Tensor) -> memoryview:
    return memoryview(cast("Any", block.contiguous().view(torch.uint8).numpy())).cast("B")
