"""From files of texts to shards of vectors."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings
from tqdm.auto import tqdm

from st_embfilter.corpus.folder import Folder, Precision, Settings, Shard, ShardWriter, Vectors
from st_embfilter.corpus.inputs import Row, Rows, find_inputs, id_type
from st_embfilter.errors import (
    BackboneError,
    CorpusError,
    MissingPackageError,
    WorkerError,
)
from st_embfilter.files.hub import model_files
from st_embfilter.model.build import load
from st_embfilter.model.fingerprint import fingerprint
from st_embfilter.model.metadata import METADATA_FILE
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.spectrum.band import Band

#: Texts, and characters, that are sorted by length and encoded together.
WINDOW: Final = 8192
_WINDOW_CHARACTERS: Final = 1 << 23

#: If the first rows are all bad, their column is probably not the one that was meant.
_HOPELESS: Final = 1000

#: Batches that a process of a pool gets at a time.
_POOL_BATCHES: Final = 8

_PRECISIONS: Final = ("float32", "float16", "int8", "binary")


@dataclass(frozen=True)
class EncodedCorpus:
    """A folder of vectors that is complete.

    Attributes:
        path: The folder.
        rows: Vectors in it.
        bad: Rows that gave none; `_bad-*.jsonl` say which and why.
    """

    path: Path
    rows: int
    bad: int


def encode_corpus(
    model: SentenceTransformer | str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    text: str = "text",
    id: str | None = None,  # noqa: A002
    dims: Sequence[float | int] = (),
    precision: Precision = "float32",
    normalize: bool = False,
    queries: bool = False,
    npy: bool = False,
    batch_size: int = 32,
    shard_rows: int = 65_536,
    devices: Sequence[str] = (),
    strict: bool = False,
    engine: str = "local",
    address: str | None = None,
    workers: tuple[int, int] = (1, 1),
    gpus: float = 0.0,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> EncodedCorpus:
    """Writes the vectors of files of texts as Parquet, shard after shard.

    A run that was interrupted goes on when it is called again, and ends with the same bytes. Memory
    holds the model and a window of texts, however large the files are.

    Args:
        model: A model, or its folder or Hub id; filtered or any other of sentence-transformers.
        inputs: Parquet, JSON Lines, CSV, TSV or text files (one text a line), the latter four also
            in .gz and .zst: paths, folders, globs or fsspec URLs.
        output: Folder of the shards: missing, empty or of a run with the same model and settings.
        text: Column of the texts; dots lead into nested ones. Text files have no columns.
        id: Column of the ids, strings or integers. None takes the number of the row, from 0.
        dims: Widths to write, as ratios in (0, 1] of the model's or as numbers; a prefix of each
            vector is written for each. Empty for all of it.
        precision: As in sentence-transformers. The ranges of int8 come from the first window.
        normalize: Scale each width to unit length.
        queries: Encode with the model's prompt for queries, not that for documents.
        npy: Write `_npy/shard-*.npy` too.
        batch_size: Texts in a batch of the model.
        shard_rows: Input rows behind a shard; bad ones are missing in it.
        devices: Where to encode; several start a process for each.
        strict: Stop at the first bad row.
        engine: "local", or "ray" for Ray Data; a cluster reads `model`, `inputs` and `output` where
            its workers run, so they must be on storage that these share.
        address: Of a Ray cluster; None starts one on this machine.
        workers: Smallest and largest number of Ray workers.
        gpus: Share of a GPU for each of them.
        trust_remote_code: Allow model code of the checkpoint to run.
        show_progress_bar: Show rate and time left.

    Raises:
        CorpusError: If the inputs cannot be read as asked.
        OutputError: If the folder cannot be written, or holds something else.
        WorkerError: If a process that encodes dies or lacks memory.
        BandError: If a width is out of range.
        BackboneError: If `model` is no sentence-transformers model.
        MissingPackageError: Without the extra `corpus` (or `ray`).
    """
    _check(batch_size, shard_rows, precision, engine)
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "encoding a corpus needs another package: pip install 'st-embfilter[corpus]'"
        ) from error
    files = tuple(find_inputs(inputs))
    settings = Settings(
        model="",
        width=0,
        inputs=files,
        text=text,
        id=id,
        id_type=id_type(files, id),
        dims=(),
        precision=precision,
        normalize=normalize,
        queries=queries,
        npy=npy,
        batch_size=batch_size,
        shard_rows=shard_rows,
        device="",
    )
    if engine == "ray":
        if isinstance(model, SentenceTransformer):
            raise CorpusError("the Ray engine needs a model's folder or Hub id, got a live model")
        from st_embfilter.corpus.cluster import encode_with_ray

        folder = encode_with_ray(
            os.fspath(model),
            settings,
            dims,
            output,
            strict=strict,
            address=address,
            workers=workers,
            gpus=gpus,
            trust_remote_code=trust_remote_code,
            show_progress_bar=show_progress_bar,
        )
    else:
        if not isinstance(model, SentenceTransformer):
            model = open_model(
                model,
                device="cpu" if len(devices) > 1 else next(iter(devices), None),
                trust_remote_code=trust_remote_code,
            )
        settings = complete(settings, model, dims, devices)
        folder = Folder(output, settings)
        with folder.opened():
            if not folder.complete:
                with Encoder(model, settings, devices).started() as encoder:
                    _encode(folder, encoder, strict, show_progress_bar)
    return EncodedCorpus(folder.path, folder.rows, folder.bad)


def _check(batch_size: int, shard_rows: int, precision: str, engine: str) -> None:
    for name, number in (("batch_size", batch_size), ("shard_rows", shard_rows)):
        if number < 1:
            raise CorpusError(f"{name} must be at least 1, got {number}")
    if precision not in _PRECISIONS:
        raise CorpusError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    if engine not in ("local", "ray"):
        raise CorpusError(f"engine must be 'local' or 'ray', got {engine!r}")


def open_model(
    source: str | os.PathLike[str], *, device: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A filtered model, or any other of sentence-transformers.

    Raises:
        BackboneError: If it is none: a language model must be filtered first.
    """
    files = model_files(source)
    if files.path(MODULES_FILE) is None:
        raise BackboneError(
            f"the model must be one of sentence-transformers (with {MODULES_FILE}), got "
            f"{os.fspath(source)}; make one of a language model with `st-embfilter build`"
        )
    if files.path(METADATA_FILE) is not None:
        return load(source, device=device, trust_remote_code=trust_remote_code)
    return SentenceTransformer(
        os.fspath(source), device=device, trust_remote_code=trust_remote_code
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
        settings: Of the run.
        devices: Several start a process for each.
    """

    def __init__(
        self, model: SentenceTransformer, settings: Settings, devices: Sequence[str] = ()
    ) -> None:
        self.model, self.settings, self._devices = model, settings, devices
        self._pool: Any = None
        self.longest = longest_text(model)

    @contextmanager
    def started(self) -> Iterator[Encoder]:
        """With its processes, if there are several devices."""
        if len(self._devices) > 1:
            self._pool = self.model.start_multi_process_pool(list(self._devices))
        try:
            yield self
        finally:
            if self._pool is not None:
                self.model.stop_multi_process_pool(self._pool)

    def __call__(self, texts: list[str]) -> dict[int, NDArray[np.float32]]:
        """Vectors of each width, (n, width)."""
        options: dict[str, Any] = {}
        order = np.arange(len(texts))
        if self._pool is not None:
            # A pool sorts within a chunk only.
            order = np.argsort([-len(text) for text in texts], kind="stable")
            texts = [texts[i] for i in order]
            size = self.settings.batch_size * _POOL_BATCHES
            options = {"pool": self._pool, "chunk_size": size}
        encode = self.model.encode_query if self.settings.queries else self.model.encode_document
        widest = self.settings.dims[0]
        try:
            found = encode(
                texts,
                batch_size=self.settings.batch_size,
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
        vectors = np.empty((len(texts), widest), np.float32)
        vectors[order] = np.asarray(found, np.float32).reshape(len(texts), -1)
        result = {width: vectors[:, :width] for width in self.settings.dims}
        if self.settings.normalize:
            for width, prefix in result.items():
                length = np.linalg.norm(prefix, axis=1, keepdims=True)
                result[width] = prefix / np.maximum(length, 1e-12)
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
        precision: Of the result.
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


def windows(
    rows: Rows, source: Iterator[Row], end: int, longest: int | None
) -> Iterator[list[Row]]:
    """Rows before number `end`, in groups whose bounds hang on nothing but where they begin."""
    window: list[Row] = []
    characters = texts = 0
    while rows.position.number < end:
        row = next(source, None)
        if row is None:
            break
        if row.text is not None:
            kept = row.text[:longest]
            row = row._replace(text=kept)
            texts, characters = texts + 1, characters + len(kept)
        elif not row.reason:
            continue
        window.append(row)
        if texts == WINDOW or characters >= _WINDOW_CHARACTERS or len(window) >= 8 * WINDOW:
            yield window
            window, characters, texts = [], 0, 0
    if window:
        yield window


def encode_shard(
    path: Path,
    encoder: Encoder,
    rows: Rows,
    source: Iterator[Row],
    number: int,
    ranges: NDArray[np.float32] | None,
    *,
    strict: bool,
    progress: Callable[[int], object] = lambda _: None,
) -> Shard | None:
    """Encodes the rows of one shard and writes its files.

    Args:
        path: Of the folder.
        encoder: The model.
        rows: At the shard's first row, or before blank lines in front of it.
        source: `iter(rows)`.
        number: Of the shard.
        ranges: Of int8.
        strict: Stop at the first bad row.
        progress: Called with the number of rows after each window.

    Returns:
        None if there are no rows left, unless it is the first shard.
    """
    settings = encoder.settings
    writer = ShardWriter(path, settings, number, rows.position)
    try:
        for window in windows(rows, source, (number + 1) * settings.shard_rows, encoder.longest):
            good = [row for row in window if row.text is not None]
            for row in window:
                if row.text is None:
                    _reject(writer, row, strict)
            if good:
                vectors = encoder([row.text for row in good if row.text is not None])
                arrays = quantized(vectors, settings.precision, ranges)
                checked = arrays if settings.precision == "float16" else vectors
                fine = np.isfinite(checked[settings.dims[0]]).all(axis=1)
                if not fine.all():
                    for i in np.flatnonzero(~fine):
                        _reject(writer, good[i]._replace(reason="not finite"), strict)
                    good = [row for row, is_fine in zip(good, fine.tolist(), strict=True) if is_fine]
                    arrays = {width: array[fine] for width, array in arrays.items()}
            if good:
                writer.write([row.id for row in good], arrays)
            elif number == 0 and not writer.rows and writer.bad >= _HOPELESS:
                raise CorpusError(
                    f"the first {writer.bad:,} rows of {settings.inputs[0].url} hold no text in "
                    f"{settings.text!r}: {window[0].reason}; is that the column you mean?"
                )
            progress(len(window))
        like = quantized(
            {width: np.empty((0, width), np.float32) for width in settings.dims},
            settings.precision,
            ranges,
        )
        if number and rows.position.number == writer.start.number:
            return None
        return writer.close(rows.position, like)
    except BaseException:
        writer.abort()
        raise


def _reject(writer: ShardWriter, row: Row, strict: bool) -> None:
    url = writer.settings.inputs[row.file].url
    if strict:
        raise CorpusError(
            f"rows must be fit to encode, got row {row.place} of {url}: {row.reason}; without "
            "strict, bad rows are passed over"
        )
    writer.reject({"row": row.number, "input": url, "input_row": row.place, "reason": row.reason})


def calibrate(encoder: Encoder) -> NDArray[np.float32] | None:
    """Ranges of int8: of the first window; None for other precisions.

    Raises:
        CorpusError: If it holds fewer than two texts.
    """
    settings = encoder.settings
    if settings.precision != "int8":
        return None
    rows = Rows(settings.inputs, text=settings.text, id=settings.id)
    for window in windows(rows, iter(rows), settings.shard_rows, encoder.longest):
        texts = [row.text for row in window if row.text is not None]
        if not texts:
            continue
        vectors = np.concatenate(list(encoder(texts).values()), axis=1)
        vectors = vectors[np.isfinite(vectors).all(axis=1)]
        if len(vectors) < 2:
            break
        return np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    raise CorpusError("int8 needs at least two texts at the beginning, for the ranges of values")


def _encode(folder: Folder, encoder: Encoder, strict: bool, show_progress_bar: bool) -> None:
    """The engine of one machine: shard after shard."""
    settings = folder.settings
    if folder.ranges is None and (ranges := calibrate(encoder)) is not None:
        folder.set_ranges(ranges)
    rows = Rows(settings.inputs, text=settings.text, id=settings.id)
    source = iter(rows)
    with progress_bar(show_progress_bar) as bar:

        def progress(count: int) -> None:
            done = max(1, rows.consumed) / max(1, sum(file.size for file in settings.inputs))
            bar.total = max(bar.n + count, round((bar.n + count) / done))
            bar.update(count)

        for number in itertools.count():
            shard = folder.shards.get(number)
            if shard is not None:
                rows = Rows(settings.inputs, text=settings.text, id=settings.id, start=shard.end)
                source = iter(rows)
                bar.initial = bar.n = shard.end.number
                continue
            with folder.working():
                shard = encode_shard(
                    folder.path,
                    encoder,
                    rows,
                    source,
                    number,
                    folder.ranges,
                    strict=strict,
                    progress=progress,
                )
            if shard is None:
                break
            folder.add(shard)
    folder.finish()


@contextmanager
def progress_bar(show: bool) -> Iterator[Any]:
    """A bar of texts with rate and time left."""
    with tqdm(unit="text", desc="Encoding", disable=None if show else True) as bar:
        yield bar
