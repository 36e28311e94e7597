"""`st-embfilter apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_embfilter.cli.app import Quiet, app, out, parse_keep, quiet_libraries


@app.command()
def apply(
    filter_: Annotated[
        str,
        typer.Argument(metavar="FILTER", help="A filter or a filtered model: folder or Hub id."),
    ],
    vectors: Annotated[
        Path, typer.Argument(help="Unfiltered vectors of the same model: .npy or .parquet.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the same kind to write.")],
    column: Annotated[str, typer.Option(help="Of the vectors, in Parquet.")] = "embedding",
    dims: Annotated[
        str | None, typer.Option(help="Width to write (1/4, 112). (default: all)")
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Unit length.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Filter vectors that are stored already, without encoding a text again."""
    width = None if dims is None else parse_keep(dims)
    quiet_libraries(filter_, quiet)
    from st_embfilter.corpus.stored import apply_filter

    rows, width = apply_filter(
        filter_,
        vectors,
        output,
        column=column,
        dims=width,
        normalize=normalize,
        overwrite=overwrite,
    )
    out.print(f"{rows:,} vectors of {width} numbers in {output}", highlight=False, soft_wrap=True)
