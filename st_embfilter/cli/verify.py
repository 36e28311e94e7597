"""`st-embfilter verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from st_embfilter.cli.app import Quiet, Revision, app, escape, out, quiet_libraries, text_lines
from st_embfilter.text import shown

#: Exit code where nothing failed, but not everything was proven.
UNPROVEN = 3

_COLOURS = {True: "green", False: "bold red", None: "yellow"}


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a filtered model.")],
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Also compare with the filter built anew and repeat a calibration."
        ),
    ] = False,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts that the filter was calibrated with, one a line."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or GGUF file of the model that it was made from, if on no Hub."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow code of the model to run.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Check the files of a filtered model against one another and its matrix.

    Exits with 0 if everything was proven, 1 if a check failed, 3 if one is unproven.
    """
    quiet_libraries(model, quiet)
    from st_embfilter.saved.verify import verify as run_checks

    checks = run_checks(
        model,
        rebuild=rebuild,
        texts=None if texts is None else text_lines(texts, "--texts"),
        base=base,
        revision=revision,
        trust_remote_code=trust_remote_code,
        show_progress_bar=not quiet,
    )
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        colour = _COLOURS[check.passed]
        table.add_row(f"[{colour}]{check.word}[/]", check.name, escape(shown(check.detail, 500)))
    out.print(table, highlight=False)
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)
    if any(check.passed is None for check in checks):
        raise typer.Exit(UNPROVEN)
