"""Tables of scores on a model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from st_embfilter.saved.card_facts import CardFacts
from st_embfilter.saved.results import Result
from st_embfilter.text import code, inline

_TABLE_COLUMNS: Final = 8


def tables(facts: CardFacts, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Tables of at most eight datasets: raw and this model's band in its widths, one a row."""
    shown = [
        result
        for result in results
        if result.configuration == "raw"
        or (result.configuration == facts.own and result.dims <= facts.k)
    ]
    settings = sorted({(r.configuration != "raw", -r.dims, r.configuration) for r in shown})
    columns = list(dict.fromkeys((r.task, r.dataset, r.split, r.metric) for r in shown))
    cells = {((r.task, r.dataset, r.split, r.metric), r.configuration, r.dims): r for r in shown}
    for first in range(0, len(columns), _TABLE_COLUMNS):
        part = columns[first : first + _TABLE_COLUMNS]
        yield {
            "head": [inline(dataset) for _, dataset, _, _ in part],
            "rows": [
                (configuration, -dims, [_cell(cells.get((c, configuration, -dims))) for c in part])
                for _, dims, configuration in settings
            ],
            "notes": list(_notes(part)),
            "intervals": any(result.delta_low is not None for result in shown),
        }


def _notes(columns: Sequence[tuple[str, str, str, str]]) -> Iterator[str]:
    """What the columns of a table are, those of one kind in one line."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for task, dataset, split, metric in columns:
        kinds.setdefault((task, split, metric), []).append(dataset)
    for (task, split, metric), datasets in kinds.items():
        names = "all columns" if len(kinds) == 1 < len(datasets) else ", ".join(datasets)
        yield f"{inline(names)}: {inline(task)}, {inline(split)}, {code(metric)}"


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    text = f"{100 * result.score:.2f}"
    if result.delta is not None and result.configuration != "raw":
        interval = (
            ""
            if result.delta_low is None or result.delta_high is None
            else f", {100 * result.delta_low:+.2f} to {100 * result.delta_high:+.2f}"
        )
        text += f" ({100 * result.delta:+.2f}{interval})"
    return text
