"""The command line: parse, call one library function, print."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from st_embfilter.errors import EmbedFilterError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from st_embfilter.layer import EmbedFilterLayer

out = Console()
err = Console(stderr=True)


class _Group(TyperGroup):
    """Shows expected errors as one sentence instead of a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        with _errors():
            return super().invoke(ctx)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except EmbedFilterError as error:
        err.print(f"[bold red]Error:[/] {_escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Better and smaller zero-shot text embeddings from any decoder language model.",
)


@app.callback()
def _root() -> None:
    # A callback keeps typer from promoting a lone command to the root.
    pass


def parse_keep(text: str) -> float | int:
    """A ratio ("0.5", "1/4") or a number of directions ("448")."""
    try:
        if "/" in text:
            numerator, denominator = text.split("/")
            return int(numerator) / int(denominator)
        return float(text) if any(c in text for c in ".eE") else int(text)
    except (ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(
            f"keep must be a ratio like 0.5 or 1/4, or a number of directions, got {text!r}"
        ) from error


Model = Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")]
Keep = Annotated[
    str, typer.Option(help="Ratio of directions kept (0.5, 1/4) or their number (448).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no warnings.")]
BandName = Annotated[
    str,
    typer.Option(
        "--band",
        help="bulk (the paper's window), offset:N, dominant, secondary, edges or random:SEED.",
    ),
]


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
    _quiet_libraries(model, quiet)
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
        trust_remote_code=trust_remote_code,
        device="cpu",
        show_progress_bar=not quiet,
    )
    save_pretrained(filtered, output, overwrite=overwrite)
    layer = filter_of(filtered)
    if layer is not None:
        out.print(f"{_describe(layer)}\nSaved to {output}", highlight=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a filtered model.")],
) -> None:
    """Show backbone, window, spectrum and hashes of a filtered model."""
    _quiet_libraries(model, quiet=False)
    from st_embfilter.build import load_filter

    layer = load_filter(model)
    source = layer.metadata.provenance
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "Backbone": _at(source.model_id, source.revision),
        "Unembedding": f"{source.tensor} {source.shape[0]:,} x {source.shape[1]:,} {source.dtype}"
        + (", tied to the input embedding" if source.tied else ""),
        "Window": _describe(layer),
        "sha256": source.sha256,
        **_spectrum_rows(layer),
        "Prompt": str(layer.metadata.prompt or "none (plain text)"),
        "Versions": ", ".join(f"{k} {v}" for k, v in layer.metadata.versions.items()),
    }
    for name, value in rows.items():
        table.add_row(name, _escape(value))
    out.print(table, highlight=False)


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
    _quiet_libraries(model or ".", quiet)
    from st_embfilter.demo import DEMO_LM, DEMO_TEXTS, run_demo
    from st_embfilter.publish import check_target

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
        tokens.add_row(_escape(shown.text), *map(_escape, words))
    out.print(tokens)
    if output is not None:
        out.print(f"Saved to {output}", highlight=False)


def _describe(layer: EmbedFilterLayer) -> str:
    metadata = layer.metadata
    start = metadata.band.start(metadata.d)
    window = "" if start is None else f", directions {start} to {start + metadata.k - 1}"
    return f"{metadata.band} band, {metadata.k} of {metadata.d} dimensions{window}"


def _spectrum_rows(layer: EmbedFilterLayer) -> dict[str, str]:
    if layer.singular_values is None:
        return {}
    values = layer.singular_values
    energy = values.square() / values.square().sum()
    kept = layer.metadata.band.indices(layer.metadata.d)
    return {
        "Singular values": f"{values[0]:.4g} (largest) {values[len(values) // 2]:.4g} (middle) "
        f"{values[-1]:.4g} (smallest)",
        "Energy kept": f"{energy[kept].sum():.1%} of the squared spectrum "
        f"(the largest direction alone holds {energy[0]:.1%})",
    }


def _at(model_id: str | None, revision: str | None) -> str:
    return f"{model_id or 'unknown'}{f' at {revision}' if revision else ''}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _quiet_libraries(model: str | Path, quiet: bool) -> None:
    """Turns off bars and reports of other libraries that say nothing about the user's command.

    Must run before they are imported: they read the environment then. Downloads keep their bars
    unless the user asked for quiet.
    """
    if quiet or Path(model).is_dir():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
