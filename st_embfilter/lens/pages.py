"""A report of the lens as one page, as figures, and as a section of the model card."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING

from st_embfilter.lens import figures as plots
from st_embfilter.lens.report import SHARE_OF, LensReport
from st_embfilter.text import template

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render_html(report: LensReport) -> str:
    """One self-contained page: figures inlined, no script, nothing from the network.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    # As an image with its data inside, a figure can run no script and clash with no other.
    figures = {
        name: "data:image/svg+xml;base64," + base64.b64encode(plots.render(figure)).decode()
        for name, figure in _study_figures(report).items()
    }
    return template("lens.html.jinja").render(report=report, figures=figures, share_of=SHARE_OF)


def draw(report: LensReport, folder: str | os.PathLike[str]) -> None:
    """Writes the figures as PNG: lens, and of a study spectrum and spectroscopy.

    Raises:
        MissingPackageError: If matplotlib is not installed.
        OutputError: If the folder cannot be written.
    """
    before, after = (
        [[(token.visible, token.probability) for token in tokens] for tokens in side]
        for side in ([t.before for t in report.texts], [t.after for t in report.texts])
    )
    lens = plots.lens_figure([text.text for text in report.texts], before, after)
    figures = {"lens": lens, **_study_figures(report)}
    for name, figure in figures.items():
        plots.save_figure(figure, Path(folder) / f"{name}.png")


def card_section(report: LensReport) -> str:
    """A section for the model card, in Markdown."""
    return template("lens.md.jinja").render(report=report, share_of=SHARE_OF)


def _study_figures(report: LensReport) -> dict[str, Figure]:
    if report.study is None:
        return {}
    kept = report.band.indices(report.d)
    return {
        "spectrum": plots.spectrum_figure(report.study.singular_values, kept),
        "spectroscopy": plots.spectroscopy_figure(report.study.spectroscopy.shifts, kept),
    }
