"""Figures. matplotlib loads with the first one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from st_embfilter.errors import MissingPackageError, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that most colour-blind people can tell apart.
BLUE: Final = "#2563a8"
ORANGE: Final = "#d9772b"
GREY: Final = "#8a8f98"
SHADE: Final = "#dbe7f5"

#: The same input gives the same bytes with the same matplotlib.
_STYLE: Final[Any] = {
    "svg.hashsalt": "st-embfilter",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
}


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with its panels side by side, outside of pyplot's global state.

    Args:
        width: In inches.
        height: In inches.
        panels: Number of axes; 0 to lay them out differently.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "figures need matplotlib, got none installed; install st-embfilter[plot]"
        ) from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False)[0]) if panels else []
    return figure, axes


def render(figure: Figure, file_format: str = "svg") -> bytes:
    """The figure as "svg" or "png", with no date in it."""
    from matplotlib import rc_context

    metadata = {"Date": None} if file_format == "svg" else {"Software": None}
    buffer = BytesIO()
    with warnings.catch_warnings(), rc_context(_STYLE):
        # A token in a script that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=file_format, dpi=144, metadata=metadata)
    return buffer.getvalue()


def save_figure(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Writes a figure as the file's suffix says, .svg or .png.

    Raises:
        OutputError: If the suffix is another, or the file cannot be written.
    """
    path = Path(file)
    suffix = path.suffix.lower().lstrip(".")
    if suffix not in ("svg", "png"):
        raise OutputError(f"a figure must be a .svg or .png file, got {path.name}")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(render(figure, suffix))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


# The lens ----------------------------------------------------------------------------------------


def spectrum_figure(singular_values: Tensor, kept: Tensor) -> Figure:
    """Singular values on a logarithmic scale, the kept directions shaded.

    Args:
        singular_values: (d,), descending.
        kept: int64 indices of the kept directions.
    """
    figure, (axes,) = new_figure(7, 2.8)
    _shade(axes, kept)
    axes.plot(_numbers(singular_values.clamp(min=float(singular_values[0]) * 1e-12)), color=BLUE)
    _logarithmic(axes)
    axes.set_title("Singular values of the unembedding matrix", loc="left")
    axes.set_ylabel("singular value")
    _along_spectrum(axes, singular_values.shape[0])
    return figure


def spectroscopy_figure(shifts: Mapping[str, Tensor], kept: Tensor) -> Figure:
    """dpi(i) over the spectrum, one line a token group, and how it is spread.

    Left: every direction, on a logarithmic scale, since one direction can outweigh the others a
    thousandfold. Right: means over bands of a sixteenth of the spectrum.

    Args:
        shifts: By group, (d,) dpi.
        kept: int64 indices of the kept directions.
    """
    figure, (every, means) = new_figure(9, 3.1, panels=2)
    colors = dict(zip(shifts, (ORANGE, BLUE, GREY), strict=False))
    for name, shift in shifts.items():
        d = shift.shape[0]
        color = colors.get(name, GREY)
        every.plot(_numbers(shift * 100), ".", markersize=2.5, color=color)
        parts = shift.tensor_split(min(16, d))
        edges = [0]
        for part in parts:
            edges.append(edges[-1] + part.shape[0])
        heights = [float(part.mean()) * 100 for part in parts]
        means.stairs(heights, edges, color=color, label=f"{name} tokens")
    for axes in (every, means):
        _shade(axes, kept)
        _along_spectrum(axes, d)
    _logarithmic(every)
    largest = max(float(shift.max()) for shift in shifts.values())
    every.set_ylim(bottom=largest * 100 * 1e-5)
    every.set_title("Shift of the logits by each direction", loc="left")
    means.set_title("Mean of each sixteenth of the spectrum", loc="left")
    means.set_ylim(bottom=0)
    for axes in (every, means):
        axes.set_ylabel("shift in %")
    means.legend(frameon=False)
    return figure


def lens_figure(
    texts: Sequence[str],
    before: Sequence[Sequence[tuple[str, float]]],
    after: Sequence[Sequence[tuple[str, float]]],
) -> Figure:
    """Nearest tokens of texts as bars, before the filter on the left and after it on the right.

    Args:
        texts: The texts.
        before: Tokens of each text with their probabilities.
        after: Nearest tokens with the filter.
    """
    line, gap, margin = 0.2, 0.42, 0.3
    heights = [line * max(map(len, pair)) for pair in zip(before, after, strict=True)]
    height = margin + sum(heights) + gap * len(texts)
    figure, _ = new_figure(7, height, panels=0)
    figure.set_layout_engine("none")
    top = height - margin
    for x, title in ((0.16, "before the filter"), (0.64, "after")):
        figure.text(x, (height - 0.22) / height, title, color=GREY)
    for text, *sides, inches in zip(texts, before, after, heights, strict=True):
        bottom = top - gap - inches
        figure.text(0.01, (top - 0.22) / height, _short(text, 90), fontweight="bold")
        for x, tokens, color in zip((0.16, 0.64), sides, (GREY, BLUE), strict=True):
            axes = figure.add_axes((x, (bottom + 0.08) / height, 0.34, inches / height))
            # Relative to the side's own maximum: the two sides' probabilities are no contest.
            most = max(chance for _, chance in tokens)
            axes.barh(range(len(tokens)), [chance / most for _, chance in tokens], color=color)
            axes.set_yticks(range(len(tokens)), [_short(word, 16) for word, _ in tokens])
            axes.tick_params(length=0)
            axes.invert_yaxis()
            axes.set(xticks=[], xlim=(0, 1))
            axes.spines[:].set_visible(False)
        top = bottom
    return figure


def _logarithmic(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _shade(axes: Axes, kept: Tensor) -> None:
    """Marks the kept directions, run by run."""
    inside = set(kept.tolist())
    starts = sorted(i for i in inside if i - 1 not in inside)
    stops = sorted(i for i in inside if i + 1 not in inside)
    runs = list(zip(starts, stops, strict=True))
    for start, stop in runs:
        axes.axvspan(start - 0.5, stop + 0.5, color=SHADE, zorder=0, linewidth=0)
    widest = max(runs, key=lambda run: run[1] - run[0])
    axes.text(
        widest[0],
        0.97,
        " kept",
        color=BLUE,
        va="top",
        fontsize=8.5,
        transform=axes.get_xaxis_transform(),
    )


def _along_spectrum(axes: Axes, d: int) -> None:
    axes.set_xlim(-0.01 * d, 1.01 * d)
    axes.set_xlabel("direction (0 has the largest singular value)")


def _numbers(values: Tensor) -> Any:
    return values.detach().cpu().double().numpy()


def _short(text: str, longest: int) -> str:
    """Text on one line that matplotlib does not read as mathematics."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return line.replace("$", r"\$")
