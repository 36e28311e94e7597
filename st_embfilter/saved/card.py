"""Model cards: pure text in, text out.

`facts_of_files` reads the small files of a model folder, `render` makes the card of them, and
`check_card` holds it against the Hub's rules for metadata, offline. `write_card` is the thin layer
over a folder.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id, yaml_dump  # type: ignore[attr-defined]

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import FolderFiles, ModelFiles
from st_embfilter.files.staging import replace_file
from st_embfilter.model.depth import Depth
from st_embfilter.model.metadata import METADATA_FILE, FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE, parse_modules
from st_embfilter.model.prompts import Recipe, recipe_from_dict
from st_embfilter.saved.layout import (
    CARD_FILE,
    LENS_FILE,
    POOLING_KEYS,
    RESULTS_FILE,
    TRANSFORMER_CONFIG,
)
from st_embfilter.spectrum.whitening import DEFAULT_STRENGTH, Calibration
from st_embfilter.text import code, inline, read_json, shown, template

Form = Literal["portable", "plugin", "package"]

#: Metadata that a derived model takes over from its base model, and never makes up.
INHERITED: Final = ("license", "license_name", "license_link", "language")

TAGS: Final = (
    "sentence-transformers",
    "embedfilter",
    "feature-extraction",
    "sentence-similarity",
    "arxiv:2606.07502",
)
LIBRARY: Final = "sentence-transformers"
PIPELINE: Final = "sentence-similarity"

#: The Hub knows finetune, adapter, quantized and merge. The filter is none of them to the letter;
#: the first is its word for a model with weights of its own that was made from another.
RELATION: Final = "finetune"

_PLAIN: Final = "sentence_transformers."
_RELATIONS: Final = ("finetune", "adapter", "quantized", "merge")
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
_TOKEN: Final = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_RATIOS: Final = (2, 4, 8)
_TABLE_COLUMNS: Final = 8


@dataclass(frozen=True)
class Score:
    """One score of one configuration on one task.

    Attributes:
        task: Name of the task.
        dataset: Name of the dataset.
        split: Which part of it.
        metric: Name of the metric, e.g. "cosine_spearman".
        dims: Width of the embeddings.
        score: In [-1, 1]; cards show it x 100.
        configuration: "raw" without a filter, else the band, e.g. "bulk" or "offset:128".
        delta: Difference to raw, in the unit of `score`.
        delta_low: Lower end of its interval.
        delta_high: Upper end of its interval.
        command: What measured it.
        source: Who reports it; None if it was measured with this project.
    """

    task: str
    dataset: str
    split: str
    metric: str
    dims: int
    score: float
    configuration: str
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    command: str | None = None
    source: str | None = None

    @classmethod
    def parse(cls, row: Mapping[str, Any], where: str) -> Score:
        """A score from a JSON object; keys of other purposes are left aside.

        Raises:
            FormatError: If a key is missing or of the wrong kind; names `where`.
        """
        numbers = ("score", "delta", "delta_low", "delta_high")
        kinds = {"dims": (int,), **dict.fromkeys(numbers, (int, float))}
        optional = (*numbers[1:], "command", "source")
        values: dict[str, Any] = {}
        for key in cls.__dataclass_fields__:
            value = row.get(key)
            if value is None and key in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds.get(key, (str,))):
                raise FormatError(f"{where}: a result needs a valid {key!r}, got {value!r}")
            values[key] = value
        if not -1.0 <= values["score"] <= 1.0:
            raise FormatError(
                f"{where}: a score must be in [-1, 1], got {values['score']!r}; cards show it x 100"
            )
        return cls(**values)


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says about one model.

    Attributes:
        base_model: Hub id or name of the language model; None if unknown.
        d: Width of the language model's hidden state.
        k: Width of the embeddings.
        band: Name of the band, e.g. "bulk" or "offset:128".
        start: First kept direction of a contiguous band, else None.
        keep: Width or ratio as it was asked for.
        on_hub: Whether `base_model` is a Hub id.
        revision: Commit of the base model.
        tensor: Name of the unembedding matrix.
        vocabulary: Its number of rows.
        dtype: As stored.
        tied: Whether it is also the input embedding.
        sha256: Of its bytes.
        prompt: Prompt recipe; None for plain text.
        calibration: How the filter was calibrated, as in the metadata; None for the filter alone.
        depth: How many of the base model's blocks it has; None for all.
        lens: A section in Markdown about nearest tokens and anisotropy, see `report.card_section`.
        pooling: Mode of `Pooling`.
        normalized: Whether embeddings have unit length.
        max_seq_length: Longest text in tokens.
        form: "portable" (no custom code), "plugin" (code of its own in the folder) or "package"
            (needs this package: what sentence-transformers saves by itself).
        inherited: Licence and languages of the base model.
        results: Scores, measured or reported.
    """

    base_model: str | None
    d: int
    k: int
    band: str
    start: int | None
    keep: float | int
    on_hub: bool = True
    revision: str | None = None
    tensor: str | None = None
    vocabulary: int | None = None
    dtype: str | None = None
    tied: bool = False
    sha256: str | None = None
    prompt: Recipe | None = None
    calibration: Calibration | None = None
    depth: Depth | None = None
    lens: str | None = None
    pooling: str = "mean"
    normalized: bool = False
    max_seq_length: int | None = None
    form: Form = "portable"
    inherited: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[Score, ...] = ()

    @property
    def name(self) -> str:
        """Name of the model after its base, e.g. "Qwen2.5-0.5B-embfilter"."""
        base = (self.base_model or "model").rsplit("/", 1)[-1].removesuffix(".gguf")
        return f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', base)}-embfilter"  # stands in code and headings


