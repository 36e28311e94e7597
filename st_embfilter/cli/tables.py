"""Tables of result rows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from st_embfilter.cli.app import escape, out

if TYPE_CHECKING:
    from st_embfilter.evaluation.search import WindowSearch
    from st_embfilter.saved.results import Result


def print_results(rows: Sequence[Result]) -> None:
    """Prints a table for each task, the raw model first, and a legend."""
    for name, split in dict.fromkeys((row.task, row.split) for row in rows):
        here = [row for row in rows if (row.task, row.split) == (name, split)]
        first = here[0]
        table = Table(
            title=escape(f"{name} ({split}): {first.metric} x 100, {first.units:,} units"),
            title_justify="left",
        )
        table.add_column("")
        for column in ("dims", "score", "to raw", f"{first.level:.0%} interval"):
            table.add_column(column, justify="right")
        table.add_column("")
        for row in here:
            spread = "" if row.std is None else f" ±{100 * row.std:.1f}"
            table.add_row(
                f"{row.configuration}{' *' if row.needs_data else ''}"
                + ("" if row.layers is None else f", {row.layers} blocks"),
                str(row.dims),
                f"{100 * row.score:.2f}{spread}",
                *(("", "", "") if row is first else _against_raw(row)),
            )
        out.print(table)
    legend = "+ above raw, - below raw, = the interval holds zero, ? no interval"
    if any(row.needs_data for row in rows):
        fitted = next(row.fitted_on for row in rows if row.needs_data)
        legend += f"; * needs data, fitted on {fitted}"
    if any(row.std is not None for row in rows):
        legend += "; ± standard deviation over seeds"
    out.print(legend, highlight=False)


def _against_raw(row: Result) -> tuple[str, str, str]:
    between = ""
    if row.delta_low is not None and row.delta_high is not None:
        between = f"{100 * row.delta_low:+.2f} to {100 * row.delta_high:+.2f}"
    return f"{100 * (row.delta or 0.0):+.2f}", between, row.verdict


def print_search(found: WindowSearch, model: str, options: Sequence[str] = ()) -> None:
    """Prints the held-out rows of a window search, its warning, and how to build the window.

    Args:
        found: Outcome of the search.
        model: Name or folder of the language model.
        options: Of `build`, beside window and depth: what else the model was measured with.
    """
    print_results(found.held_out)
    out.print(f"\n{found.warning}", highlight=False)
    depth = () if found.layers is None else ("--layers", str(found.layers))
    window = ("--band", str(found.band), "--keep", str(found.band.keep))
    command = shlex.join(["st-embfilter", "build", model, *window, *depth, *options])
    # Not wrapped, to be copied as one line.
    out.print(f"Build it: {command} --output FOLDER", highlight=False, soft_wrap=True)
