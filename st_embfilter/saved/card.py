"""Model cards: `render` makes one of `CardFacts`; `write_card` is the thin layer over a folder."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from huggingface_hub import hf_hub_download
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import FolderFiles, ModelFiles
from st_embfilter.files.staging import replace_file
from st_embfilter.saved.card_facts import CardFacts, facts_of_files, small_files
from st_embfilter.saved.card_rules import INHERITED, LIBRARY, PIPELINE, TAGS, check_card
from st_embfilter.saved.card_tables import tables
from st_embfilter.saved.cast import stored_dtype
from st_embfilter.saved.layout import (
    CARD_FILE,
    LENS_FILE,
    RESULTS_FILE,
)
from st_embfilter.saved.results import parse_results
from st_embfilter.spectrum.whitening import Calibration
from st_embfilter.text import code, shown, template

#: The Hub knows finetune, adapter, quantized and merge. The filter is none of them to the letter;
#: the first is its word for a model with weights of its own that was made from another.
RELATION: Final = "finetune"

_RATIOS: Final = (2, 4, 8)


def render(facts: CardFacts, *, repo_id: str | None = None) -> str:
    """The card of a model.

    Args:
        facts: What it says.
        repo_id: Hub id that the usage examples name; None for a placeholder.

    Returns:
        Markdown with YAML metadata in front; ends in one newline.
    """
    measured = [result for result in facts.results if result.source is None]
    body = template("card.md.jinja").render(
        facts=facts,
        name=facts.name,
        where=repo_id or f"path/to/{facts.name}",
        base=facts.base_model or "a language model",
        linked=_link(facts),
        window=_window(facts),
        recipe=[] if facts.prompt is None else facts.prompt.labelled(),
        exact=_is_exact(facts),
        widths=_widths(facts),
        measured=list(tables(facts, measured)),
        reported=list(tables(facts, [r for r in facts.results if r.source is not None])),
        sources=sorted({r.source for r in facts.results if r.source is not None}),
        commands="\n".join(
            dict.fromkeys(
                " ".join(_public(r.command).split()) for r in measured if r.command is not None
            )
        ),
        build=_build_command(facts, repo_id),
        licence=facts.inherited.get("license_name") or facts.inherited.get("license"),
    )
    block = yaml_dump(_metadata(facts), sort_keys=False)
    return f"---\n{block}---\n\n{body.strip()}\n"


def card_of_folder(folder: str | os.PathLike[str], *, repo_id: str | None = None) -> str:
    """Renders the card of a saved model.

    Licence and languages come from the card that is there, else from the base model's in the Hub
    cache. Results come from `results.jsonl`, what the embeddings say from `lens.md`.

    Args:
        folder: A saved filtered model.
        repo_id: Hub id that the usage examples name.

    Raises:
        FormatError: If the folder holds no filtered model, or a file is malformed.
    """
    files = FolderFiles(folder)
    small = small_files(files)
    results = _text(files, RESULTS_FILE)
    rows = () if results is None else parse_results(results, RESULTS_FILE, FormatError)
    card = _text(files, CARD_FILE)
    options: dict[str, Any] = {"results": rows, "dtype": stored_dtype(files)}
    facts = facts_of_files(small, base_card=card, **options)
    if not facts.inherited and facts.on_hub:
        card = base_card(str(facts.base_model), facts.revision)
        facts = facts_of_files(small, base_card=card, **options)
    return render(replace(facts, lens=_text(files, LENS_FILE)), repo_id=repo_id)


def write_card(folder: str | os.PathLike[str], *, repo_id: str | None = None) -> Path:
    """Renders, checks and writes the card of a saved model; see `card_of_folder`.

    Returns:
        The card's file.
    """
    text = card_of_folder(folder, repo_id=repo_id)
    check_card(text)
    target = Path(folder) / CARD_FILE
    replace_file(target, text.encode())
    return target


def base_card(
    name_or_path: str, revision: str | None = None, token: str | bool | None = None
) -> str | None:
    """The card of a base model from its folder, the Hub cache or the Hub; None if there is none."""
    try:
        file = Path(name_or_path) / CARD_FILE
        if not os.path.isdir(name_or_path):
            file = Path(hf_hub_download(name_or_path, CARD_FILE, revision=revision, token=token))
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):  # absent, offline, private, no Hub id, no UTF-8
        return None


def _metadata(facts: CardFacts) -> dict[str, Any]:
    own = {
        "library_name": LIBRARY,
        "pipeline_tag": PIPELINE,
        "tags": list(TAGS),
    }
    data = {key: facts.inherited[key] for key in INHERITED if key in facts.inherited}
    if facts.base_model is not None and facts.on_hub:
        data |= {"base_model": facts.base_model, "base_model_relation": RELATION}
    scores = [
        EvalResult(
            task_type=PIPELINE,
            task_name=result.task,
            dataset_type=re.sub(r"[^a-z0-9]+", "-", result.dataset.lower()).strip("-"),
            dataset_name=result.dataset,
            dataset_split=result.split,
            metric_type=result.metric,
            metric_name=f"{result.metric} x 100, {result.dims} dimensions",
            metric_value=round(100 * result.score, 2),
        )
        for result in facts.results
        if result.source is None and result.configuration == facts.own and result.dims <= facts.k
    ]
    index = eval_results_to_model_index(facts.name, scores) if scores else None
    return data | own | ({"model-index": index} if index else {})


def _widths(facts: CardFacts) -> list[dict[str, str]]:
    """Rows of the table of widths: the model's own and the paper's ratios below it."""
    widths = [facts.k, *(facts.d // ratio for ratio in _RATIOS if 0 < facts.d // ratio < facts.k)]
    if len(widths) == 1 and facts.k > 1:
        widths.append(facts.k // 2)
    return [
        {
            "dims": str(width),
            "share": f"{width / facts.d:.1%}",
            "bytes": _bytes(4 * width * 1_000_000),
            "call": "" if width == facts.k else f"truncate_dim={width}",
        }
        for width in widths
    ]


def _window(facts: CardFacts) -> str:
    if facts.start is None:
        return f"{facts.band} band"
    return f"{facts.band} band, directions {facts.start} to {facts.start + facts.k - 1}"


def _link(facts: CardFacts) -> str:
    if facts.base_model is None:
        return "a language model"
    if not facts.on_hub:
        return code(facts.base_model)
    return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"


def _public(command: str) -> str:
    """A command without the folders of the machine that ran it."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join(
        re.split(r"[/\\]", word)[-1] if re.match(r"[/~]|[A-Za-z]:\\", word) else word
        for word in words
    )


