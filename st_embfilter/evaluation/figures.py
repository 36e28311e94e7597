"""Figures of a sweep's results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Final

from st_embfilter.errors import DataError
from st_embfilter.lens.figures import new_figure
from st_embfilter.saved.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = "osD^vP*X<>"


def score_figure(rows: Sequence[Result]) -> Figure:
    """Score against dimensions, one panel for each task, one line for each configuration.

    Args:
        rows: Rows of `sweep`. The filter has a band for the interval of its difference to raw;
            configurations that were fitted on texts are dashed.

    Raises:
        DataError: If there are no rows.
    """
    if not rows:
        raise DataError("a figure needs result rows, got none")
    tasks = list(dict.fromkeys((row.task, row.split, row.metric) for row in rows))
    names = [n for n in dict.fromkeys(row.configuration for row in rows) if n != "raw"]
    columns = min(2, len(tasks))
    width = 6.0 if columns == 1 else 10.4
    figure, _ = new_figure(width, 3.6 * math.ceil(len(tasks) / columns) + 0.9, panels=0)
    for i, (task, split, metric) in enumerate(tasks):
        axes = figure.add_subplot(math.ceil(len(tasks) / columns), columns, i + 1)
        here = [row for row in rows if (row.task, row.split, row.metric) == (task, split, metric)]
        for row in here:
            if row.configuration == "raw":
                axes.axhline(100 * row.score, color="0.45", linewidth=1.2, label="raw")
        for j, name in enumerate(names):
            points = sorted(
                (row for row in here if row.configuration == name), key=lambda row: row.dims
            )
            _line(axes, points, name, j)
        dims = sorted({row.dims for row in here})
        axes.set_xscale("log", base=2)
        axes.set_xticks(dims, [str(dim) for dim in dims])
        axes.minorticks_off()
        axes.set_title(f"{task} ({split})", fontsize=10)
        axes.set_ylabel(f"{metric} x 100")
        axes.set_xlabel("dimensions")
        axes.grid(alpha=0.25)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=6 if columns > 1 else 4,
        fontsize=8,
        frameon=False,
        title="* and dashed: fitted on texts",
        title_fontsize=8,
    )
    return figure


def window_figure(rows: Sequence[Result]) -> Figure:
    """Heat map of the mean difference to raw over offset and width of a window.

    Args:
        rows: The scan of `search_window`.

    Raises:
        DataError: If there is no window among them.
    """
    import numpy as np

    found = [row for row in rows if row.configuration.startswith("offset:")]
    if not found:
        raise DataError("a window figure needs rows of windows ('offset:N'), got none")
    offsets = sorted({int(row.configuration.partition(":")[2]) for row in found})
    widths = sorted({row.dims for row in found})
    total = np.zeros((len(widths), len(offsets)))
    count = np.zeros_like(total)
    for row in found:
        cell = widths.index(row.dims), offsets.index(int(row.configuration.partition(":")[2]))
        total[cell] += 100 * (row.delta or 0.0)
        count[cell] += 1
    values = np.ma.masked_array(total / np.maximum(count, 1), count == 0)
    figure, (axes,) = new_figure(7.5, 4.8)
    limit = float(abs(values).max()) or 1.0
    image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    best = np.unravel_index(values.argmax(), values.shape)
    axes.plot(best[1], best[0], "k*", markersize=14, label="best")
    d = found[0].full_dims
    # The paper's window of each width, between two columns where its offset is not on the grid.
    middle = [np.interp((d - width) // 2, offsets, range(len(offsets))) for width in widths]
    axes.plot(middle, range(len(widths)), "k--", linewidth=1, label="the paper's window")
    axes.set_xticks(range(len(offsets)), [str(offset) for offset in offsets])
    axes.set_yticks(range(len(widths)), [str(width) for width in widths])
    axes.set_xlabel("first kept direction (offset)")
    axes.set_ylabel("kept directions (width)")
    tasks = list(dict.fromkeys(f"{row.task} ({row.split})" for row in found))
    axes.set_title(", ".join(tasks), fontsize=10)
    axes.legend(loc="upper right", fontsize=8)
    figure.colorbar(image, ax=axes, label="mean difference to raw x 100")
    return figure


def depth_figure(rows: Sequence[Result]) -> Figure:
    """Heat map of the score over depth and width: a row of panels a model, a column a task.

    Args:
        rows: Rows of `sweep(layers=)`. Beside the raw model the configuration that comes first is
            shown.

    Raises:
        DataError: If no row has a depth.
    """
    import numpy as np

    rows = [row for row in rows if row.layers is not None]
    if not rows:
        raise DataError(
            "a depth figure needs rows of several depths, got none; measure with layers="
        )
    name = next((row.configuration for row in rows if row.configuration != "raw"), "raw")
    rows = [row for row in rows if row.configuration in ("raw", name)]
    models = list(dict.fromkeys(row.model for row in rows))
    tasks = list(dict.fromkeys((row.task, row.split, row.metric) for row in rows))
    figure, _ = new_figure(2.6 * len(tasks) + 0.6, 3.6 * len(models) + 0.4, panels=0)
    for i, (model, (task, split, metric)) in enumerate(product(models, tasks)):
        here = [
            row
            for row in rows
            if (row.model, row.task, row.split, row.metric) == (model, task, split, metric)
        ]
        if not here:
            continue
        depths = sorted({row.layers or 0 for row in here})
        columns = sorted({(row.configuration != "raw", -row.dims) for row in here})
        values = np.full((len(depths), len(columns)), np.nan)
        for row in here:
            column = columns.index((row.configuration != "raw", -row.dims))
            values[depths.index(row.layers or 0), column] = 100 * row.score
        axes = figure.add_subplot(len(models), len(tasks), i + 1)
        image = axes.imshow(values, cmap="viridis", origin="lower", aspect="auto")
        best = np.unravel_index(np.nanargmax(values), values.shape)
        axes.plot(best[1], best[0], "*", color="white", markeredgecolor="black", markersize=12)
        axes.set_xticks(
            range(len(columns)), [str(-dims) if kept else "raw" for kept, dims in columns]
        )
        step = math.ceil(len(depths) / 16)
        axes.set_yticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]])
        axes.set_title(f"{task} ({split})" if len(models) == 1 else f"{model}\n{task}", fontsize=9)
        axes.set_xlabel(f"dimensions ({name})")
        axes.set_ylabel("blocks")
        figure.colorbar(image, ax=axes, label=f"{metric} x 100")
    return figure


def _line(axes: Any, points: Sequence[Result], name: str, number: int) -> None:
    if not points:
        return
    main = name == "bulk"
    colour = _COLOURS[number % len(_COLOURS)]
    dims = [row.dims for row in points]
    axes.plot(
        dims,
        [100 * row.score for row in points],
        color=colour,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=5,
        linewidth=2.4 if main else 1.2,
        linestyle="--" if points[0].needs_data else "-",
        label=f"{name} *" if points[0].needs_data else name,
        zorder=3 if main else 2,
    )
    if main and all(row.delta_low is not None and row.delta_high is not None for row in points):
        low, high = (
            [100 * (row.score - (row.delta or 0.0) + (getattr(row, side) or 0.0)) for row in points]
            for side in ("delta_low", "delta_high")
        )
        axes.fill_between(dims, low, high, color=colour, alpha=0.15, linewidth=0)
