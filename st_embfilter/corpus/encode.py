"""From files of texts to shards of vectors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sentence_transformers import SentenceTransformer

from st_embfilter.corpus.encoder import Encoder, complete, open_model
from st_embfilter.corpus.folder import Folder
from st_embfilter.corpus.inputs import Rows, find_inputs, id_type
from st_embfilter.corpus.shard import Precision, Settings
from st_embfilter.corpus.work import calibrate, encode_shard
from st_embfilter.errors import CorpusError, MissingPackageError
from st_embfilter.text import progress_bar
from st_embfilter.unembedding.source import Source

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
    model: SentenceTransformer | str | os.PathLike[str] | Source,
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
        precision: Number type of sentence-transformers' `encode`. The ranges of int8 come from
            the first window.
        normalize: Scale each width to unit length.
        queries: Encode with the model's prompt for queries, not that for documents.
        npy: Write `_npy/shard-*.npy` too.
        batch_size: Texts in a batch of the model.
        shard_rows: Input rows behind a shard; bad ones are missing in it.
        devices: Where to encode; several start a process for each.
        strict: Stop at the first bad row.
        engine: "local", or "ray" for Ray Data; a cluster reads `model`, `inputs` and `output` where
            its workers run, so they must be on storage that these share.
        address: Address of a Ray cluster; None starts one on this machine.
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
            Source.of(model, trust_remote_code=trust_remote_code),
            settings,
            dims,
            output,
            strict=strict,
            address=address,
            workers=workers,
            gpus=gpus,
            show_progress_bar=show_progress_bar,
        )
    else:
        if not isinstance(model, SentenceTransformer):
            source = Source.of(model, trust_remote_code=trust_remote_code)
            model = open_model(source, "cpu" if len(devices) > 1 else next(iter(devices), None))
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


def _encode(folder: Folder, encoder: Encoder, strict: bool, show_progress_bar: bool) -> None:
    """The engine of one machine: shard after shard."""
    settings = folder.settings
    if folder.ranges is None and (ranges := calibrate(encoder)) is not None:
        folder.set_ranges(ranges)
    rows = Rows(settings.inputs, text=settings.text, id=settings.id)
    source = iter(rows)
    with progress_bar("Encoding", "text", show=show_progress_bar) as bar:

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
