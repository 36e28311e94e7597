"""`st-embfilter export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from st_embfilter.cli.app import Quiet, RemoteCode, app, out, parse_keep, quiet_libraries


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="Folder of a filtered model; for --gguf also a GGUF file.")
    ],
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="GGUF file to write, for llama.cpp and Ollama.")
    ] = None,
    baked: Annotated[
        Path | None,
        typer.Option("--baked", help="Folder to write: the model with rotated weights, no Dense."),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            "--onnx", help="Folder to write: one ONNX graph, for ONNX Runtime and browsers."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="GGUF file of the same model, for a filtered folder.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="f32; f16; q8_0 (GGUF); bf16 (--baked); int8 (ONNX)."),
    ] = None,
    f32_blocks: Annotated[
        int, typer.Option(help="First blocks of a GGUF file that stay f32 in any type.", min=0)
    ] = 0,
    keep: Annotated[
        str | None, typer.Option(help="Width to record for a GGUF source: 0.5, 1/4, 448.")
    ] = None,
    band: Annotated[
        str | None, typer.Option(help="Band of a GGUF source: bulk if not given.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Pooling of a GGUF source: mean (if not given), lasttoken.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a filtered model in a form that other engines run.

    --gguf and --baked turn the weights themselves, so that the first k numbers of an embedding are
    the filter of width k in any engine. They take filters that were built with --norm folded.
    --onnx takes any model of a single prompt, and measures what its graph loses.
    """
    quiet_libraries(source, quiet)
    targets = {"--gguf": gguf, "--baked": baked, "--onnx": onnx}
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise typer.BadParameter(f"give one of {', '.join(targets)}, got {len(given)}")
    of_gguf = {"--keep": keep, "--band": band, "--pooling": pooling}
    chosen = [name for name, value in of_gguf.items() if value is not None]
    from_file = source.endswith(".gguf")
    if chosen and not from_file:
        raise typer.BadParameter(f"{', '.join(chosen)} must come with a GGUF source")
    if weights is not None and (from_file or gguf is None):
        raise typer.BadParameter("--weights must come with a filtered folder and --gguf")
    if f32_blocks and gguf is None:
        raise typer.BadParameter("--f32-blocks must come with --gguf")
    if trust_remote_code and onnx is None:
        raise typer.BadParameter("--trust-remote-code must come with --onnx")
    if onnx is not None:
        _onnx(source, onnx, kind, trust_remote_code, overwrite)
        return
    if baked is not None:
        k, d = _baked(source, baked, kind, overwrite)
    elif gguf is not None:
        from st_embfilter.saved.gguf_out import export_gguf

        options: dict[str, Any] = {"kind": kind or "f16", "overwrite": overwrite}
        options |= {"float32_blocks": f32_blocks}
        if from_file:
            width = None if keep is None else parse_keep(keep)
            options |= {"keep": width, "band": band or "bulk", "pooling": pooling or "mean"}
            k, d = export_gguf(source, gguf, **options)
        else:
            k, d = _gguf_of_folder(source, gguf, weights, options)
    out.print(
        f"Saved to {gguf or baked}: embeddings of {d} numbers, of which the first {k} are the "
        "filter that was chosen",
        highlight=False,
        soft_wrap=True,
    )
    if gguf is not None:
        from st_embfilter.saved.gguf_out import advice

        wanted = advice(gguf)
        if wanted is not None:
            out.print(wanted, highlight=False, soft_wrap=True)


def _onnx(source: str, target: Path, kind: str | None, trusted: bool, overwrite: bool) -> None:
    from st_embfilter.saved.load import load
    from st_embfilter.saved.onnx_out import export_onnx

    dtypes = {"f32": "float32", "f16": "float16", "int8": "int8"}
    if kind is not None and kind not in dtypes:
        raise typer.BadParameter(f"--type of a graph must be {', '.join(dtypes)}, got {kind!r}")
    model = load(source, device="cpu", trust_remote_code=trusted)
    dtype: Any = dtypes[kind or "f32"]
    made = export_onnx(model, target, dtype=dtype, overwrite=overwrite)
    out.print(
        f"Saved to {target / made.file}: embeddings of {made.dimensions} numbers; on {made.texts} "
        f"texts they differ from torch by at most {made.difference:.1e} of their length, lowest "
        f"cosine {made.cosine:.6f}",
        highlight=False,
        soft_wrap=True,
    )


def _gguf_of_folder(
    folder: str, target: Path, weights: Path | None, options: dict[str, object]
) -> tuple[int, int]:
    from st_embfilter.saved.baked_folder import bakeable
    from st_embfilter.saved.gguf_out import export_gguf
    from st_embfilter.unembedding.source import Source

    found = bakeable(Source(folder))
    if weights is None:
        files = sorted(Path(folder).glob("*.gguf"))
        if len(files) != 1:
            raise typer.BadParameter(
                f"give the GGUF file of the same model (--weights): {folder} holds {len(files)}"
            )
        weights = files[0]
    return export_gguf(
        weights,
        target,
        band=found.layer.metadata.band,
        pooling=found.pooling,
        prompt=found.template,
        like=found.layer.projection.double(),
        **options,  # type: ignore[arg-type] # checked there
    )


def _baked(folder: str, target: Path, kind: str | None, overwrite: bool) -> tuple[int, int]:
    import torch

    from st_embfilter.saved.baked_folder import export_folder

    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    if kind is not None and kind not in dtypes:
        raise typer.BadParameter(f"--type of a folder must be {', '.join(dtypes)}, got {kind!r}")
    dtype = None if kind is None else dtypes[kind]
    return export_folder(folder, target, dtype=dtype, overwrite=overwrite)
