"""`st-embfilter build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_embfilter.cli.app import (
    BandName,
    Keep,
    Model,
    Quiet,
    app,
    describe,
    out,
    parse_keep,
    quiet_libraries,
)


@app.command()
def build(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    keep: Keep = "0.5",
    band: BandName = "bulk",
    pooling: Annotated[str | None, typer.Option(help="mean, lasttoken, ...")] = None,
    normalize: Annotated[bool, typer.Option(help="Embeddings of unit length.")] = False,
    max_seq_length: Annotated[int, typer.Option(help="Longest text in tokens.", min=1)] = 512,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    masked_lm: Annotated[
        bool, typer.Option("--masked-lm", help="Take a masked LM; outside the paper.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code of the checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model folder that is there.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Build a filtered embedding model and save it as a portable folder."""
    width = parse_keep(keep)
    quiet_libraries(model, quiet)
    from st_embfilter.build import from_causal_lm
    from st_embfilter.layer import filter_of
    from st_embfilter.publish import check_target, save_pretrained

    check_target(output, overwrite=overwrite)
    filtered = from_causal_lm(
        model,
        keep=width,
        band=band,
        pooling=pooling,
        normalize=normalize,
        max_seq_length=max_seq_length,
        revision=revision,
        masked_lm=masked_lm,
        trust_remote_code=trust_remote_code,
        device="cpu",
        show_progress_bar=not quiet,
    )
    save_pretrained(filtered, output, overwrite=overwrite)
    layer = filter_of(filtered)
    if layer is not None:
        out.print(f"{describe(layer)}\nSaved to {output}", highlight=False)
