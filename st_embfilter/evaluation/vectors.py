"""Every text is encoded once: raw vectors in memory and, if wanted, on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from st_embfilter.errors import BackboneError, EmbedFilterError, OutputError
from st_embfilter.files.staging import check_file
from st_embfilter.model.fingerprint import fingerprint
from st_embfilter.text import progress_bar, reading

Vectors = NDArray[np.float32]

#: Texts that are encoded, and stored, at a time: what an interruption can cost.
CHUNK: Final = 1024


class Encoder(Protocol):
    """What a task needs: texts to vectors."""

    def encode(
        self, texts: Sequence[str], *, method: str = "encode", prompt: str | None = None
    ) -> Vectors:
        """Vectors (n, k) float32 of texts.

        Args:
            texts: Texts, in any order, with repetitions.
            method: "encode", "encode_query" or "encode_document".
            prompt: Prefix that the method is asked to use, None for the model's own.
        """
        ...


class VectorStore:
    """Vectors of an unfiltered model; encodes only what it has not seen.

    On disk there is one file for each chunk of texts. Its name is a hash of the texts, its folder a
    hash of the model, so nothing is ever out of date, and an interrupted run goes on where it was.

    Args:
        model: The unfiltered model.
        cache: Folder for the vectors, None to keep them in memory only.
        batch_size: Texts in a batch of the model.
        show_progress_bar: Show a bar while encoding.

    Raises:
        OutputError: If the cache cannot be written.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        cache: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.encoded = 0
        self.chunk = CHUNK
        self._folder = None if cache is None else Path(cache) / fingerprint(model)[:32]
        if self._folder is not None:
            check_file(self._folder / "vectors.npy")
        self._memory: dict[str, Vectors] = {}

    @property
    def width(self) -> int | None:
        """Dimensions of a vector, where the model says so."""
        dimension: Callable[[], int | None] = getattr(
            self.model, "get_embedding_dimension", lambda: None
        )
        return dimension()

    def encode(
        self, texts: Sequence[str], *, method: str = "encode", prompt: str | None = None
    ) -> Vectors:
        """Raw vectors (n, d) float32 of texts; see `Encoder`.

        Raises:
            EmbedFilterError: If a vector is not finite; the message shows the text.
        """
        key = text_key(texts, method, prompt)
        if key not in self._memory:
            # Longest first, as sentence-transformers does inside a call, so that chunks of similar
            # length waste little on padding.
            unique = sorted(dict.fromkeys(texts), key=len, reverse=True)
            place = {text: i for i, text in enumerate(unique)}
            vectors = self._encode_unique(unique, method, prompt)
            self._memory[key] = vectors[[place[text] for text in texts]]
        return self._memory[key]

    def seen(self, size: int, seed: int = 0) -> Vectors:
        """A random sample (at most `size`) of the vectors in memory."""
        rows = np.concatenate([self._memory[key] for key in sorted(self._memory)])
        if len(rows) <= size:
            return rows
        return rows[np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False))]

    def forget(self) -> None:
        """Frees the memory; what is on disk stays."""
        self._memory.clear()

    def _encode_unique(self, texts: list[str], method: str, prompt: str | None) -> Vectors:
        parts = []
        with progress_bar(
            "Encoding", "text", len(texts), show=self.show_progress_bar, leave=False
        ) as bar:
            for first in range(0, len(texts), self.chunk):
                chunk = texts[first : first + self.chunk]
                vectors = self._vectors(chunk, method, prompt)
                parts.append(vectors)
                bar.update(len(chunk))
        return np.concatenate(parts)

    def _vectors(self, texts: list[str], method: str, prompt: str | None) -> Vectors:
        """The vectors of one chunk of different texts, stored or encoded."""
        file = None
        if self._folder is not None:
            file = self._folder / f"{text_key(texts, method, prompt)}.npy"
            stored = read(file, len(texts), self.width)
            if stored is not None:
                return stored
        with reading("the model", BackboneError, "embed texts"):
            vectors: Vectors = np.asarray(
                getattr(self.model, method)(
                    texts,
                    prompt=prompt,
                    batch_size=self.batch_size,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                ),
                dtype=np.float32,
            )
        self.encoded += len(texts)
        check_finite(vectors, texts)
        if file is not None:
            write(file, vectors)
        return vectors


def check_finite(vectors: Vectors, texts: Sequence[str]) -> None:
    """Checks vectors (n, ..) of n texts.

    Raises:
        EmbedFilterError: Shows the first text with NaN or Inf.
    """
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise EmbedFilterError(
            "embeddings must be finite, got NaN or Inf for the text "
            f"{texts[int(bad.argmax())][:60]!r}; try another dtype for the backbone"
        )


def text_key(texts: Sequence[str], method: str = "encode", prompt: str | None = None) -> str:
    """Hash of texts and of how they are encoded, which names their vectors."""
    return _hash([method, prompt, *texts])


def _hash(parts: Iterable[str | None]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(f"{-1 if part is None else len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def read(file: Path, rows: int, width: int | None) -> Vectors | None:
    """Stored vectors; None if they are not there, or damaged: they are then encoded again.

    Args:
        file: A file of `numpy.save`.
        rows: Number of texts.
        width: Dimensions of a vector, where they are known.
    """
    if not file.is_file():
        return None
    try:
        stored: Vectors = np.load(file, allow_pickle=False)
        whole = stored.dtype == np.float32 and stored.shape == (rows, width or stored.shape[-1])
        return stored if whole and bool(np.isfinite(stored).all()) else None
    except Exception:  # numpy evaluates the header, and fails in many ways
        return None


def write(file: Path, vectors: Vectors) -> None:
    """Stores vectors; the file appears complete or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as stream:
            try:
                np.save(stream, vectors)
                stream.close()
                os.replace(stream.name, file)
            except BaseException:
                Path(stream.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(f"cannot write to the cache of vectors: {error}") from error
