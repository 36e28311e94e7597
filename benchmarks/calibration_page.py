"""docs/calibration.md from the rows of `benchmarks/calibration.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from st_embfilter.spectrum.whitening import DEFAULT_STRENGTH

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROWS = DOCS / "calibration.jsonl"
SAMPLING = DOCS / "sampling.jsonl"
PAGE = DOCS / "calibration.md"

Row = dict[str, Any]

RECIPES = {
    "static": "Static (`layers=0`)",
    "plain": "Mean pooling",
    "prompteol": "PromptEOL",
    "echo": "ECHO",
}
WINDOWS = {1.0: "full", 0.75: "3/4", 0.5: "1/2", 0.25: "1/4"}
STRENGTHS = (0.25, 0.5, 0.75, 1.0)

#: What a setting must gain on average to be recommended, x 100.
WANTED = 1.0
MODELS = 3

HEAD = """# Calibration

Written by `benchmarks/calibration.py` (`make calibration DATA=... MODELS="NAME=FOLDER ..."`); rows
with their intervals are in `calibration.jsonl`.

Beyond the paper, and off unless asked for. The filter picks directions without data; inside the
kept window the embeddings of a language model still lie in a narrow cone. Calibration centres and
whitens them there: the mean *m* and the covariance *S* of the filtered embeddings *y* of some
texts, shrunk by Ledoit and Wolf's formula, give the map

    z = S^(-a/2) (y - a m)

with the strength *a* from 0 (the filter alone) to 1 (whitening). It is folded into the filter: one
`Dense` layer with a bias, or one table of a static model, which loads wherever the plain form
loads. No variance is taken for smaller than a ten-thousandth of the largest, so the map's condition
number is at most 100. The root of *S* is the symmetric one, which keeps each output at its singular
direction, so the outputs keep the filter's nested order.

| `calibrate=` | texts |
|-|-|
| `"generic"` | 1,024 short English texts that come with the package: SmolLM2-135M-Instruct \
(Apache-2.0) wrote them, `benchmarks/generic_texts.py` makes them again and checks them \
against the evaluation texts |
| `"self"` | texts that the language model samples, at temperature 1 from the start of a document; \
no prompt, so they are what the model takes for text |
| a list (`--calibrate FILE`) | your own, one a line; many subjects, not only those to tell apart |

```python
import st_embfilter

st_embfilter.from_causal_lm(name, prompt="prompteol", keep=0.75, calibrate="generic")
st_embfilter.from_causal_lm(name, layers=0, keep=0.75, calibrate="generic", calibration_strength=1)
```

`embfilter.json` records source, number, hash and seed of the texts, strength and shrinkage, and
`st-embfilter verify --rebuild` repeats it: `generic` and `self` without more, own texts with
`--texts`.

`self` starts each text with the token that the tokenizer puts in front of one, or with the
separator of documents, `<|endoftext|>`, where the vocabulary has it. If there is neither, and BOS
is part of a chat's markup, a `SampleWarning` names the token, for the model will write a chat's
roles. The same warning reports samples of which more than a quarter are empty, repeat another one
or themselves, or begin alike.

Held against every text of the four evaluation sets, training and development texts too, none of the
generic texts has the same words as one of them or shares half of their runs of three words with it;
two share a run of eight words with Banking77, "and I'm not sure what to do".
"""

MEASURED = """## Measured

