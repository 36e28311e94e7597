"""One shard's work, which every engine does in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from st_embfilter.corpus.encoder import Encoder, quantized
from st_embfilter.corpus.inputs import Row, Rows
from st_embfilter.corpus.shard import Shard, ShardWriter
from st_embfilter.errors import CorpusError

#: Texts, and characters, that are sorted by length and encoded together.
WINDOW: Final = 8192
_WINDOW_CHARACTERS: Final = 1 << 23

#: If the first rows are all bad, their column is probably not the one that was meant.
_HOPELESS: Final = 1000


def windows(
    rows: Rows, source: Iterator[Row], end: int, longest: int | None
) -> Iterator[list[Row]]:
    """Rows before number `end`, in groups whose bounds hang on nothing but where they begin."""
    window: list[Row] = []
    characters = texts = 0
    while rows.number < end:
        row = next(source, None)
        if row is None:
            break
        if row.text is not None:
            length = len(row.text)
            if longest is not None and length > longest:
                row, length = row._replace(text=row.text[:longest]), longest
            texts, characters = texts + 1, characters + length
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
        path: The output folder.
        encoder: The model.
        rows: At the shard's first row, or before blank lines in front of it.
        source: `iter(rows)`.
        number: The shard's number, from 0.
        ranges: Lowest and highest value of each dimension, for int8.
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
                odd = set(np.argwhere(~np.isfinite(checked[settings.dims[0]]))[:, 0].tolist())
                if odd:
                    for i in sorted(odd):
                        _reject(writer, good[i]._replace(reason="vector not finite"), strict)
                    kept = [i for i in range(len(good)) if i not in odd]
                    good = [good[i] for i in kept]
                    arrays = {width: array[kept] for width, array in arrays.items()}
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
        if number and rows.number == writer.start.number:
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
