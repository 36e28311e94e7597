"""`st-embfilter verify`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from st_embfilter.cli.app import Quiet, app, escape, out, quiet_libraries


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a filtered model.")],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Also compute the filter anew and compare.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow code of the model to run.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Check the files of a filtered model against one another and its matrix.

    Exits with 1 if a check fails.
    """
    quiet_libraries(model, quiet)
    from st_embfilter.saved.verify import verify as run_checks

    checks = run_checks(
        model,
        rebuild=rebuild,
        trust_remote_code=trust_remote_code,
        show_progress_bar=not quiet,
    )
    words = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]skipped[/]"}
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(words[check.passed], check.name, escape(check.detail))
    out.print(table, highlight=False)
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)