Scores x 100: STSBenchmark Spearman (test), Banking77 accuracy (one draw of 8 examples a class, 20
test texts a class), StackOverflow v-measure (3 samples of 3,000 titles), SciFact nDCG@10
(1,500 abstracts), Paraphrases nDCG@10 of the project's demo texts, which avoid each other's words.
A gain is the difference to the filter alone with the same window; in parentheses its 95 % paired
bootstrap interval. "Own" are texts of the task's own kind that it neither scores nor learns from:
the development pairs of STSBenchmark, other training texts of Banking77, other titles of
StackOverflow.
The models are dequantised GGUF files; Qwen's, Gemma's with ECHO and all for SciFact are in
bfloat16. What is not in a table has not been measured.
"""


def is_(row: Row, **wanted: Any) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def gain(row: Row) -> str:
    return f"{100 * row['delta']:+.1f}"


def with_interval(row: Row) -> str:
    text = f"{100 * row['score']:.1f}"
    if "low" in row:
        text += f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
    return text


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    marks = "|".join("-" if i == 0 else "-:" for i in range(len(head)))
    return [f"| {' | '.join(head)} |", f"|{marks}|", *(f"| {' | '.join(r)} |" for r in body), ""]


def average(rows: Iterable[Row], key: str = "score") -> float:
    return 100 * mean(row[key] for row in rows)


def summary(rows: Sequence[Row]) -> str:
    """Mean gain, and on how many of the cases it is beyond its interval."""
    if not rows:
        return ""
    up = sum(row.get("low", 0) > 0 for row in rows)
    down = sum(row.get("high", 0) < 0 for row in rows)
    return f"{average(rows, 'delta'):+.1f} ({up} up, {down} down of {len(rows)})"


def names(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def settings(rows: Sequence[Row], texts: str = "generic") -> list[Row]:
    return [row for row in rows if is_(row, texts=texts, size=1024, shrinkage=None)]


def strengths(rows: Sequence[Row]) -> list[str]:
    """Every strength in every window, a recipe a column."""
    here = settings(rows)
    if not here:
        return ["Nothing yet.", ""]
    recipes = [recipe for recipe in RECIPES if any(is_(row, recipe=recipe) for row in here)]
    lines = ["### Strength and window (generic texts)", ""]
    lines += [
        "Mean score over models and tasks, the mean gain over the filter alone in that window, and",
        "on how many of them it is beyond the interval.",
        "",
    ]
    for recipe in recipes:
        models = names([row for row in here if is_(row, recipe=recipe)], "model")
        lines.append(f"- {RECIPES[recipe]}: {', '.join(models)}")
    lines.append("")
    body = []
    for keep, window in WINDOWS.items():
        alone = [row for row in rows if is_(row, texts="none", keep=keep)]
        cells = [[row for row in alone if is_(row, recipe=recipe)] for recipe in recipes]
        body.append([f"{window}, alone", *(f"{average(c):.1f}" if c else "" for c in cells)])
        for strength in STRENGTHS:
            of = [r for r in here if is_(r, keep=keep, strength=strength)]
            cells = [[row for row in of if is_(row, recipe=recipe)] for recipe in recipes]
            body.append(
                [
                    f"{window}, {strength:g}",
                    *(f"{average(c):.1f}, {summary(c)}" if c else "" for c in cells),
                ]
            )
    return lines + table(["window, strength", *(RECIPES[recipe] for recipe in recipes)], body)


def each_model(rows: Sequence[Row]) -> list[str]:
    """Scores of every model and task at 3/4."""
    lines = ["### Each model (3/4 of the directions, generic texts)", ""] if rows else []
    for recipe, title in RECIPES.items():
        here = [row for row in rows if is_(row, recipe=recipe, keep=0.75, shrinkage=None)]
        tasks = names(here, "task")
        body = []
        for model in names(here, "model"):
            for strength in (0.0, *STRENGTHS):
                kind = {"texts": "generic", "size": 1024} if strength else {"texts": "none"}
                cells = []
                for task in tasks:
                    found = [
                        row
                        for row in here
                        if is_(row, model=model, task=task, strength=strength, **kind)
                    ]
                    cells.append(with_interval(found[0]) if found else "")
                body.append([f"{model}, {strength:g}" if strength else f"{model}, alone", *cells])
        if body:
            lines += [f"**{title}**", "", *table(["model, strength", *tasks], body)]
    return lines


def compared(
    rows: Sequence[Row],
    title: str,
    columns: Sequence[tuple[str, Callable[[Row], bool]]],
    windows: Sequence[float] = (0.75,),
) -> list[str]:
    """Mean gains of several choices on those cases (model, recipe, task) that have them all."""
    body = []
    for recipe, name in RECIPES.items():
        for keep in windows:
            for strength in (0.25, 0.5, 1.0):
                here = [
                    row for row in rows if is_(row, recipe=recipe, keep=keep, strength=strength)
                ]
                sides = [
                    {(row["model"], row["task"]): row for row in here if chosen(row)}
                    for _, chosen in columns
                ]
                both = set.intersection(*(set(side) for side in sides))
                if both:
                    cells = [summary([side[key] for key in sorted(both)]) for side in sides]
                    body.append([f"{name}, {WINDOWS[keep]}, {strength:g}", *cells])
    if not body:
        return []
    return [f"### {title}", "", *table(["", *(label for label, _ in columns)], body)]


def own_by_task(rows: Sequence[Row]) -> list[str]:
    """Mean gains of generic and of own texts on each task, over those models that have both."""
    body = []
    tasks: list[str] = []
    for recipe, name in RECIPES.items():
        for strength in (0.25, 0.5, 1.0):
            here = [
                row
                for row in rows
                if is_(row, recipe=recipe, keep=0.75, strength=strength, size=1024, shrinkage=None)
            ]
            sides = {
                texts: {(row["task"], row["model"]): row for row in here if row["texts"] == texts}
                for texts in ("generic", "own")
            }
            both = sorted(set(sides["generic"]) & set(sides["own"]))
            tasks = tasks or list(dict.fromkeys(task for task, _ in both))
            cells = []
            for task in tasks:
                keys = [key for key in both if key[0] == task]
                cells += [summary([side[key] for key in keys]) for side in sides.values()]
            if both:
                body.append([f"{name}, {strength:g}", *cells])
    if not body:
        return []
    head = ["", *(f"{task}, {texts}" for task in tasks for texts in ("generic", "own"))]
    return [
        "### Generic texts or the task's own, inside 3/4",
        "",
        "Whitening makes small what the texts that it is fitted on vary most in. Own texts of many",
        "subjects (STSBenchmark) are better than generic ones. Where they are all about the few",
        "subjects that are to be told apart (StackOverflow, Banking77), it makes those small: take",
        "generic ones there; a static model loses on StackOverflow already at strength 1/4.",
        "",
        *table(head, body),
    ]


def others(rows: Sequence[Row]) -> list[str]:
    def of(texts: str, size: int = 1024, shrinkage: float | None = None) -> Callable[[Row], bool]:
        return lambda row: is_(row, texts=texts, size=size, shrinkage=shrinkage)

    return [
        *own_by_task(rows),
        *compared(
            rows,
            "Generic texts or the task's own, other windows",
            [(texts, of(texts)) for texts in ("generic", "own")],
            tuple(keep for keep in WINDOWS if keep != 0.75),
        ),
        *compared(
            rows,
            "Generic texts or the model's own, 256 of each",
            [(texts, of(texts, 256)) for texts in ("generic", "self")],
        ),
        *compared(
            rows,
            "Number of generic texts",
            [(f"{n:,}", of("generic", n)) for n in (128, 256, 1024)],
        ),
        *compared(
            rows,
            "Number of own texts",
            [(f"{n:,}", of("own", n)) for n in (128, 256, 1024)],
        ),
        *compared(
            rows,
            "Shrinkage (generic texts)",
            [("Ledoit and Wolf", of("generic"))]
            + [(f"{s:g}", of("generic", 1024, s)) for s in (0.0, 0.1, 0.3)],
        ),
    ]


def templates(rows: Sequence[Row]) -> list[str]:
    """PromptEOL beside the other templates for one word, on the same pairs."""
    here = [row for row in rows if "pairs" in row["task"]]
    if not here:
        return []
    body = []
    for model in names(here, "model"):
        for recipe in names(here, "recipe"):
            mine = [row for row in here if is_(row, model=model, recipe=recipe)]
            alone = {row["keep"]: f"{100 * row['score']:.1f}" for row in mine if row["size"] == 0}
            cells = [alone.get(keep, "") for keep in (1.0, 0.75, 0.5)]
            for strength in (0.25, 1.0):
                found = [row for row in mine if is_(row, keep=0.75, strength=strength, size=256)]
                cells.append(with_interval(found[0]) if found else "")
            body.append([f"{model}, {recipe}", *cells])
    lines = [
        "### Templates that ask for one word",
        "",
        f"{here[0]['task']} of the test set; `pretended-cot` and `knowledge` are described in",
        "[prompts.md](prompts.md). Calibrated inside 3/4 with 256 generic texts.",
        "",
    ]
    head = ["", "raw", "3/4", "1/2", "3/4, strength 0.25", "3/4, strength 1"]
    return lines + table(head, body)


def speed(rows: Sequence[Row]) -> list[str]:
    """How fast texts are sampled."""
    if not rows:
        return []
    body = [
        [
            f"{row['model']}, {row['dtype']}",
            f"{row['before']:.2f}",
            f"{row['now']:.2f}",
            f"{row['now'] / row['before']:.1f}",
            f"`{row['start']}`".replace("|", "\\|"),
            ", ".join(f"{share:.0%} {flaw}" for flaw, share in row["flaws"].items() if share)
            or "none",
        ]
        for row in rows
    ]
    head = [
        "model, dtype of its weights",
        "before",
        "now",
        "times",
        "start",
        "flaws of the samples",
    ]
    return [
        "### Sampling (`self`)",
        "",
        f"Texts of {rows[0]['tokens']} tokens for each second of one core, by",
        "`python -m benchmarks.sampling`. Before: 64 at a time by `generate`, in the dtype of the",
        f"weights; now: 256 by `model/decode.py`, in {rows[0]['computed']}, which is fast on this",
        "processor. The machine had other work: trust the ratios.",
        "",
        *table(head, body),
    ]


# The verdict --------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A window and a strength: mean score, mean gain x 100, and losses beyond the interval."""

    keep: float
    strength: float
    score: float
    gain: float
    losses: list[Row]

    def __str__(self) -> str:
        found = f"{WINDOWS[self.keep]} with strength {self.strength:g}"
        return f"{found}, {self.gain:+.1f} to {self.score:.1f}"