def _build_command(facts: CardFacts, repo_id: str | None) -> str:
    """The command that builds this model again."""
    options: list[tuple[str, str | None]] = [
        ("--keep", str(facts.keep)),
        ("--band", None if facts.band == "bulk" else facts.band),
        ("--norm", facts.norm),
        ("--dtype", facts.asked_dtype),
        ("--layers", None if facts.depth is None else str(facts.depth.layers)),
        ("--token-weights", None if facts.depth is None else facts.depth.token_weights),
        ("--prompt", None if facts.prompt is None else facts.prompt.option),
        ("--prompt-encoding", "exact" if _is_exact(facts) else None),
        ("--calibrate", _calibrate_option(facts.calibration)),
        ("--calibration-strength", _strength_option(facts.calibration)),
        ("--calibration-size", _size_option(facts.calibration)),
        ("--calibration-seed", _seed_option(facts.calibration)),
        ("--pooling", _pooling_option(facts)),
        (
            "--max-seq-length",
            None if facts.max_seq_length in (None, 512) else str(facts.max_seq_length),
        ),
        ("--revision", facts.revision and shown(facts.revision)),
        ("--output", (repo_id or facts.name).rsplit("/", 1)[-1]),
    ]
    words = ["st-embfilter", "build", shlex.quote(shown(facts.base_model or "MODEL"))]
    for option, value in options:
        words += [] if value is None else [f"{option} {shlex.quote(value)}"]
    if facts.normalized:
        words.append("--normalize")
    return " \\\n  ".join([" ".join(words[:3]), *words[3:]])


def _calibrate_option(calibration: Calibration | None) -> str | None:
    if calibration is None:
        return None
    return "texts.txt" if calibration.source == "texts" else calibration.source


def _strength_option(calibration: Calibration | None) -> str | None:
    return None if calibration is None else str(calibration.strength)  # defaults may change


def _size_option(calibration: Calibration | None) -> str | None:
    if calibration is None or calibration.source == "texts" or calibration.texts == 1024:
        return None
    return str(calibration.texts)


def _seed_option(calibration: Calibration | None) -> str | None:
    return None if calibration is None or not calibration.seed else str(calibration.seed)


def _pooling_option(facts: CardFacts) -> str | None:
    """What `--pooling` takes; None where it is the recipe's own."""
    own = "mean" if facts.prompt is None else facts.prompt.own_pooling
    return None if own in (None, facts.pooling) else facts.pooling


def _is_exact(facts: CardFacts) -> bool:
    return facts.prompt is not None and facts.prompt.encoding == "exact"


def _text(files: ModelFiles, name: str) -> str | None:
    path = files.path(name)
    return None if path is None else path.read_text(encoding="utf-8", errors="replace")


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
