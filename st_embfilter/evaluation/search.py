"""Which window of the spectrum: scanned on development data, judged on held-out data.

The paper leaves asymmetric windows open. The best of many windows looks better on the data that
chose it than it is, so what counts is the score on data that had no say.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from st_embfilter.errors import BandError, DataError
from st_embfilter.evaluation.baselines import Configuration
from st_embfilter.evaluation.sweep import RawModel, sweep
from st_embfilter.evaluation.tasks import Task
from st_embfilter.saved.results import Result
from st_embfilter.spectrum.band import Band


@dataclass(frozen=True)
class WindowSearch:
    """The outcome of a search.

    Attributes:
        band: The chosen window; `from_causal_lm(..., band=band)` builds it.
        scan: Rows of every window and of the raw model on the development tasks.
        held_out: Rows of raw, of the paper's window at the same width, and of the chosen window on
            the held-out tasks.
        windows: Number of windows that were tried.
    """

    band: Band
    scan: list[Result]
    held_out: list[Result]
    windows: int

    @property
    def warning(self) -> str:
        """What to keep in mind, with the figures."""
        return (
            f"The best of {self.windows} windows was chosen by its development score, "
            f"{100 * self._gain(self.scan):+.2f} against raw, which flatters it. Trust the "
            f"held-out figure: {100 * self._gain(self.held_out):+.2f}, where the paper's window of "
            f"the same width has {100 * self._gain(self.held_out, 'bulk'):+.2f}."
        )

    def _gain(self, rows: Sequence[Result], name: str | None = None) -> float:
        wanted = str(self.band) if name is None else name
        gains = [
            row.delta for row in rows if row.configuration == wanted and row.dims == self.band.keep
        ]
        return float(np.mean(gains))


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
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> WindowSearch:
    """Chooses the window with the best mean score on development tasks.

    Args:
        raw: The unfiltered model.
        development: Tasks that choose.
        held_out: Tasks that judge; none of them may be among the development tasks.
        offsets: First kept directions to try, see `windows`.
        widths: Widths to try, see `windows`.
        cache: Folder for raw vectors, None for none.
        batch_size: Texts in a batch of the model.
        resamples: Bootstrap samples of the held-out rows.
        seed: Seed of the bootstrap.
        show_progress_bar: Show bars.

    Raises:
        DataError: If a task is on both sides, or one side is empty.
    """
    sides = [{(task.info.name, task.info.split) for task in s} for s in (development, held_out)]
    if not all(sides) or sides[0] & sides[1]:
        raise DataError(
            "a search needs development tasks and other, held-out tasks, got "
            f"{sorted(sides[0])} and {sorted(sides[1])}"
        )
    bands = windows(raw.spectrum.d, offsets, widths)
    settings = {
        "cache": cache,
        "batch_size": batch_size,
        "seed": seed,
        "show_progress_bar": show_progress_bar,
    }
    tried = [Configuration(str(band), band.keep) for band in bands]
    # The scan chooses and proves nothing: no intervals.
    scan = list(sweep(raw, development, tried, resamples=0, **settings))  # type: ignore[arg-type]
    means = [
        np.mean([r.score for r in scan if (r.configuration, r.dims) == (str(band), band.keep)])
        for band in bands
    ]
    best = bands[int(np.argmax(means))]
    final = [Configuration("bulk", best.keep), Configuration(str(best), best.keep)]
    judged = list(sweep(raw, held_out, final, resamples=resamples, **settings))  # type: ignore[arg-type]
    return WindowSearch(best, scan, judged, len(bands))
