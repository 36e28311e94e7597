"""`st-embfilter eval`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from st_embfilter.cli.app import Quiet, app, escape, out, parse_keep, quiet_libraries

if TYPE_CHECKING:
    from st_embfilter.evaluation.baselines import Configuration
    from st_embfilter.evaluation.search import WindowSearch
    from st_embfilter.evaluation.sweep import RawModel
    from st_embfilter.evaluation.tasks import Splittable, Task
    from st_embfilter.saved.results import Result

_DATA = "Data"
_WHAT = "What is measured"
_SEARCH = "Window search"

Files = list[Path] | None


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st-embfilter"


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Causal language model (folder or Hub id) or filtered folder.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="MTEB task by name; repeatable.", rich_help_panel=_DATA),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="embedfilter-paper (49 tasks) or quick (7).", rich_help_panel=_DATA),
    ] = None,
    sts: Annotated[
        Files,
        typer.Option(
            help="CSV/TSV: sentence1, sentence2, score; repeatable.", rich_help_panel=_DATA
        ),
    ] = None,
    retrieval: Annotated[
        Files, typer.Option(help="BEIR folder; repeatable.", rich_help_panel=_DATA)
    ] = None,
    classification: Annotated[
        Files,
        typer.Option(
            help="Folder with train.csv and test.csv: text, label; repeatable.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    clustering: Annotated[
        Files,
        typer.Option(
            help="CSV/TSV: text, label; or a .txt beside labels.txt; repeatable.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Ratio or number of dimensions; repeatable. (default: 1/2 1/4 1/8)",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    band: Annotated[
        list[str] | None,
        typer.Option(help="Band; repeatable. (default: bulk)", rich_help_panel=_WHAT),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(help="Compare with truncation, PCA, ...", rich_help_panel=_WHAT),
    ] = True,
    fit_texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts, one a line, for the baselines that need data. (default: the task's own)",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt recipe.", rich_help_panel=_WHAT)
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean, lasttoken, ...", rich_help_panel=_WHAT)
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Unit length everywhere.", rich_help_panel=_WHAT)
    ] = False,
    max_seq_length: Annotated[
        int, typer.Option(help="Longest text in tokens.", min=1, rich_help_panel=_WHAT)
    ] = 512,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Choose a window on --dev, judge it on the data above.",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
    dev: Annotated[
        Files,
        typer.Option(
            help="STS pairs that choose. (default: half of each local task's data)",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Rows as .jsonl or .csv. (default: results.jsonl in a filtered folder)",
        ),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Figure: .png or .svg.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for raw vectors. (default: the user's cache)")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no raw vectors.")] = False,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps. (default: best)")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure what the filter does for a model, on MTEB tasks or your own data."""
    keeps = [parse_keep(text) for text in keep or ()]
    quiet_libraries(model, quiet)
    logging.getLogger("mteb").setLevel(logging.ERROR)
    from st_embfilter.evaluation.data import read_texts
    from st_embfilter.evaluation.sweep import raw_model, sweep
    from st_embfilter.evaluation.tasks import (
        ClassificationTask,
        ClusteringTask,
        RetrievalTask,
        STSTask,
    )
    from st_embfilter.model.metadata import METADATA_FILE
    from st_embfilter.saved.results import RESULTS_FILE, write_results

    # Every file is read before the model: a typing error must not cost minutes.
    local: list[Splittable] = [STSTask.read(file) for file in sts or ()]
    local += [RetrievalTask.read(folder) for folder in retrieval or ()]
    local += [ClassificationTask.read(folder) for folder in classification or ()]
    local += [ClusteringTask.read(file) for file in clustering or ()]
    chooses: list[Task] = [STSTask.read(file) for file in dev or ()]
    sample = None if fit_texts is None else read_texts(fit_texts)
    names = [*(task or ()), *((preset,) if preset else ())]
    if not local and not names:
        raise typer.BadParameter(
            "give data to measure on: --task or --preset (MTEB, downloads), --sts, --retrieval, "
            "--classification or --clustering (files)"
        )
    if dev and not search:
        raise typer.BadParameter("--dev belongs to --search")
    raw = raw_model(
        model,
        prompt=prompt,
        pooling=pooling,
        normalize=normalize,
        max_seq_length=max_seq_length,
        device=device,
        show_progress_bar=not quiet,
    )
    configurations = _configurations(raw, band, keeps, baselines)
    tasks: list[Task] = [*local, *_mteb_tasks(raw, names)]
    place = None if no_cache else cache or _default_cache()
    command = shlex.join(["st-embfilter", *sys.argv[1:]])
    if output is None and not search and (Path(model) / METADATA_FILE).is_file():
        output = Path(model) / RESULTS_FILE
    if search:
        rows = _search(raw, local, tasks, chooses, model, place, batch_size, figure, quiet)
        rows = [replace(row, command=command) for row in rows]
        if output is not None:
            write_results(rows, output)
    else:
        rows = []
        try:
            for row in sweep(
                raw,
                tasks,
                configurations,
                fit_texts=sample,
                cache=place,
                batch_size=batch_size,
                show_progress_bar=not quiet,
            ):
                rows.append(replace(row, command=command))
        except BaseException:
            # Older results stay as they are, and what was measured is not lost.
            if output is not None and rows:
                write_results(rows, output.with_name(f"{output.stem}.partial{output.suffix}"))
            raise
        if output is not None:
            write_results(rows, output)
        show(rows)
        if figure is not None:
            from st_embfilter.evaluation.figures import score_figure
            from st_embfilter.lens.figures import save_figure

            save_figure(score_figure(rows), figure)
    for file in filter(None, (output, figure)):
        out.print(f"Saved to {file}", highlight=False)