def facts_of_files(
    files: Mapping[str, bytes], *, base_card: str | None = None, results: Iterable[Score] = ()
) -> CardFacts:
    """The facts about a model from the small files of its folder.

    Args:
        files: Contents by relative path; in the portable form or in sentence-transformers' own.
        base_card: The card to inherit from: the base model's, or an older one of this model.
        results: Scores to show.

    Raises:
        FormatError: If the folder holds no filter, or a file is malformed.
    """
    found = [path for path in files if path.rpartition("/")[2] == METADATA_FILE]
    if not found:
        raise FormatError(
            f"a filtered model must hold {METADATA_FILE}, got {len(files)} files without it; build "
            "one with `st-embfilter build`"
        )
    metadata = FilterMetadata.from_json(files[min(found, key=len)])
    source, band = metadata.provenance, metadata.band
    types = _modules(files)
    pooling = next((pair for pair in types.items() if pair[0].endswith("Pooling")), None)
    length = _content(files, TRANSFORMER_CONFIG, dict).get("max_seq_length")
    return CardFacts(
        base_model=source.model_id,
        d=metadata.d,
        k=metadata.k,
        band=str(band),
        start=band.start(metadata.d),
        keep=band.keep,
        on_hub=_is_hub_id(source.model_id, source.revision),
        revision=source.revision,
        tensor=source.tensor,
        vocabulary=source.shape[0],
        dtype=source.dtype,
        tied=source.tied,
        sha256=source.sha256,
        prompt=None if metadata.prompt is None else recipe_from_dict(metadata.prompt),
        calibration=metadata.calibration,
        depth=metadata.depth,
        pooling="mean" if pooling is None else _pooling_mode(files, *pooling),
        normalized=any(kind.endswith("Normalize") for kind in types),
        max_seq_length=length if isinstance(length, int) else None,
        form=_form(types),
        inherited=inherited(base_card),
        results=tuple(results),
    )


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
        measured=list(_tables(facts, measured)),
        reported=list(_tables(facts, [r for r in facts.results if r.source is not None])),
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


def inherited(card: str | None) -> dict[str, Any]:
    """Licence and languages that a card states; {} for no card or malformed metadata."""
    data = _front_matter(card or "")
    kept = {key: data[key] for key in INHERITED if isinstance(data.get(key), str | list)}
    languages = kept.pop("language", [])
    languages = [languages] if isinstance(languages, str) else languages
    languages = [tag for tag in languages if isinstance(tag, str) and _LANGUAGE.fullmatch(tag)]
    return {**kept, **({"language": languages} if languages else {})}


def stated_base(card: str) -> str | None:
    """The base model that a card's metadata name; None if they name none, or several."""
    base = _front_matter(card).get("base_model")
    return base if isinstance(base, str) else None


def check_card(text: str) -> None:
    """Holds a card against the Hub's rules for metadata and against what this project promises.

    Offline: the Hub's own check needs its server.

    Raises:
        FormatError: Names every rule that is broken.
    """
    problems = list(_problems(text))
    if problems:
        raise FormatError(f"a model card must be valid, got: {'; '.join(problems)}")


def read_results(text: str, where: str = RESULTS_FILE) -> tuple[Score, ...]:
    """Results from JSON Lines.

    Raises:
        FormatError: Names the line.
    """
    results = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = read_json(line, f"{where} line {number}:", FormatError)
        results.append(Score.parse(row, f"{where} line {number}"))
    return tuple(results)


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
    small = _small_files(files)
    results = _text(files, RESULTS_FILE)
    rows = () if results is None else read_results(results)
    card = _text(files, CARD_FILE)
    facts = facts_of_files(small, base_card=card, results=rows)
    if not facts.inherited and facts.on_hub:
        card = base_card(str(facts.base_model), facts.revision)
        facts = facts_of_files(small, base_card=card, results=rows)
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
        if result.source is None and result.configuration == _own(facts) and result.dims <= facts.k
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


