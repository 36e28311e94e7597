"""What every command shares: the application, the consoles, options, errors in one sentence."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer
from rich import markup
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from st_embfilter.errors import CalibrationError, EmbedFilterError
from st_embfilter.text import first_line, is_failure, visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from st_embfilter.model.layer import EmbedFilterLayer
    from st_embfilter.model.metadata import FilterMetadata

#: Set to anything, it shows where a failure that nobody foresaw came from.
TRACEBACK: Final = "ST_EMBFILTER_TRACEBACK"

#: Longest text in tokens, if the user names none.
LENGTH: Final = 512


#: What typer itself shows or obeys: an exit, an abort, and click's base class of wrong usage, which
#: some versions of typer carry in a copy of their own.
_OF_TYPER: Final[tuple[Any, ...]] = (typer.Exit, typer.Abort, typer.BadParameter.__mro__[2])


class _Console(Console):
    """Shows every character: none of a stranger's text steers the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, keep="\n"), **options)


out = _Console()
err = _Console(stderr=True)


class _Group(TyperGroup):
    """Shows every failure as one sentence instead of a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        with errors():
            return super().invoke(ctx)


@contextmanager
def errors() -> Iterator[None]:
    """Shows a failure as one sentence and exits with 1.

    What is no error of ours is a stranger's file that got past all checks, or a mistake here: its
    class is named, and the environment variable `ST_EMBFILTER_TRACEBACK` lets it through.
    """
    try:
        yield
    except EmbedFilterError as error:
        sentence, cause = str(error), cast("Exception", error)
    except _OF_TYPER:
        raise
    except BaseException as error:
        if not is_failure(error) or os.environ.get(TRACEBACK):
            raise
        sentence = f"{type(error).__name__}: {first_line(error)}; set {TRACEBACK}=1 to see where"
        cause = cast("Exception", error)
    else:
        return
    err.print(f"[bold red]Error:[/] {escape(sentence)}", highlight=False)
    raise typer.Exit(1) from cause


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Better and smaller zero-shot text embeddings from any decoder language model.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"st-embfilter {version('st-embfilter')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    # A callback keeps typer from promoting a lone command to the root.
    pass


def parse_keep(text: str) -> float | int:
    """A ratio ("0.5", "1/4") or a number of directions ("448")."""
    try:
        if "/" in text:
            numerator, denominator = text.split("/")
            return int(numerator) / int(denominator)
        if text == "1":
            err.print("Note: --keep 1 keeps one direction; 1.0 keeps all.", highlight=False)
        return float(text) if any(c in text for c in ".eE") else int(text)
    except (ValueError, ArithmeticError) as error:
        raise typer.BadParameter(
            f"keep must be a ratio like 0.5 or 1/4, or a number of directions, got {text!r:.60}"
        ) from error


def check_device(name: str | None) -> str | None:
    """The name of a device, if torch has it here."""
    if name is not None:
        import torch

        try:
            torch.zeros(1, device=name)
        except Exception as error:  # torch has a class of its own for each way to have none
            raise typer.BadParameter(
                f"must be a device that torch has here (cpu, cuda, mps), got {name!r}: "
                f"{first_line(error)}"
            ) from error
    return name


def parse_layers(text: str) -> float | int:
    """A number of blocks ("6", "0") or a ratio of them ("1/3")."""
    try:
        return parse_keep(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(
            f"layers must be a number of blocks like 6, or a ratio like 1/3, got {text!r}"
        ) from error


Layers = typer.Option(
    "--layers",
    help="Blocks of the model that are used (6, or 1/3 of them; 0: token embeddings alone).",
)
Model = Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")]
Keep = Annotated[
    str,
    typer.Option(
        help="Ratio of directions kept (0.5, 1/4; 1.0 for all) or their number (448; 1 for one)."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps. (default: the best)", callback=check_device)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
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


def describe(layer: EmbedFilterLayer | FilterMetadata) -> str:
    """One line about a filter."""
    metadata = getattr(layer, "metadata", layer)
    start = metadata.band.start(metadata.d)
    window = "" if start is None else f", directions {start} to {start + metadata.k - 1}"
    depth = metadata.depth
    blocks = "" if depth is None else f", {depth.layers} of {depth.of} blocks"
    return f"{metadata.band} band, {metadata.k} of {metadata.d} dimensions{window}{blocks}"


def escape(text: str) -> str:
    """Text that is no markup."""
    return markup.escape(text)


def quiet_libraries(model: str | Path, quiet: bool) -> None:
    """Turns off bars and reports of other libraries that say nothing about the user's command.

    Must run before they are imported: they read the environment then. Downloads keep their bars
    unless the user asked for quiet.
    """
    if quiet or os.path.isdir(model):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        for name in ("sentence_transformers", "st_embfilter"):
            logging.getLogger(name).setLevel(logging.ERROR)