def candidates(rows: Sequence[Row]) -> list[Setting]:
    """Every setting, the highest score first."""
    here = [row for row in settings(rows) if row["keep"] < 1]
    found = []
    for keep in WINDOWS:
        for strength in STRENGTHS:
            mine = [row for row in here if is_(row, keep=keep, strength=strength)]
            if mine:
                losses = [row for row in mine if row.get("high", 0) < 0]
                delta = average(mine, "delta")
                found.append(Setting(keep, strength, average(mine), delta, losses))
    return sorted(found, key=lambda one: -one.score)


def verdict(rows: Sequence[Row]) -> list[str]:
    """Whether one setting is to be recommended, for all recipes and for each of them."""
    lines = [
        "## What holds",
        "",
        f"A setting of `generic` is recommended if it gains at least {WANTED:g} over the filter",
        "alone in its window, on average over all three models, and no task loses beyond its",
        "interval; the one with the highest mean score of them. It is picked on these very data.",
        "",
        *([] if rows else ["No model has been measured yet with the generic texts.", ""]),
    ]
    default = [
        row for row in settings(rows) if is_(row, strength=DEFAULT_STRENGTH) and row["keep"] < 1
    ]
    if default:
        windows = ", ".join(WINDOWS[keep] for keep in WINDOWS if keep < 1)
        lines += [
            f"- **The default strength, {DEFAULT_STRENGTH:g}**, in the windows {windows}, over all "
            f"models, recipes and tasks: {summary(default)}."
        ]
    groups = [("All recipes together", list(rows))]
    groups += [(title, [r for r in rows if is_(r, recipe=name)]) for name, title in RECIPES.items()]
    for title, here in groups:
        found = candidates(here)
        if not found:
            continue
        models = names(here, "model")
        good = [one for one in found if one.gain >= WANTED and not one.losses]
        said = f"- **{title}** ({', '.join(models)}): "
        if good:
            said += f"{good[0]}, no loss"
            if len(models) < MODELS:
                said += "; not a recommendation before all three are measured"
        else:
            said += f"none. Best on average: {found[0]}"
            if found[0].losses:
                said += ", which loses on " + "; ".join(
                    f"{row['model']} {row['recipe']} {row['task']} ({gain(row)})"
                    for row in found[0].losses
                )
        lines.append(said + ".")
    return [*lines, ""]


def write_page(rows: Sequence[Row]) -> None:
    lines = SAMPLING.read_text(encoding="utf-8").splitlines() if SAMPLING.is_file() else []
    full = [row for row in rows if "pairs" not in row["task"]]
    parts = [HEAD, *verdict(full), MEASURED, *strengths(full), *each_model(full), *others(full)]
    parts += [*templates(rows), *speed([json.loads(line) for line in lines])]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
