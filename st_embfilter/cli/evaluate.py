"""`st-embfilter eval`: options to data, a sweep or a search, rows to files and tables."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from st_embfilter.cli.app import (
    LENGTH,
    Device,
    Quiet,
    RemoteCode,
    Revision,
    app,
    out,
    parse_keep,
    quiet_libraries,
)
from st_embfilter.cli.tables import print_results, print_search

if TYPE_CHECKING:
    from st_embfilter.evaluation.baselines import Configuration
    from st_embfilter.evaluation.search import WindowSearch
    from st_embfilter.evaluation.sweep import RawModel
    from st_embfilter.evaluation.tasks import Splittable, Task
    from st_embfilter.saved.results import Result

Files = list[Path] | None


def _panel(title: str) -> Any:
    """A maker of options that the help shows in a panel of this title."""

    def option(*names: str, help: str, **more: Any) -> Any:  # noqa: A002
        return typer.Option(*names, help=help, rich_help_panel=title, **more)

    return option


_data = _panel("Data")
_what = _panel("What is measured")
_choice = _panel("Window search")


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a causal language model or a filtered model.")
    ],
    task: Annotated[
        list[str] | None, _data("--task", "-t", help="MTEB task by name; repeatable.")
    ] = None,
    preset: Annotated[str | None, _data(help="embedfilter-paper (49 tasks) or quick (7).")] = None,
    sts: Annotated[Files, _data(help="CSV/TSV: sentence1, sentence2, score; repeatable.")] = None,
    retrieval: Annotated[Files, _data(help="BEIR folder; repeatable.")] = None,
    classification: Annotated[
        Files, _data(help="Folder with train.csv and test.csv: text, label; repeatable.")
    ] = None,
    clustering: Annotated[
        Files, _data(help="CSV/TSV: text, label; or a .txt beside labels.txt; repeatable.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        _what(help="Ratio or number of dimensions; repeatable. (default: 1/2 1/4 1/8)"),
    ] = None,
    band: Annotated[
        list[str] | None,
        _what(help="Band; repeatable. folded: of the norm's gain too. (default: bulk)"),
    ] = None,
    baselines: Annotated[bool, _what(help="Compare with truncation, PCA, ...")] = True,
    fit_texts: Annotated[
        Path | None,
        _what(
            help="Texts, one a line, for the baselines that need data. (default: the task's own)"
        ),
    ] = None,
    prompt: Annotated[str | None, _what(help="Prompt recipe.")] = None,
    pooling: Annotated[str | None, _what(help="mean, lasttoken, ...")] = None,
    layers: Annotated[
        str | None, _what(help="Depths, from one encoding: all, or numbers like 0,6,12.")
    ] = None,
    normalize: Annotated[bool, _what("--normalize", help="Unit length everywhere.")] = False,
    max_seq_length: Annotated[int, _what(help="Longest text in tokens.", min=1)] = LENGTH,
    search: Annotated[
        bool,
        _choice(
            "--search",
            help="Choose a window, and one of --layers, on --dev; judge it on the data above.",
        ),
    ] = False,
    dev: Annotated[
        Files, _choice(help="STS pairs that choose. (default: half of each local task's data)")
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
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Measure what the filter does for a model, on MTEB tasks or your own data."""
    keeps = [parse_keep(text) for text in keep or ()]
    quiet_libraries(model, quiet)
    logging.getLogger("mteb").setLevel(logging.ERROR)
    # Every file is read before the model: a typing error must not cost minutes.
    data = Data.read(sts, retrieval, classification, clustering, dev=dev, fit_texts=fit_texts)
    names = [*(task or ()), *((preset,) if preset else ())]
    if not data.local and not names:
        raise typer.BadParameter(
            "give data to measure on: --task or --preset (MTEB, downloads), --sts, --retrieval, "
            "--classification or --clustering (files)"
        )
    if dev and not search:
        raise typer.BadParameter("--dev belongs to --search")
    depths = None if layers is None else _depths(layers)
    from st_embfilter.evaluation.baselines import FOLDED
    from st_embfilter.evaluation.sweep import raw_model, sweep
    from st_embfilter.files.staging import check_file
    from st_embfilter.saved.layout import RESULTS_FILE

    for file in filter(None, (output, figure)):
        check_file(file)
    raw = raw_model(
        model,
        prompt=prompt,
        pooling=pooling,
        normalize=normalize,
        max_seq_length=max_seq_length,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        folded=any(name.partition(":")[0] == FOLDED for name in band or ()),
        show_progress_bar=not quiet,
    )
    if output is None and not search and raw.layer is not None and os.path.isdir(model):
        output = Path(model, RESULTS_FILE)
    tasks = [*data.local, *_mteb_tasks(raw, names)]
    how: dict[str, Any] = {
        "cache": None if no_cache else cache or _default_cache(),
        "batch_size": batch_size,
        "show_progress_bar": not quiet,
    }
    found = _search(raw, data, tasks, {**how, "layers": depths}) if search else None
    rows = save(
        sweep(
            raw,
            tasks,
            configurations(raw, band, keeps, baselines),
            layers=depths,
            fit_texts=data.sample,
            **how,
        )
        if found is None
        else [*found.scan, *found.held_out],
        output,
    )
    if found is None:
        print_results(rows)
    else:
        measured = _options(
            prompt=prompt,
            pooling=pooling,
            normalize=normalize,
            max_seq_length=None if max_seq_length == LENGTH else max_seq_length,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        print_search(found, model, measured)
    if figure is not None:
        from st_embfilter.evaluation import figures
        from st_embfilter.lens.figures import save_figure

        if found is not None:
            there = [row for row in found.scan if row.layers == found.layers]
            drawn = figures.window_figure(there)
        else:
            drawn = (figures.score_figure if depths is None else figures.depth_figure)(rows)
        save_figure(drawn, figure)
    for file in filter(None, (output, figure)):
        out.print(f"Saved to {file}", highlight=False)


def _options(**given: object) -> list[str]:
    """Options as a shell has them, without those that are None or False."""
    said = []
    for name, value in given.items():
        if value is not None and value is not False:
            flag = f"--{name.replace('_', '-')}"
            said += [flag] if value is True else [flag, str(value)]
    return said


@dataclass(frozen=True)
class Data:
    """What the user's files hold.

    Attributes:
        local: Tasks on the files.
        chooses: Tasks that choose a window.
        sample: Texts that data-driven baselines are fitted on, None for the tasks' own.
    """

    local: Sequence[Splittable]
    chooses: Sequence[Task]
    sample: Sequence[str] | None

    @classmethod
    def read(
        cls,
        sts: Files,
        retrieval: Files,
        classification: Files,
        clustering: Files,
        *,
        dev: Files,
        fit_texts: Path | None,
    ) -> Data:
        """Reads files and folders as the options of the same names describe them.

        Raises:
            DataError: If one of them is missing or malformed.
        """
        from st_embfilter.evaluation import tasks
        from st_embfilter.evaluation.data import read_texts

        local: list[Splittable] = [tasks.STSTask.read(file) for file in sts or ()]
        local += [tasks.RetrievalTask.read(folder) for folder in retrieval or ()]
        local += [tasks.ClassificationTask.read(folder) for folder in classification or ()]
        local += [tasks.ClusteringTask.read(file) for file in clustering or ()]
        return cls(
            local,
            [tasks.STSTask.read(file) for file in dev or ()],
            None if fit_texts is None else read_texts(fit_texts),
        )


def configurations(
    raw: RawModel, band: list[str] | None, keeps: list[float | int], baselines: bool
) -> list[Configuration]:
    """What was asked for; by default what a saved model is, or the filter at the paper's ratios.

    Args:
        raw: The unfiltered model.
        band: Bands as text, None for the default.
        keeps: Ratios or numbers of dimensions, empty for the default.
        baselines: Whether everything else is measured too.
    """
    from st_embfilter.evaluation.baselines import FOLDED, RATIOS, baseline_names, grid

    filters, widths = band or ["bulk"], keeps or list(RATIOS)
    if raw.layer is not None:
        metadata = raw.layer.metadata
        calibrated = [] if metadata.calibration is None else ["calibrated"]
        own = str(metadata.band) if metadata.norm is None else f"{FOLDED}:{metadata.band}"
        filters = band or [*calibrated, own.removesuffix(":bulk")]
        widths = keeps or [max(1, metadata.k // ratio) for ratio in (1, 2, 4)]
    compared = [name for name in baseline_names() if baselines and name not in filters]
    return grid([*filters, *compared], widths)


def save(rows: Iterable[Result], output: Path | None) -> list[Result]:
    """Rows as they come, with the command line that gave them, and the file of all of them.

    An interruption leaves older results as they are and keeps what was measured in a file beside
    them, NAME.partial.jsonl.
    """
    from st_embfilter.saved.results import write_results

    command = shlex.join(["st-embfilter", *sys.argv[1:]])
    kept: list[Result] = []
    try:
        for row in rows:
            kept.append(replace(row, command=command))
    except BaseException:
        if output is not None and kept:
            write_results(kept, output.with_name(f"{output.stem}.partial{output.suffix}"))
        raise
    if output is not None:
        write_results(kept, output)
    return kept


def _search(raw: RawModel, data: Data, tasks: Sequence[Task], how: dict[str, Any]) -> WindowSearch:
    from st_embfilter.evaluation.search import search_window

    chooses = data.chooses
    if not chooses:
        if len(data.local) < len(tasks):
            raise typer.BadParameter("a search on MTEB tasks needs --dev, data that choose")
        halves = [task.halves() for task in data.local]
        chooses, tasks = [first for first, _ in halves], [second for _, second in halves]
    return search_window(raw, chooses, tasks, **how)


def _depths(text: str) -> list[int] | Literal["all"]:
    """The depths that --layers names."""
    if text == "all":
        return "all"
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--layers takes all, or numbers of blocks like 0,6,12, got {text!r}"
        ) from error


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


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st-embfilter"
