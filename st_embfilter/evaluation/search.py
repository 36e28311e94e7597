"""Which window of the spectrum, and which depth: scanned on development data, judged on other data.

The paper leaves asymmetric windows and earlier layers open. The best of many looks better on the
data that chose it than it is, so what counts is the score on data that had no say.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from st_embfilter.errors import BandError, DataError, DepthError
from st_embfilter.evaluation.baselines import Configuration
from st_embfilter.evaluation.sweep import RawModel, sweep
from st_embfilter.evaluation.tasks import Task
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.depth import block_stack
from st_embfilter.saved.results import Result
from st_embfilter.spectrum.band import Band


@dataclass(frozen=True)
class WindowSearch:
    """The outcome of a search.

    Attributes:
        band: The chosen window; `from_causal_lm(..., band=band)` builds it.
        scan: Rows of every window and of the raw model on the development tasks, at every depth.
        held_out: Rows of raw, of the paper's window at the same width, and of the chosen window on
            the held-out tasks; with all blocks and, if another depth was chosen, at that depth.
        windows: Number of windows that were tried.
        layers: The chosen number of blocks; None if depth was not searched.
        depths: Number of depths that were tried.
    """

    band: Band
    scan: list[Result]
    held_out: list[Result]
    windows: int
    layers: int | None = None
    depths: int = 1

    @property
    def warning(self) -> str:
        """What to keep in mind, with the figures."""
        tried = f"{self.windows} windows"
        paper = f"the paper's window of the same width has {self._gain(self.held_out, 'bulk')}"
        if self.layers is not None:
            tried += f" at {self.depths} depths"
            paper += f" there, and {self._gain(self.held_out, 'bulk', whole=True)} after all blocks"
        return (
            f"The best of {tried} was chosen by its development score, "
            f"{self._gain(self.scan)} against raw, which flatters it. Trust the held-out figure: "
            f"{self._gain(self.held_out)}, where {paper}."
        )

    def _gain(self, rows: Sequence[Result], name: str | None = None, *, whole: bool = False) -> str:
        """Mean difference to the raw model with all its blocks, x 100, with its sign."""
        wanted = str(self.band) if name is None else name
        depth = max((row.layers or 0 for row in rows), default=0) if whole else self.layers
        gains = [
            row.delta or 0.0
            for row in rows
            if (row.configuration, row.dims, row.layers) == (wanted, self.band.keep, depth)
        ]
        return f"{100 * float(np.mean(gains)):+.2f}"


def windows(
    d: int, offsets: Sequence[int] | None = None, widths: Sequence[int] | None = None
) -> list[Band]:
    """All windows of these offsets and widths that fit.

    Args:
        d: Width of the raw embeddings.
        offsets: First kept directions; None for steps of d/16.
        widths: Numbers of directions; None for steps of d/8.

    Raises:
        BandError: If none fits.
    """
    offsets = range(0, d, max(1, d // 16)) if offsets is None else offsets
    widths = range(max(1, d // 8), d + 1, max(1, d // 8)) if widths is None else widths
    found = [
        Band("offset", width, offset=offset)
        for width in widths
        for offset in offsets
        if offset + width <= d
    ]
    if not found:
        raise BandError(
            f"offset + width must be at most {d} for one window at least, got offsets "
            f"{list(offsets)} and widths {list(widths)}"
        )
    return found


def search_window(
    raw: RawModel,
    development: Sequence[Task],
    held_out: Sequence[Task],
    *,
    offsets: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    layers: Sequence[int] | Literal["all"] | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> WindowSearch:
    """Chooses the window, and if wanted the depth, with the best mean score on development tasks.

    Args:
        raw: The unfiltered model.
        development: Tasks that choose.
        held_out: Tasks that judge; none of them may be among the development tasks.
        offsets: First kept directions to try, see `windows`.
        widths: Widths to try, see `windows`.
        layers: Depths to try, each with every window, or "all" that `from_causal_lm` can build:
            from 0 blocks, or with a prompt or another pooling than the mean from 1. None for the
            whole model alone.
        cache: Folder for raw vectors, None for none.
        batch_size: Texts in a batch of the model.
        resamples: Bootstrap samples of the held-out rows.
        seed: Seed of the bootstrap.
        show_progress_bar: Show bars.

    Raises:
        DataError: If a task is on both sides, or one side is empty.
        DepthError: If there is no such depth.
    """
    asked = _depths(raw, layers)
    sides = [{(task.info.name, task.info.split) for task in s} for s in (development, held_out)]
    if not all(sides) or sides[0] & sides[1]:
        raise DataError(
            "a search needs development tasks and other, held-out tasks, got "
            f"{sorted(sides[0])} and {sorted(sides[1])}"
        )
    bands = windows(raw.spectrum.d, offsets, widths)
    settings: dict[str, Any] = {
        "cache": cache,
        "batch_size": batch_size,
        "seed": seed,
        "show_progress_bar": show_progress_bar,
    }
    tried = [Configuration(str(band), band.keep) for band in bands]
    # The scan chooses and proves nothing: no intervals.
    scan = list(sweep(raw, development, tried, layers=asked, resamples=0, **settings))
    scores: dict[tuple[str, int, int | None], list[float]] = {}
    for row in scan:
        # The sweep measures the whole model in any case; it is a choice only if it was asked for.
        if row.configuration != "raw" and (asked is None or row.layers in asked):
            key = row.configuration, row.dims, row.layers
            scores.setdefault(key, []).append(row.score)
    # A depth where some task has no score, as a prompt's last token before any block, is no choice.
    complete = {key: np.mean(s) for key, s in scores.items() if len(s) == len(development)}
    name, width, depth = max(complete, key=complete.__getitem__)
    best = Band.parse(name, width)
    final = [Configuration("bulk", width), Configuration(name, width)]
    deep = None if depth is None else [depth]
    judged = list(sweep(raw, held_out, final, layers=deep, resamples=resamples, **settings))
    return WindowSearch(best, scan, judged, len(bands), depth, len(asked or [None]))


def _depths(raw: RawModel, layers: Sequence[int] | Literal["all"] | None) -> list[int] | None:
    """The depths that are tried, all of which can be built."""
    if layers is None:
        return None
    total = len(block_stack(backbone_model(raw.model))[1])
    least = 0 if raw.prompt is None and raw.pooling == "mean" else 1
    asked = list(range(least, total + 1)) if layers == "all" else sorted(set(layers))
    if not asked or not set(asked) <= set(range(least, total + 1)):
        raise DepthError(
            f"a search needs depths from {least} to {total}, got {list(layers)}; without blocks "
            "there is no prompt, and no pooling but the mean"
        )
    return asked
