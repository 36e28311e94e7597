"""`st-embfilter card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_embfilter.cli.app import app, out, quiet_libraries


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="Folder of a filtered model.")],
    repo_id: Annotated[
        str | None, typer.Option(help="Hub id that the usage examples name.")
    ] = None,
) -> None:
    """Write the model card (README.md) of a saved model anew.

    Results are read from results.jsonl in the folder; licence and languages stay.
    """
    quiet_libraries(model, quiet=False)
    from st_embfilter.saved.card import write_card

    out.print(f"Wrote {write_card(model, repo_id=repo_id)}", highlight=False)
