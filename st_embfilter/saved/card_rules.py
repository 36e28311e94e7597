"""The Hub's rules for the metadata of a model card, and what a card takes over from another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from st_embfilter.errors import FormatError
from st_embfilter.text import first_line

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


_RELATIONS: Final = ("finetune", "adapter", "quantized", "merge")


_LANGUAGE: Final = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")


_TOKEN: Final = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def inherited(card: str | None) -> dict[str, Any]:
    """Licence and languages that a card states; {} for no card or malformed metadata."""
    data = front_matter(card or "")
    kept = {key: data[key] for key in INHERITED if key != "language" and _is_text(data.get(key))}
    languages = data.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    languages = [tag for tag in languages if isinstance(tag, str) and _LANGUAGE.fullmatch(tag)]
    return {**kept, **({"language": languages} if languages else {})}


def _is_text(value: object) -> bool:
    """Whether it is a text or a list of texts."""
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, str) for part in parts)


def stated_base(card: str) -> str | None:
    """The base model that a card's metadata name; None if they name none, or several."""
    base = front_matter(card).get("base_model")
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


def is_hub_id(model_id: str | None, revision: str | None) -> bool:
    """Whether a recorded name is a Hub id; that of a local folder has neither owner nor commit."""
    if model_id is None or ("/" not in model_id and revision is None):
        return False
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return False
    return True


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card; {} for none, or malformed ones."""
    found = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    try:
        data = yaml.load(found[1], _Loader) if found else None  # noqa: S506 - a safe one
    except Exception:  # YAML of strangers fails in many ways, all mean the same
        return {}
    return data if isinstance(data, dict) else {}


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # yaml has no types
    """Knows no aliases: ten lines of them stand for a list of a billion entries."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _problems(text: str) -> Iterator[str]:
    data = front_matter(text)
    if not data:
        yield "no YAML metadata between two lines of ---"
        return
    try:
        ModelCard(text)
    except Exception as error:  # it takes what it gets for what it wants
        yield f"metadata that huggingface_hub refuses ({first_line(error)})"
    for key, value in (("library_name", LIBRARY), ("pipeline_tag", PIPELINE)):
        if data.get(key) != value:
            yield f"{key} {data.get(key)!r:.80} instead of {value!r}"
    tags = data.get("tags")
    missing = [tag for tag in TAGS[:2] if not isinstance(tags, list) or tag not in tags]
    if missing:
        yield f"tags without {', '.join(missing)}"
    languages = data.get("language", [])
    for tag in [languages] if not isinstance(languages, list) else languages:
        if not isinstance(tag, str) or not _LANGUAGE.fullmatch(tag):
            yield f"language {tag!r:.80}, which is no ISO 639 code"
    licence = data.get("license")
    if licence is not None and not _is_text(licence):
        yield f"license {licence!r:.80}, which is no identifier"
    if licence == "other" and not data.get("license_name"):
        yield "license 'other' without license_name"
    base = data.get("base_model")
    if base is not None and not (isinstance(base, str) and is_hub_id(base, "any")):
        yield f"base_model {base!r:.80}, which is no Hub id"
    if base is not None and data.get("base_model_relation") not in _RELATIONS:
        yield f"base_model_relation {data.get('base_model_relation')!r:.80}"
    if _TOKEN.search(text):
        yield "a Hub token in its text"
