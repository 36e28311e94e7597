"""What every command shares: the application, the consoles, options, errors in one sentence."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import markup
from rich.console import Console
from typer.core import TyperGroup

from st_embfilter.errors import CalibrationError, EmbedFilterError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from st_embfilter.model.layer import EmbedFilterLayer

out = Console()
err = Console(stderr=True)


class _Group(TyperGroup):
    """Shows expected errors as one sentence instead of a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        with errors():
            return super().invoke(ctx)


@contextmanager
def errors() -> Iterator[None]:
    """Shows an expected error as one sentence and exits with 1."""
    try:
        yield
    except EmbedFilterError as error:
        err.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
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


def text_lines(file: str | Path, option: str) -> list[str]:
    """The lines of a text file that an option names."""
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{option} takes a text file in UTF-8, got {file}: {error}"
        ) from error


def describe(layer: EmbedFilterLayer) -> str:
    """One line about a filter."""
    metadata = layer.metadata
    start = metadata.band.start(metadata.d)
    window = "" if start is None else f", directions {start} to {start + metadata.k - 1}"
    return f"{metadata.band} band, {metadata.k} of {metadata.d} dimensions{window}"


def escape(text: str) -> str:
    """Text that is no markup."""
    return markup.escape(text)


def quiet_libraries(model: str | Path, quiet: bool) -> None:
    """Turns off bars and reports of other libraries that say nothing about the user's command.

    Must run before they are imported: they read the environment then. Downloads keep their bars
    unless the user asked for quiet.
    """
    if quiet or Path(model).is_dir():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        for name in ("sentence_transformers", "st_embfilter"):
            logging.getLogger(name).setLevel(logging.ERROR)
