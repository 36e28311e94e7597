"""`st-embfilter demo`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from st_embfilter.cli.app import Quiet, app, escape, out, quiet_libraries


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Causal LM to filter; by default the checkout's own.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Texts to measure on; by default the checkout's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the filtered model here.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Filter a small real language model and show what changes."""
    quiet_libraries(model or ".", quiet)
    from st_embfilter.evaluation.demo import DEMO_LM, DEMO_TEXTS, run_demo
    from st_embfilter.files.staging import check_target

    if output is not None:
        check_target(output, overwrite=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = output or Path(temporary) / "model"
        result = run_demo(
            folder,
            model=model or DEMO_LM,
            data=data or DEMO_TEXTS,
            show_progress_bar=not quiet,
        )
    table = Table(title="Scores x 100", title_justify="left")
    for column in ("", "dims", *result.rows[0].scores):
        table.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        scores = [f"{score:.1f}" for score in row.scores.values()]
        table.add_row(row.name, str(row.dims), *scores)
    out.print(table)
    tokens = Table(title="Nearest tokens of the embedding", title_justify="left", show_lines=True)
    for column in ("text", "before the filter", "after"):
        tokens.add_column(column)
    for shown in result.texts:
        words = [
            " ".join(token.strip() or repr(token) for token in side)
            for side in (shown.before, shown.after)
        ]
        tokens.add_row(escape(shown.text), *map(escape, words))
    out.print(tokens)
    if model is None and data is None:
        out.print("README.md says what to expect of so small a model.", highlight=False)
    if output is not None:
        out.print(f"Saved to {output}", highlight=False)
