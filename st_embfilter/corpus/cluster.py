"""The same shards on a cluster: Ray Data schedules, restarts and scales the workers.

The driver counts the rows of the inputs, so that shards are known before they are read. Each is one
row of a dataset, which an actor that holds the model turns into files and a line for the journal. A
shard that is lost with its worker is made again, with the same bytes and names.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from st_embfilter import errors
from st_embfilter.corpus.encoder import Encoder, complete, open_model
from st_embfilter.corpus.folder import Folder
from st_embfilter.corpus.inputs import MARKS, Input, Position, Rows, index_rows
from st_embfilter.corpus.shard import Settings, Shard
from st_embfilter.corpus.work import calibrate, encode_shard
from st_embfilter.errors import (
    EmbedFilterError,
    MissingPackageError,
    ProvenanceError,
    WorkerError,
)
from st_embfilter.model.fingerprint import fingerprint
from st_embfilter.text import progress_bar
from st_embfilter.unembedding.source import Source

#: How often a shard is made again after its worker has died. Ray itself would never give up, though
#: a shard that needs more memory than there is kills every worker.
_RETRIES: Final = 3

#: How often a worker is started again. Ray would go on for ever where memory is too short to load
#: the model; a run that ends goes on with the same command.
_RESTARTS: Final = 16


def encode_with_ray(
    source: Source,
    settings: Settings,
    dims: Sequence[float | int],
    output: str | os.PathLike[str],
    *,
    strict: bool,
    address: str | None,
    workers: tuple[int, int],
    gpus: float,
    show_progress_bar: bool,
) -> Folder:
    """Encodes on a Ray cluster; see `encode_corpus`."""
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "the Ray engine needs another package: pip install 'st-embfilter[ray]'"
        ) from error
    started = not ray.is_initialized()
    here = started and address is None
    if started:
        where = {"address": "local", "include_dashboard": False} if here else {"address": address}
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    try:
        return _run(source, settings, dims, output, strict, here, workers, gpus, show_progress_bar)
    except ray.exceptions.RayError as error:
        raise _reason(error) from error
    finally:
        if started:
            ray.shutdown()


def _run(
    source: Source,
    settings: Settings,
    dims: Sequence[float | int],
    output: str | os.PathLike[str],
    strict: bool,
    here: bool,
    workers: tuple[int, int],
    gpus: float,
    show_progress_bar: bool,
) -> Folder:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, as ours
    # The driver of a cluster may have no GPU, nor the memory for the model. On this machine it has
    # both, and saves a process that would import everything.
    looks = here and not gpus
    # Without retries: Ray would repeat one that lacks memory for ever.
    look = ray.remote(num_gpus=gpus, max_retries=0)(_look)
    asked = (source, settings, dims, None if gpus else "cpu")
    settings, _ = _look(*asked) if looks else ray.get(look.remote(*asked))
    folder = Folder(output, settings)
    with folder.opened():
        if folder.complete:
            return folder
        if settings.precision == "int8" and folder.ranges is None:
            asked = (source, settings, settings.dims, None if gpus else "cpu")
            _, ranges = ray.get(look.remote(*asked, measure=True))
            folder.set_ranges(ranges)
        files = [(file, settings.text, settings.id) for file in settings.inputs]
        index = ray.remote(index_rows)
        counted = (
            [index_rows(*file) for file in files]
            if looks
            else ray.get([index.remote(*file) for file in files])
        )
        starts = shard_starts(settings.inputs, counted, settings.shard_rows)
        todo = [
            {"number": number, "start": json.dumps(asdict(start))}
            for number, start in enumerate(starts)
            if number not in folder.shards
        ]
        with progress_bar("Encoding", "text", show=show_progress_bar) as bar, folder.working():
            bar.total = sum(count for count, _ in counted)
            bar.initial = bar.n = sum(s.end.number - s.start.number for s in folder.shards.values())
            if todo:
                shards = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
                    _Worker,
                    fn_constructor_args=(source, settings, folder.ranges, folder.path, strict),
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(min_size=workers[0], max_size=workers[1]),
                    num_gpus=gpus,
                    num_cpus=1,
                    max_restarts=_RESTARTS,
                    max_task_retries=_RETRIES,
                )
                try:
                    for row in shards.iter_rows():
                        line = json.loads(row["shard"])
                        if "error" in line:
                            kind = getattr(errors, line["error"], errors.OutputError)
                            raise kind(line["message"])
                        shard = Shard.of_json(line)
                        folder.add(shard)
                        bar.update(shard.end.number - shard.start.number)
                except ray.exceptions.RayError as error:
                    raise _reason(error) from error
        folder.finish()
    return folder


def _look(
    source: Source,
    settings: Settings,
    dims: Sequence[float | int],
    device: str | None,
    measure: bool = False,
) -> tuple[Settings, NDArray[np.float32] | None]:
    """What the model tells: the settings that need it and, if measured, the ranges of int8."""
    model = open_model(source, device)
    settings = complete(settings, model, dims)
    return settings, calibrate(Encoder(model, settings)) if measure else None


def shard_starts(
    inputs: Sequence[Input], counted: Sequence[tuple[int, list[int]]], shard_rows: int
) -> list[Position]:
    """Where each shard begins, or at most some rows before that.

    Args:
        inputs: The files.
        counted: What `index_rows` found, one for each input.
        shard_rows: Input rows behind a shard.
    """
    starts = []
    first = 0
    for i, (count, marks) in enumerate(counted):
        number = -(-first // shard_rows) * shard_rows
        for start in range(number, first + count, shard_rows):
            row = start - first
            if not marks:
                starts.append(Position(start, i, row))
            else:
                mark = row // MARKS
                starts.append(Position(first + mark * MARKS, i, mark * MARKS, marks[mark]))
        first += count
    return starts or [Position()]


class _Worker:
    """Holds the model; makes shards."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        ranges: NDArray[np.float32] | None,
        path: Path,
        strict: bool,
    ) -> None:
        model = open_model(source)
        if fingerprint(model) != settings.model:
            raise ProvenanceError(
                f"every worker must find the same model and libraries, got another {source.name}"
            )
        self._encoder = Encoder(model, settings)
        self._ranges, self._path, self._strict = ranges, path, strict

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        settings = self._encoder.settings
        lines = []
        for number, start in zip(batch["number"].tolist(), batch["start"], strict=True):
            place = Position(**json.loads(start))
            rows = Rows(settings.inputs, text=settings.text, id=settings.id, start=place)
            found = iter(rows)
            while rows.number < number * settings.shard_rows:
                next(found)
            try:
                shard = encode_shard(
                    self._path,
                    self._encoder,
                    rows,
                    found,
                    number,
                    self._ranges,
                    strict=self._strict,
                )
                assert shard is not None  # noqa: S101  # the rows were counted
                lines.append(json.dumps(asdict(shard)))
            except (EmbedFilterError, OSError) as error:  # Ray would turn it into text
                kind = type(error).__name__ if isinstance(error, EmbedFilterError) else ""
                reason = f"cannot write {self._path}: {getattr(error, 'strerror', None) or error}"
                lines.append(json.dumps({"error": kind, "message": str(error) if kind else reason}))
        return {"shard": lines}


def _reason(error: BaseException) -> EmbedFilterError:
    """The error of ours inside one of Ray's."""
    import ray

    inner: BaseException | None = error
    died = memory = False
    while inner is not None:
        if isinstance(inner, EmbedFilterError):
            return inner
        died |= isinstance(inner, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError)
        memory |= isinstance(inner, ray.exceptions.OutOfMemoryError | MemoryError)
        inner = getattr(inner, "cause", None) or inner.__cause__
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if died or memory:
        what = "lacked memory" if memory else "died, also when its work was tried again"
        return WorkerError(
            f"a worker {what} ({last:.300}); if memory is short, fewer workers or a smaller batch "
            "size help"
        )
    return WorkerError(f"Ray gave up: {last:.300}")
