"""`st-embfilter build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_embfilter.cli.app import (
    LENGTH,
    BandName,
    Keep,
    Layers,
    Model,
    Quiet,
    RemoteCode,
    Revision,
    app,
    check_device,
    describe,
    out,
    parse_keep,
    parse_layers,
    quiet_libraries,
    text_lines,
)


@app.command()
def build(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    keep: Keep = "0.5",
    band: BandName = "bulk",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="prompteol, pretended-cot, knowledge, echo, metaeol or a template like "
            '\'In a word, "{text}" is "\'.'
        ),
    ] = None,
    prompt_encoding: Annotated[
        str | None, typer.Option(help="portable or exact, of prompteol and templates.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, lasttoken, ...")] = None,
    layers: Annotated[str | None, Layers] = None,
    token_weights: Annotated[str | None, typer.Option(help="With --layers 0: zipf or sif.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. (default: the checkpoint's)"),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Embeddings of unit length.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Centre and whiten: 'generic' with texts that come with the package, 'self' with "
            "texts that the model writes, or a file with one text a line."
        ),
    ] = None,
    calibration_strength: Annotated[
        float, typer.Option(help="From 0 (filter alone) to 1 (whitening).", metavar="X")
    ] = 0.25,
    calibration_size: Annotated[
        int,
        typer.Option(help="Generic texts, or those of the model.", min=16, metavar="N"),
    ] = 1024,
    calibration_seed: Annotated[
        int, typer.Option(help="Number that picks them.", min=0, metavar="N")
    ] = 0,
    max_seq_length: Annotated[
        int, typer.Option(help="Longest text in tokens.", min=1, metavar="N")
    ] = LENGTH,
    revision: Revision = None,
    masked_lm: Annotated[
        bool, typer.Option("--masked-lm", help="Take a masked LM; outside the paper.")
    ] = False,
    trust_remote_code: RemoteCode = False,
    norm: Annotated[
        str | None,
        typer.Option(help="folded: take the norm's gain into the spectrum, as export needs it."),
    ] = None,
    filter_only: Annotated[
        bool,
        typer.Option(
            "--filter-only", help="Save the filter alone; reads one tensor, not the model."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model folder that is there.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, mps, for the work of building.", callback=check_device)
    ] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Build a filtered embedding model and save it as a portable folder.

    A prompt of echo or metaeol needs code of its own, which goes into the folder.
    """
    width = parse_keep(keep)
    depth = None if layers is None else parse_layers(layers)
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise typer.BadParameter(f"dtype must be float32, float16 or bfloat16, got {dtype!r:.60}")
    quiet_libraries(model, quiet)
    from st_embfilter.files.staging import check_target
    from st_embfilter.model.build import build_filter, from_causal_lm
    from st_embfilter.model.layer import filter_of
    from st_embfilter.model.static import static_metadata
    from st_embfilter.saved.folder import save_pretrained

    of_models = {
        "--prompt": prompt,
        "--prompt-encoding": prompt_encoding,
        "--pooling": pooling,
        "--layers": layers,
        "--dtype": dtype,
        "--normalize": normalize or None,
        "--calibrate": calibrate,
    }
    given = [name for name, value in of_models.items() if value is not None]
    if filter_only and given:
        raise typer.BadParameter(f"{', '.join(given)} must come without --filter-only")
    check_target(output, overwrite=overwrite)
    if filter_only:
        alone = build_filter(
            model,
            keep=width,
            band=band,
            device=device,
            revision=revision,
            masked_lm=masked_lm,
            norm=norm,  # type: ignore[arg-type] # checked there
            trust_remote_code=trust_remote_code,
            show_progress_bar=not quiet,
        )
        alone.save_pretrained(output, overwrite=overwrite)
        out.print(f"{describe(alone)}\nSaved the filter to {output}", highlight=False)
        return
    filtered = from_causal_lm(
        model,
        prompt=prompt,
        prompt_encoding=prompt_encoding,  # type: ignore[arg-type] # checked there
        keep=width,
        band=band,
        layers=depth,
        token_weights=token_weights,
        pooling=pooling,
        normalize=normalize,
        calibrate=calibrate
        if calibrate in (None, "generic", "self")
        else text_lines(calibrate, "--calibrate"),
        calibration_strength=calibration_strength,
        calibration_size=calibration_size,
        calibration_seed=calibration_seed,
        max_seq_length=max_seq_length,
        dtype=dtype,
        revision=revision,
        masked_lm=masked_lm,
        norm=norm,  # type: ignore[arg-type] # checked there
        trust_remote_code=trust_remote_code,
        device=device,
        show_progress_bar=not quiet,
    )
    save_pretrained(filtered, output, overwrite=overwrite)
    layer = filter_of(filtered) or static_metadata(filtered)
    if layer is not None:
        out.print(f"{describe(layer)}\nSaved to {output}", highlight=False)
