"""Prompt recipes: what stands around a text when a language model reads it.

Pure data; what a recipe does to a tokenizer and a model is in `prompting.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Literal, get_args

from st_embfilter.errors import PromptError

#: Stands for the text in a template.
SLOT: Final = "{text}"

#: How the template of `PromptEOL` becomes tokens.
Encoding = Literal["portable", "exact"]

#: PromptEOL's template of the paper, and the one of its own that a model family has there.
_EOL_TEMPLATE: Final = f'Summarize the sentence: "{SLOT}" in one word:"'
_EOL_TEMPLATES: Final = {"mistral": f'This sentence: "{SLOT}" means [MASK]'}

#: Classification, sentiment, similarity, clustering, keywords.
_META_TEMPLATES: Final = (
    f'Name the category of the text: "{SLOT}" in one word:"',
    f'Name the feeling in the text: "{SLOT}" in one word:"',
    f'Summarize the meaning of the text: "{SLOT}" in one word:"',
    f'Name the subject of the text: "{SLOT}" in one word:"',
    f'Name the keyword of the text: "{SLOT}" in one word:"',
)


@dataclass(frozen=True)
class PromptEOL:
    """A template that asks for the text in one word; the embedding is that of its last token.

    Args:
        template: Any text with one `{text}`; None for the paper's, which depends on the model.
        encoding: "portable" (text and template tokenized apart, works in every stack) or "exact"
            (tokenized as one string, as in the paper; needs sentence-transformers >= 5.6).

    Raises:
        PromptError: If the template or the encoding is none of that.

    Source: arXiv 2606.07502, after "Scaling Sentence Embeddings with Large Language Models".
    """

    name: ClassVar[str] = "prompteol"

    template: str | None = None
    encoding: Encoding = "portable"

    def __post_init__(self) -> None:
        if self.template is not None:
            _check_template(self.template, 1)
        if self.encoding not in get_args(Encoding):
            raise PromptError(
                f"prompt_encoding must be one of {', '.join(get_args(Encoding))}, got "
                f"{self.encoding!r}"
            )

    def for_model(self, model_type: str) -> PromptEOL:
        """The recipe with the paper's template for this model, where it has none of its own."""
        if self.template is not None:
            return self
        return replace(self, template=_EOL_TEMPLATES.get(model_type, _EOL_TEMPLATE))

    @property
    def templates(self) -> tuple[str, ...]:
        """Its one template."""
        return (self.template or _EOL_TEMPLATE,)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a JSON object."""
        return {"recipe": self.name, "template": self.template, "encoding": self.encoding}


@dataclass(frozen=True)
class Echo:
    """The text twice; the embedding is the mean over the second one and the closing EOS.

    Args:
        template: Any text with two `{text}`, the second one at its end.

    Raises:
        PromptError: If the template is none of that.

    Source: arXiv 2606.07502, after "Repetition Improves Language Model Embeddings".
    """

    name: ClassVar[str] = "echo"

    template: str = f"Rewrite the following paragraph: {SLOT}. The rewritten paragraph: {SLOT}"

    def __post_init__(self) -> None:
        _check_template(self.template, 2)
        if not self.template.endswith(SLOT):
            raise PromptError(
                f"an ECHO template must end with its second {SLOT}, whose tokens are the "
                f"embedding, got {self.template!r}"
            )

    def for_model(self, model_type: str) -> Echo:
        """Itself: the paper has one template for all models."""
        return self

    @property
    def templates(self) -> tuple[str, ...]:
        """Its one template."""
        return (self.template,)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a JSON object."""
        return {"recipe": self.name, "template": self.template}