def show(rows: Sequence[Result]) -> None:
    """Prints one table for each task."""
    for name, split in dict.fromkeys((row.task, row.split) for row in rows):
        here = [row for row in rows if (row.task, row.split) == (name, split)]
        first = here[0]
        table = Table(
            title=escape(f"{name} ({split}): {first.metric} x 100, {first.units:,} units"),
            title_justify="left",
        )
        table.add_column("")
        for column in ("dims", "score", "to raw", f"{first.level:.0%} interval"):
            table.add_column(column, justify="right")
        table.add_column("")
        for row in here:
            spread = "" if row.std is None else f" ±{100 * row.std:.1f}"
            table.add_row(
                f"{row.configuration}{' *' if row.needs_data else ''}",
                str(row.dims),
                f"{100 * row.score:.2f}{spread}",
                "" if row is first else f"{100 * row.delta:+.2f}",
                ""
                if row is first or row.delta_low is None or row.delta_high is None
                else f"{100 * row.delta_low:+.2f} to {100 * row.delta_high:+.2f}",
                "" if row is first else row.verdict,
            )
        out.print(table)
    legend = "+ above raw, - below raw, = the interval holds zero, ? no interval"
    if any(row.needs_data for row in rows):
        fitted = next(row.fitted_on for row in rows if row.needs_data)
        legend += f"; * needs data, fitted on {fitted}"
    if any(row.std is not None for row in rows):
        legend += "; ± standard deviation over seeds"
    out.print(legend, highlight=False)


def _configurations(
    raw: RawModel, band: list[str] | None, keeps: list[float | int], baselines: bool
) -> list[Configuration]:
    """What was asked for; by default what a saved model is, or the filter at the paper's ratios."""
    from st_embfilter.evaluation.baselines import RATIOS, baseline_names, grid

    filters, widths = band or ["bulk"], keeps or list(RATIOS)
    if raw.layer is not None:
        metadata = raw.layer.metadata
        calibrated = [] if metadata.calibration is None else ["calibrated"]
        filters = band or [*calibrated, str(metadata.band)]
        widths = keeps or [max(1, metadata.k // ratio) for ratio in (1, 2, 4)]
    compared = [name for name in baseline_names() if baselines and name not in filters]
    return grid([*filters, *compared], widths)


def _mteb_tasks(raw: RawModel, names: Sequence[str]) -> Sequence[Task]:
    if not names:
        return []
    try:
        from st_embfilter.evaluation.mteb import mteb_tasks
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            "MTEB tasks need the extra: pip install 'st-embfilter[eval]'"
        ) from error
    return mteb_tasks(raw.model, names)


def _search(
    raw: RawModel,
    local: Sequence[Splittable],
    tasks: Sequence[Task],
    chooses: Sequence[Task],
    model: str,
    cache: Path | None,
    batch_size: int,
    figure: Path | None,
    quiet: bool,
) -> list[Result]:
    from st_embfilter.evaluation.search import search_window

    if not chooses:
        if len(local) < len(tasks):
            raise typer.BadParameter("a search on MTEB tasks needs --dev, data that choose")
        halves = [task.halves() for task in local]
        chooses, tasks = [first for first, _ in halves], [second for _, second in halves]
    found: WindowSearch = search_window(
        raw, chooses, tasks, cache=cache, batch_size=batch_size, show_progress_bar=not quiet
    )
    show(found.held_out)
    out.print(f"\n{found.warning}", highlight=False)
    out.print(
        f"Build it: st-embfilter build {model} --band {found.band} --keep {found.band.keep} "
        "--output FOLDER",
        highlight=False,
    )
    if figure is not None:
        from st_embfilter.evaluation.figures import window_figure
        from st_embfilter.lens.figures import save_figure

        save_figure(window_figure(found.scan), figure)
    return [*found.scan, *found.held_out]