def _own(facts: CardFacts) -> str:
    """What this model is called in results."""
    return facts.band if facts.calibration is None else "calibrated"


def _tables(facts: CardFacts, results: Sequence[Score]) -> Iterator[dict[str, Any]]:
    """Tables of at most eight datasets: raw and this model's band in its widths, one a row."""
    shown = [
        result
        for result in results
        if result.configuration == "raw"
        or (result.configuration == _own(facts) and result.dims <= facts.k)
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


def _cell(result: Score | None) -> str:
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
    if calibration is None or calibration.strength == DEFAULT_STRENGTH:
        return None
    return str(calibration.strength)


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


def _form(types: Iterable[str]) -> Form:
    custom = [kind for kind in types if not kind.startswith(_PLAIN)]
    if any(kind.startswith("st_embfilter.") for kind in custom):
        return "package"
    return "plugin" if custom else "portable"


def _pooling_mode(files: Mapping[str, bytes], kind: str, folder: str) -> str:
    if not kind.startswith(_PLAIN):
        return kind.rpartition(".")[2]
    config = _content(files, f"{folder}/config.json", dict)
    modes = [name for name, key in POOLING_KEYS.items() if config.get(key) is True]
    mode = config.get("pooling_mode")
    return "+".join(modes) or (mode if isinstance(mode, str) else "mean")


def _text(files: ModelFiles, name: str) -> str | None:
    path = files.path(name)
    return None if path is None else path.read_text(encoding="utf-8", errors="replace")


def _small_files(files: ModelFiles) -> dict[str, bytes]:
    """The files that `facts_of_files` reads, where the folder's own modules have them."""

    def read(*names: str) -> dict[str, bytes]:
        found = {name: files.path(name) for name in names}
        return {name: path.read_bytes() for name, path in found.items() if path is not None}

    small = read(MODULES_FILE)
    paths = _modules(small).values()
    return small | read(
        TRANSFORMER_CONFIG,
        *(f"{path}/{METADATA_FILE}".lstrip("/") for path in paths),
        *(f"{path}/config.json" for path in paths if path),
    )


def _modules(files: Mapping[str, bytes]) -> dict[str, str]:
    """Folders of the modules by their types, in order."""
    found = parse_modules(files[MODULES_FILE]) if MODULES_FILE in files else []
    return {module.type: module.path for module in found}


def _content(files: Mapping[str, bytes], name: str, kind: type) -> Any:
    if name not in files:
        return kind()
    return read_json(files[name], name, FormatError, kind)


def _is_hub_id(model_id: str | None, revision: str | None) -> bool:
    """Whether a recorded name is a Hub id; that of a local folder has neither owner nor commit."""
    if model_id is None or ("/" not in model_id and revision is None):
        return False
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return False
    return True


def _front_matter(card: str) -> dict[str, Any]:
    from yaml import YAMLError, safe_load

    found = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    try:
        data = safe_load(found[1]) if found else None
    except YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _problems(text: str) -> Iterator[str]:
    data = _front_matter(text)
    if not data:
        yield "no YAML metadata between two lines of ---"
        return
    try:
        ModelCard(text)
    except (ValueError, TypeError, KeyError) as error:
        yield f"metadata that huggingface_hub refuses ({error})"
    for key, value in (("library_name", LIBRARY), ("pipeline_tag", PIPELINE)):
        if data.get(key) != value:
            yield f"{key} {data.get(key)!r} instead of {value!r}"
    tags = data.get("tags")
    missing = [tag for tag in TAGS[:2] if not isinstance(tags, list) or tag not in tags]
    if missing:
        yield f"tags without {', '.join(missing)}"
    languages = data.get("language", [])
    for tag in [languages] if not isinstance(languages, list) else languages:
        if not isinstance(tag, str) or not _LANGUAGE.fullmatch(tag):
            yield f"language {tag!r}, which is no ISO 639 code"
    licence = data.get("license")
    if licence is not None and not isinstance(licence, str | list):
        yield f"license {licence!r}, which is no identifier"
    if licence == "other" and not data.get("license_name"):
        yield "license 'other' without license_name"
    base = data.get("base_model")
    if base is not None and not (isinstance(base, str) and _is_hub_id(base, "any")):
        yield f"base_model {base!r}, which is no Hub id"
    if base is not None and data.get("base_model_relation") not in _RELATIONS:
        yield f"base_model_relation {data.get('base_model_relation')!r}"
    if _TOKEN.search(text):
        yield "a Hub token in its text"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
