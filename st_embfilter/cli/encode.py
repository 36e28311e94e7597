"""`st-embfilter encode`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from st_embfilter.cli.app import Quiet, Revision, app, out, parse_keep, quiet_libraries

_WHAT = "What is written"
_WHERE = "Where it runs"


def _workers(text: str) -> tuple[int, int]:
    """A number of workers ("4"), or the fewest and the most ("1-8")."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise typer.BadParameter(f"workers must be a number like 4 or a range 1-8, got {text!r}")
    return low, high


@app.command()
def encode(
    model: Annotated[
        str, typer.Argument(help="Filtered or other sentence-transformers model: folder, Hub id.")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Parquet, JSONL, CSV, TSV or text: files, folders, globs, fsspec URLs.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the shards.")],
    text: Annotated[str, typer.Option(help="Column of the texts; dots lead inside.")] = "text",
    id_: Annotated[
        str | None, typer.Option("--id", help="Column of the ids. (default: row numbers)")
    ] = None,
    dims: Annotated[
        list[str] | None,
        typer.Option(
            help="Width to write (1/4, 112); repeatable. (default: all)", rich_help_panel=_WHAT
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, float16, int8 or binary.", rich_help_panel=_WHAT)
    ] = "float32",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Unit length.", rich_help_panel=_WHAT)
    ] = False,
    queries: Annotated[
        bool,
        typer.Option("--queries", help="Use the prompt for queries.", rich_help_panel=_WHAT),
    ] = False,
    npy: Annotated[bool, typer.Option("--npy", help="Also .npy.", rich_help_panel=_WHAT)] = False,
    shard_rows: Annotated[
        int, typer.Option(help="Input rows behind a shard.", min=1, rich_help_panel=_WHAT)
    ] = 65_536,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row.")] = False,
    batch_size: Annotated[
        int, typer.Option(help="Texts in a batch.", min=1, rich_help_panel=_WHERE)
    ] = 32,
    devices: Annotated[
        str,
        typer.Option(
            help="Like cuda:0,cuda:1: a process for each. (default: best one)",
            rich_help_panel=_WHERE,
        ),
    ] = "",
    engine: Annotated[str, typer.Option(help="local or ray.", rich_help_panel=_WHERE)] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster. (default: this machine)", rich_help_panel=_WHERE),
    ] = None,
    workers: Annotated[
        str, typer.Option(help="Ray workers: 4, or 1-8 as needed.", rich_help_panel=_WHERE)
    ] = "1",
    gpus: Annotated[
        float, typer.Option(help="Share of a GPU for each.", min=0.0, rich_help_panel=_WHERE)
    ] = 0.0,
    revision: Revision = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint's code run.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write the vectors of a corpus as Parquet; started again, it goes on."""
    keeps, bounds = [parse_keep(width) for width in dims or ()], _workers(workers)
    quiet_libraries(model, quiet)
    from st_embfilter.corpus.encode import encode_corpus
    from st_embfilter.unembedding.source import Source

    done = encode_corpus(
        Source(model, revision, trust_remote_code=trust_remote_code),
        inputs,
        output,
        text=text,
        id=id_,
        dims=keeps,
        precision=precision,  # type: ignore[arg-type]
        normalize=normalize,
        queries=queries,
        npy=npy,
        batch_size=batch_size,
        shard_rows=shard_rows,
        devices=[device for device in devices.split(",") if device],
        strict=strict,
        engine=engine,
        address=address,
        workers=bounds,
        gpus=gpus,
        show_progress_bar=not quiet,
    )
    bad = f", {done.bad:,} bad rows in _bad-*.jsonl" if done.bad else ""
    out.print(f"{done.rows:,} vectors in {done.path}{bad}", highlight=False, soft_wrap=True)
