"""`st-embfilter lens`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from st_embfilter.cli.app import (
    Layers,
    Quiet,
    RemoteCode,
    Revision,
    app,
    err,
    escape,
    out,
    parse_keep,
    parse_layers,
    quiet_libraries,
)
from st_embfilter.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from st_embfilter.lens.counts import TokenCounts
    from st_embfilter.lens.report import LensReport, Study, Token


@app.command()
def lens(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a filtered model or a causal LM.")
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts to look at.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="For a causal LM: ratio or number of directions kept, 0.5 if not given."),
    ] = None,
    band: Annotated[
        str | None,
        typer.Option(
            help="For a causal LM: bulk, offset:N, dominant, ... or optimal, which is measured."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For a causal LM: prompt recipe.")] = None,
    layers: Annotated[str | None, Layers] = None,
    layer: Annotated[
        str | None, typer.Option(hidden=True, help="The former name of --layers.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Tokens of each text.", min=1)] = 5,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Texts to measure on, a file or a dataset's Hub id; our own if not given."
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the corpus.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset on the Hub.")] = "train",
    counts: Annotated[
        Path | None,
        typer.Option(help="File of token counts: read if it is there, else counted and written."),
    ] = None,
    sample: Annotated[int, typer.Option(help="Texts of the corpus to embed.", min=2)] = 500,
    report: Annotated[Path | None, typer.Option(help="Write everything as an HTML page.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write the figures to this folder.")] = None,
    section: Annotated[
        Path | None, typer.Option(help="Write a Markdown section for the model card.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Show what embeddings say, before and after the filter.

    With texts: their nearest tokens. Without texts, or with a corpus, a
    report or figures: also where frequent tokens live in the spectrum, and
    how evenly the embeddings fill their space.
    """
    width = None if keep is None else parse_keep(keep)
    if layer is not None:
        if layers is not None:
            raise typer.BadParameter("--layer is the former name of --layers; give --layers alone")
        err.print("Note: --layer is now --layers; it goes with the next release.", highlight=False)
        layers = layer
    depth = None if layers is None else parse_layers(layers)
    quiet_libraries(model, quiet)
    from dataclasses import replace

    from st_embfilter.evaluation.demo import SHOWN_TEXTS
    from st_embfilter.lens.counts import Sampler
    from st_embfilter.lens.report import load_tokenizer, look, open_model, study
    from st_embfilter.unembedding.source import Source

    source = Source(model, revision, trust_remote_code=trust_remote_code)
    files = (corpus, counts, report, figures, section)
    measure = not texts or band == "optimal" or any(file is not None for file in files)
    sampler = Sampler(_corpus(corpus, column, split) if measure else (), sample)
    counted = None
    if measure:
        tokenizer = load_tokenizer(source)
        counted = _counts(counts, sampler, tokenizer, show=not quiet)
    opened, unembedding = open_model(
        source,
        keep=width,
        band=band,
        prompt=prompt,
        counts=counted,
        show_progress_bar=not quiet,
    )
    found = look(
        opened,
        unembedding,
        texts or SHOWN_TEXTS,
        name=_name(model),
        layers=depth,
        top_k=top_k,
        show_progress_bar=False,
    )
    if counted is not None:
        measured = study(
            opened,
            unembedding,
            counted,
            sampler.sample,
            layers=depth,
            show_progress_bar=not quiet,
        )
        found = replace(found, study=measured)
    _write(found, report, figures, section)
    if as_json:
        text = json.dumps(found.to_dict(), ensure_ascii=False, indent=2)
        typer.echo("".join(c if visible(c, keep="\n") == c else json.dumps(c)[1:-1] for c in text))
        return
    _print(found)
    for file in (report, figures, section):
        if file is not None:
            out.print(f"Written to {file}", highlight=False)


def _corpus(corpus: str | None, column: str | None, split: str) -> Iterable[str]:
    from st_embfilter.evaluation.demo import Paraphrases, demo_texts
    from st_embfilter.lens.counts import read_texts

    if corpus is None:
        return Paraphrases.read(demo_texts()).texts
    return read_texts(corpus, column, split=split)


def _counts(
    file: Path | None, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, show: bool
) -> TokenCounts:
    from st_embfilter.lens.counts import TokenCounts, count_tokens

    if file is not None and os.path.exists(file):
        for _ in texts:  # the sample is still to be drawn
            pass
        return TokenCounts.load(file)
    counted = count_tokens(texts, tokenizer, show_progress_bar=show)
    if file is not None:
        counted.save(file)
    return counted


def _write(
    found: LensReport, report: Path | None, figures: Path | None, section: Path | None
) -> None:
    from st_embfilter.errors import OutputError
    from st_embfilter.lens.pages import card_section, draw, render_html

    try:
        if report is not None:
            report.write_text(render_html(found), encoding="utf-8")
        if section is not None:
            section.write_text(card_section(found), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {error.filename}: {error.strerror}") from error
    if figures is not None:
        draw(found, figures)


def _name(model: str) -> str:
    folder = Path(model)
    return folder.resolve().name if os.path.isdir(folder) else model


def _print(found: LensReport) -> None:
    title = f"Nearest tokens, {found.band} band, {found.k} of {found.d} dimensions"
    if found.layers is not None:
        title += f", layers = {found.layers}"
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("text", "before the filter", "after"):
        table.add_column(column)
    for text in found.texts:
        table.add_row(escape(text.text), _tokens(text.before), _tokens(text.after))
    out.print(table)
    if found.study is not None:
        _print_study(found.study)


def _tokens(tokens: tuple[Token, ...]) -> str:
    width = max(len(token.visible) for token in tokens)
    lines = (f"{token.visible:{width}} {token.probability:6.2%}" for token in tokens)
    return escape("\n".join(lines))


def _print_study(measured: Study) -> None:
    before, after = measured.before, measured.after
    sides = Table(title=f"Embeddings of {measured.sample:,} texts", title_justify="left")
    for column in ("", "before", "after"):
        sides.add_column(column, justify="right" if column else "left")
    sides.add_row("dimensions", str(before.dims), str(after.dims))
    rows = {
        "frequent tokens among the nearest 10": [
            f"{s.frequent_share:.1%}" for s in (before, after)
        ],
        "mean cosine of two texts": [f"{s.anisotropy.mean_cosine:.3f}" for s in (before, after)],
        "participation ratio": [f"{s.anisotropy.participation_ratio:.1f}" for s in (before, after)],
        "IsoScore": [f"{s.anisotropy.isoscore:.3f}" for s in (before, after)],
    }
    for name, values in rows.items():
        sides.add_row(name, *values)
    out.print(sides)
    shifts = Table(title="Mean shift of the logits by one direction", title_justify="left")
    for column in ("tokens", "largest quarter", "middle half", "smallest quarter", "edges/middle"):
        shifts.add_column(column, justify="left" if column == "tokens" else "right")
    for group in measured.spectroscopy.shifts:
        parts = measured.spectroscopy.edges_and_middle(group)
        edges = (parts["largest"] + parts["smallest"]) / 2
        shifts.add_row(
            group, *(f"{part:.2%}" for part in parts.values()), f"{edges / parts['middle']:.2f}"
        )
    out.print(shifts)
    counts = measured.counts
    out.print(f"Corpus: {counts.total:,} tokens in {counts.texts:,} texts", highlight=False)