@dataclass(frozen=True)
class MetaEOL:
    """Several templates as in `PromptEOL`; the embedding is the mean over their last tokens.

    Args:
        templates: At least one; each has one `{text}`. The default ones ask for category, feeling,
            meaning, subject and keyword.

    Raises:
        PromptError: If there is none, or one is malformed.

    Source: arXiv 2606.07502, after "Meta-Task Prompting Elicits Embeddings from LLMs".
    """

    name: ClassVar[str] = "metaeol"

    templates: tuple[str, ...] = _META_TEMPLATES

    def __post_init__(self) -> None:
        if isinstance(self.templates, str) or not self.templates:
            raise PromptError(
                f"MetaEOL needs a list of at least one template, got {self.templates!r}"
            )
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates:
            _check_template(template, 1)

    def for_model(self, model_type: str) -> MetaEOL:
        """Itself: its templates are the same for all models."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a JSON object."""
        return {"recipe": self.name, "templates": list(self.templates)}


Recipe = PromptEOL | Echo | MetaEOL

_RECIPES: Final[dict[str, type[Recipe]]] = {kind.name: kind for kind in (PromptEOL, Echo, MetaEOL)}


def parse_prompt(prompt: str | Recipe | None, encoding: Encoding | None = None) -> Recipe | None:
    """A recipe from its name, from a template with one `{text}`, or itself.

    Args:
        prompt: "prompteol", "echo", "metaeol", a template, a recipe, or None for plain text.
        encoding: Of `PromptEOL`; None for the recipe's own.

    Raises:
        PromptError: If the name is unknown, the template malformed, or there is no such encoding
            of this recipe.
    """
    recipe: Recipe | None
    if prompt is None or isinstance(prompt, Recipe):
        recipe = prompt
    elif isinstance(prompt, str) and prompt in _RECIPES:
        recipe = _RECIPES[prompt]()
    elif isinstance(prompt, str) and ("{" in prompt or "}" in prompt):
        recipe = PromptEOL(prompt)
    else:
        raise PromptError(
            f"prompt must be None (plain text), one of {', '.join(_RECIPES)}, or a template with "
            f"one {SLOT}, got {prompt!r}"
        )
    if encoding is None:
        return recipe
    if not isinstance(recipe, PromptEOL):
        raise PromptError(
            f"prompt_encoding is for PromptEOL and templates with one {SLOT}, got {encoding!r} "
            f"with prompt={prompt!r}; leave it out"
        )
    return replace(recipe, encoding=encoding)


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """A recipe from its JSON object, strictly: what `to_dict` gives and nothing else.

    Raises:
        PromptError: If a key is missing, unknown or malformed.
    """
    name = data.get("recipe")
    if not isinstance(name, str) or name not in _RECIPES:
        raise PromptError(f"recipe must be one of {', '.join(_RECIPES)}, got {name!r}")
    kind = _RECIPES[name]
    keys = [field.name for field in fields(kind)]
    if set(data) != {"recipe", *keys}:
        raise PromptError(f"a {name} recipe has the keys {['recipe', *keys]}, got {list(data)}")
    return kind(**{key: data[key] for key in keys})


def describe_recipe(recipe: Recipe | None) -> str:
    """One line about a recipe: its name, its encoding and its templates."""
    if recipe is None:
        return "none (plain text)"
    encoding = f" ({recipe.encoding})" if isinstance(recipe, PromptEOL) else ""
    return f"{recipe.name}{encoding}: {' | '.join(recipe.templates)}"


def _check_template(template: str, slots: int) -> None:
    times = ("once", "twice")[slots - 1]
    if not isinstance(template, str):
        raise PromptError(f"a template must be a text with {SLOT} {times}, got {template!r}")
    found = template.count(SLOT)
    if found != slots:
        hint = "; Echo(...) takes templates with two" if slots == 1 and found == 2 else ""
        raise PromptError(
            f"the template must have {SLOT} exactly {times}, got {found} in {template!r}{hint}"
        )
    rest = template.replace(SLOT, "")
    if "{" in rest or "}" in rest:
        raise PromptError(f"the template must have no braces beside {SLOT}, got {template!r}")
