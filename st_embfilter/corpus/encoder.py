"""A model as the corpus sees it: texts to vectors of several widths, in a precision."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import quantize_embeddings

from st_embfilter.corpus.shard import Precision, Settings, Vectors
from st_embfilter.errors import BackboneError, WorkerError
from st_embfilter.model.find import find_filter
from st_embfilter.model.fingerprint import fingerprint
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.saved.load import load
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.unit import unit_rows
from st_embfilter.unembedding.source import Source

#: Batches that a process of a pool gets at a time.
_POOL_BATCHES: Final = 8

#: Smallest batch of a table of static vectors, which pads nothing: the same vectors, sooner.
_STATIC_BATCH: Final = 1024


def open_model(source: Source, device: str | None = None) -> SentenceTransformer:
    """A filtered model, or any other of sentence-transformers.

    Raises:
        BackboneError: If it is none: a language model must be filtered first.
    """
    if find_filter(source) is not None:
        return load(source, device=device)
    if source.files.path(MODULES_FILE) is None:
        raise BackboneError(
            f"the model must be one of sentence-transformers (with {MODULES_FILE}), got "
            f"{source.name}; make one of a language model with `st-embfilter build`"
        )
    return SentenceTransformer(
        source.name,
        device=device,
        trust_remote_code=source.trust_remote_code,
        **source.for_sentence_transformers(),
    )


def complete(
    settings: Settings,
    model: SentenceTransformer,
    dims: Sequence[float | int],
    devices: Sequence[str] = (),
) -> Settings:
    """Settings with what only the loaded model knows."""
    width = model.get_embedding_dimension()
    if width is None:
        width = int(model.encode(["a"], show_progress_bar=False).shape[1])
    widths = {Band(keep=keep).width(width) for keep in dims} or {width}
    kind = torch.device(devices[0]).type if devices else model.device.type
    return replace(
        settings,
        model=fingerprint(model),
        width=width,
        dims=tuple(sorted(widths, reverse=True)),
        device=f"pool:{kind}" if len(devices) > 1 else kind,
    )


class Encoder:
    """Texts to vectors of each width, in float32.

    Args:
        model: The model.
        settings: The run's settings.
        devices: Several start a process for each.
    """

    def __init__(
        self, model: SentenceTransformer, settings: Settings, devices: Sequence[str] = ()
    ) -> None:
        self.model, self.settings, self._devices = model, settings, devices
        self._pool: Any = None
        self.longest = longest_text(model)
        static = isinstance(next(model.children(), None), StaticEmbedding)
        self._batch = max(settings.batch_size, _STATIC_BATCH if static else 1)

    @contextmanager
    def started(self) -> Iterator[Encoder]:
        """With its processes, if there are several devices."""
        if len(self._devices) > 1:
            self._pool = self._start()
        try:
            yield self
        finally:
            if self._pool is not None:
                self.model.stop_multi_process_pool(self._pool)

    def _start(self) -> Any:
        return self.model.start_multi_process_pool(list(self._devices))

    def __call__(self, texts: list[str]) -> dict[int, NDArray[np.float32]]:
        """Vectors of each width, (n, width)."""
        options: dict[str, Any] = {}
        order = None
        if self._pool is not None:
            # A pool sorts within a chunk only.
            order = np.argsort([-len(text) for text in texts], kind="stable")
            texts = [texts[i] for i in order]
            size = self._batch * _POOL_BATCHES
            options = {"pool": self._pool, "chunk_size": size}
        encode = self.model.encode_query if self.settings.queries else self.model.encode_document
        widest = self.settings.dims[0]
        try:
            found = encode(
                texts,
                batch_size=self._batch,
                truncate_dim=widest,
                convert_to_numpy=True,
                show_progress_bar=False,
                **options,
            )
        except (RuntimeError, MemoryError) as error:  # as torch and sentence-transformers say it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WorkerError(
                f"encoding stopped: {reason:.200}; if memory is short, a smaller batch size helps"
            ) from error
        vectors = np.asarray(found, np.float32).reshape(len(texts), -1)
        if order is not None:
            vectors = vectors[np.argsort(order)]
        result = {width: vectors[:, :width] for width in self.settings.dims}
        if self.settings.normalize:
            for width, prefix in result.items():
                result[width] = unit_rows(prefix)
        return result


def longest_text(model: SentenceTransformer) -> int | None:
    """Characters that the model can read of a text: its tokens times the longest one.

    What lies behind is cut off before tokenization, which needs a hundred times a text's memory.
    """
    tokens = model.max_seq_length
    vocabulary = getattr(model.tokenizer, "get_vocab", None)
    if tokens is None or not math.isfinite(tokens) or vocabulary is None:
        return None
    return int(tokens) * max(map(len, vocabulary()))


def quantized(
    vectors: Mapping[int, NDArray[np.float32]],
    precision: Precision,
    ranges: NDArray[np.float32] | None,
) -> dict[int, Vectors]:
    """Vectors of each width in a precision.

    Args:
        vectors: Width to array (n, width).
        precision: Number type of the result.
        ranges: (2, sum of widths) float32, for int8.
    """
    if precision == "float32":
        return dict(vectors)
    if precision == "float16":
        with np.errstate(over="ignore"):  # infinite ones are found by the caller
            return {width: array.astype(np.float16) for width, array in vectors.items()}
    result: dict[int, Vectors] = {}
    start = 0
    for width, array in vectors.items():
        mine = None if ranges is None else ranges[:, start : start + width]
        result[width] = np.asarray(quantize_embeddings(array, precision, ranges=mine))
        start += width
    return result
