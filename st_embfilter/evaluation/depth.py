"""Pooled vectors after every block, from one encoding."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from st_embfilter.errors import DepthError, OutputError
from st_embfilter.evaluation.vectors import (
    Vectors,
    VectorStore,
    check_finite,
    read,
    text_key,
    write,
)
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.depth import block_stack, final_norm
from st_embfilter.model.fingerprint import fingerprint
from st_embfilter.model.layer import FEATURE

#: Texts that are encoded, and stored at all depths, at a time: what memory must hold.
CHUNK: Final = 512

#: Largest relative difference between what is read after the last block and the output.
_TOLERANCE: Final = 1e-3


class DepthStore:
    """Raw vectors at several depths; a text is encoded once for all of them.

    The final norm is applied after each block, and pooled there, so that nothing but pooled vectors
    is ever kept. On disk there is one file for each chunk of texts, depth and pooling.

    Args:
        model: The unfiltered model, Transformer and Pooling.
        layers: Depths to keep, from 0 (the token embeddings) to the number of blocks.
        cache: Folder for the vectors; None for a temporary one.
        batch_size: Texts in a batch of the model.
        show_progress_bar: Show a bar while encoding.

    Raises:
        DepthError: If the model's blocks or final norm cannot be found, or it has fewer blocks.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        layers: Sequence[int],
        *,
        cache: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self._taps = _Taps(model)
        total = len(self._taps.blocks)
        if not layers or not set(layers) <= set(range(total + 1)):
            raise DepthError(f"layers must be from 0 to {total}, got {list(layers)}")
        self.layers = sorted(set(layers), reverse=True)
        if cache is None:
            cache = tempfile.mkdtemp(prefix="st-embfilter-")
            weakref.finalize(self, shutil.rmtree, cache, ignore_errors=True)
        self.folder = Path(cache) / f"{fingerprint(model)[:32]}-depth"

    @property
    def poolings(self) -> list[str]:
        """Poolings that are collected: "own", and "lasttoken" beside a mean over all tokens."""
        return list(self._taps.poolings)

    def at(self, layers: int, pooling: str = "own") -> VectorStore:
        """The vectors after this many blocks."""
        return _AtDepth(self, layers, pooling)

    def file(self, key: str, layers: int, pooling: str) -> Path:
        """Where a chunk's vectors lie: (n, d) float32.

        Args:
            key: Key of its texts, see `text_key`.
            layers: Number of blocks.
            pooling: One of `poolings`.
        """
        return self.folder / f"{pooling}-{layers}" / f"{key}.npy"

    def collect(self, texts: list[str], method: str, prompt: str | None) -> None:
        """Encodes one chunk and writes the files of all depths."""
        key = text_key(texts, method, prompt)
        with self._taps.pooled(self.layers) as model:
            wide = np.asarray(
                getattr(model, method)(
                    texts,
                    prompt=prompt,
                    batch_size=self.batch_size,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                ),
                dtype=np.float32,
            )
        check_finite(wide, texts)
        names = [(n, pooling) for n in self.layers for pooling in self.poolings]
        parts = wide.reshape(len(texts), len(names), -1)
        for i, (layers, pooling) in enumerate(names):
            write(self.file(key, layers, pooling), np.ascontiguousarray(parts[:, i]))


class _AtDepth(VectorStore):
    """One depth of a `DepthStore`."""

    def __init__(self, depths: DepthStore, layers: int, pooling: str) -> None:
        super().__init__(depths.model, show_progress_bar=depths.show_progress_bar)
        self.chunk = CHUNK
        self._depths, self._layers, self._pooling = depths, layers, pooling

    def _vectors(self, texts: list[str], method: str, prompt: str | None) -> Vectors:
        file = self._depths.file(text_key(texts, method, prompt), self._layers, self._pooling)
        stored = read(file, len(texts), self.width)
        if stored is None:
            self._depths.collect(texts, method, prompt)
            self.encoded += len(texts)
            stored = read(file, len(texts), self.width)
        if stored is None:
            raise OutputError(f"a cache must give back what is written to it, got none of {file}")
        return stored


class _Taps:
    """Reads a model after every block, through its final norm and its pooling."""

    def __init__(self, model: SentenceTransformer) -> None:
        modules = list(model.children())
        if len(modules) != 2 or not isinstance(modules[1], Pooling):
            raise DepthError(
                "depths are read of Transformer > Pooling, got "
                + " > ".join(type(module).__name__ for module in modules)
            )
        self.model, self.transformer, pooling = model, modules[0], modules[1]
        self.width = pooling.embedding_dimension
        self.poolings: dict[str, nn.Module] = {"own": pooling}
        if type(pooling) is Pooling and pooling.pooling_mode == "mean":
            self.poolings["lasttoken"] = Pooling(self.width, "lasttoken")
        backbone = backbone_model(model)
        self.blocks = list(block_stack(backbone)[1])
        self.norm = final_norm(backbone)

    @contextmanager
    def pooled(self, layers: Sequence[int]) -> Iterator[SentenceTransformer]:
        """A model whose embeddings are those of all depths and poolings side by side."""
        found: dict[int, Tensor] = {}
        features: dict[str, Any] = {}
        wanted = {*layers, len(self.blocks)}

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            features.clear()
            found.clear()
            features.update(args[0] if args else kwargs["features"])
            if features["input_ids"].ndim != 2:
                raise DepthError(
                    "depths are read in one pass of the model, got a recipe of several passes; use "
                    "another prompt"
                )

        def pool(number: int, hidden: Tensor) -> None:
            if number in wanted:
                if hidden.ndim != 3 or hidden.shape[-1] != self.width:
                    raise DepthError(
                        f"reading between blocks needs states (n, tokens, {self.width}), got "
                        f"{tuple(hidden.shape)} after {number} blocks; read all of its layers"
                    )
                states = {**features, "token_embeddings": self.norm(hidden)}
                pooled = [p(dict(states))[FEATURE].float() for p in self.poolings.values()]
                found[number] = torch.cat(pooled, dim=-1)

        def enter(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            pool(0, args[0] if args else kwargs["hidden_states"])

        def leave(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                pool(number, output if isinstance(output, Tensor) else output[0])

            return hook

        hooks: list[Any] = [
            self.transformer.register_forward_pre_hook(begin, with_kwargs=True),
            self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        ]
        hooks += [b.register_forward_hook(leave(i)) for i, b in enumerate(self.blocks, 1)]
        side_by_side = _SideBySide(self.poolings["own"], found, len(self.blocks), layers)
        model = SentenceTransformer(
            modules=[self.transformer, side_by_side],
            device=str(self.model.device),
            prompts={name: text for name, text in self.model.prompts.items() if text is not None},
            default_prompt_name=self.model.default_prompt_name,
        )
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()


class _SideBySide(nn.Module):
    """Replaces the embedding by what was read at all depths."""

    def __init__(
        self, pooling: nn.Module, found: dict[int, Tensor], total: int, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.pooling, self.found, self.total, self.layers = pooling, found, total, layers

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        own: Tensor = self.pooling(dict(features))[FEATURE].float()
        read_last = self.found[self.total][:, : own.shape[-1]]
        if not torch.allclose(own, read_last, _TOLERANCE, _TOLERANCE * float(own.abs().max())):
            raise DepthError(
                "what is read after the last block must be the output, got another; this model "
                "does more after its blocks than its final norm"
            )
        return {**features, FEATURE: torch.cat([self.found[n] for n in self.layers], dim=-1)}
