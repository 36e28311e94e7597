"""Prompt recipes: what stands around a text when a language model reads it.

One class each: its templates, how they go into a tokenizer, its modules, and its keys in
`embfilter.json`. Modules of its own are one more file of this room that imports nothing of ours; it
is copied into saved folders.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Literal, get_args

from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from st_embfilter.errors import PromptError
from st_embfilter.model.backbone import TEXT_ONLY
from st_embfilter.model.echo_pooling import EchoPooling, EchoTransformer
from st_embfilter.model.meta_eol import MetaEOLTransformer
from st_embfilter.model.tokenizer import (
    SLOT,
    chat_template,
    frozen,
    leading_ids,
    put_around,
    rendered_ids,
    start_token,
    token_ids,
)

#: The exact encoding goes through a chat template; `flat` hands it the text as it is.
MESSAGES: Final[dict[str, Any]] = {
    **TEXT_ONLY,
    "message": {**TEXT_ONLY["text"], "format": "flat"},
}

#: How the template of `PromptEOL` becomes tokens.
Encoding = Literal["portable", "exact"]

#: For each template the ids before, between and after its texts.
Passes = list[list[list[int]]]

#: Classification, sentiment, similarity, clustering, keywords.
_META_TEMPLATES: Final = (
    f'Name the category of the text: "{SLOT}" in one word:"',
    f'Name the feeling in the text: "{SLOT}" in one word:"',
    f'Summarize the meaning of the text: "{SLOT}" in one word:"',
    f'Name the subject of the text: "{SLOT}" in one word:"',
    f'Name the keyword of the text: "{SLOT}" in one word:"',
)


@dataclass(frozen=True)
class Recipe(ABC):
    """What stands around a text. A new recipe is a subclass, a frozen dataclass, in `RECIPES`.

    Its fields are its keys in `embfilter.json` and what it says of itself on a card.

    Attributes:
        name: Name of the recipe, in `embfilter.json` and for `prompt=`.
        own_pooling: Mode of `Pooling` that goes with it unless another is asked for; None if its
            pooling is code of its own.
        transformer: Class of the first module.
        pooling: Class of the second module.
        times: How often a text stands in one sequence.
    """

    name: ClassVar[str]
    own_pooling: ClassVar[str | None] = None
    transformer: ClassVar[type[Transformer]] = Transformer
    pooling: ClassVar[type[Pooling]] = Pooling
    times: ClassVar[int] = 1

    @property
    @abstractmethod
    def templates(self) -> tuple[str, ...]:
        """Templates with `{text}`, one for each pass of the model."""

    @property
    def encoding(self) -> Encoding:
        """How the templates become tokens."""
        return "portable"

    @property
    def modality_config(self) -> dict[str, Any]:
        """What the first module calls on the backbone: plain text, or messages."""
        return MESSAGES if self.encoding == "exact" else TEXT_ONLY

    def apply(self, backbone: Transformer, pooling: str | None = None) -> Pooling:
        """Puts every text of a backbone into the prompt.

        Args:
            backbone: A module of the class and the `modality_config` of the recipe, whose templates
                are known, see `for_model`; its tokenizer is replaced.
            pooling: Mode of `Pooling`; None for the recipe's own.

        Returns:
            The pooling that goes with it.

        Raises:
            PromptError: If the tokenizer or `max_seq_length` does not fit the recipe.
        """
        if pooling is not None and self.own_pooling is None:
            raise PromptError(f"{self.name} has a pooling of its own, got pooling={pooling!r}")
        tokenizer = frozen(backbone.tokenizer)
        passes = self.passes(tokenizer, self.start(tokenizer))
        fixed = self._install(backbone, tokenizer, passes)
        backbone.processor = tokenizer
        limit = backbone.max_seq_length
        if limit is not None and limit < fixed + self.times:
            raise PromptError(
                f"max_seq_length must leave room for the text beside the {fixed} tokens of the "
                f"prompt, got {limit}; raise it or shorten the template"
            )
        return self._pool(backbone.get_embedding_dimension(), fixed, pooling)

    def start(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids before a prompt: what the tokenizer of the language model begins a text with."""
        return leading_ids(tokenizer)

    def passes(self, tokenizer: PreTrainedTokenizerBase, start: list[int]) -> Passes:
        """For each template the ids before, between and after its texts.

        Args:
            tokenizer: Of the language model, or of one saved with a prompt.
            start: The ids at the very front, see `start`.
        """
        found = [[token_ids(tokenizer, piece) for piece in t.split(SLOT)] for t in self.templates]
        return [[start + before, *rest] for before, *rest in found]

    @abstractmethod
    def _install(
        self, backbone: Transformer, tokenizer: PreTrainedTokenizerFast, passes: Passes
    ) -> int:
        """Makes a backbone read its texts in the prompt.

        Args:
            backbone: The first module, which may keep what it needs.
            tokenizer: The one that it will have, changed in place.
            passes: For each template the ids before, between and after its texts.

        Returns:
            The number of tokens in a sequence that are none of the text.
        """

    def _pool(self, width: int, fixed: int, mode: str | None) -> Pooling:
        """The second module for embeddings of a width and that number of fixed tokens."""
        module: Pooling = Pooling(width, mode or self.own_pooling or "mean")
        return module

    def for_model(self, model_type: str) -> Recipe:
        """The recipe with the templates that the paper has for a model type; mostly itself."""
        return self

    @property
    def option(self) -> str:
        """The text that `prompt=` takes for it."""
        return self.name

    def labelled(self) -> list[tuple[str, str]]:
        """The recipe for people: pairs of a label and a text, one for each entry of a list."""
        return [
            (label, text)
            for label, value in self.to_dict().items()
            for text in ([value] if isinstance(value, str) else value or [])
        ]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a JSON object."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
        return {"recipe": self.name, **values, **lists}


@dataclass(frozen=True)
class PromptEOL(Recipe):
    """A template that asks for the text in one word; the embedding is that of its last token.

    Args:
        template: Text with one `{text}`; None for the paper's, which depends on the model.
        encoding: "portable" (text and template tokenized apart, works in every stack) or "exact"
            (tokenized as one string, as in the paper; needs sentence-transformers >= 5.6).

    Raises:
        PromptError: If the template or the encoding is none of that.

    Source: arXiv 2606.07502, after "Scaling Sentence Embeddings with Large Language Models".
    """

    name: ClassVar[str] = "prompteol"
    own_pooling: ClassVar[str | None] = "lasttoken"

    #: The template that stands for None, and the one of its own that a model type has.
    default: ClassVar[str] = f'Summarize the sentence: "{SLOT}" in one word:"'
    defaults: ClassVar[Mapping[str, str]] = {"mistral": f'This sentence: "{SLOT}" means [MASK]'}

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
        return replace(self, template=self.defaults.get(model_type, self.default))

    @property
    def templates(self) -> tuple[str, ...]:
        """Its one template."""
        return (self.template or self.default,)

    def _install(
        self, backbone: Transformer, tokenizer: PreTrainedTokenizerFast, passes: Passes
    ) -> int:
        if self.encoding == "exact":
            tokenizer.chat_template = chat_template(tokenizer, self.templates[0])
            return len(rendered_ids(tokenizer, ""))
        put_around(tokenizer, passes[0])
        return tokenizer.num_special_tokens_to_add()

    @property
    def option(self) -> str:
        """Its template, or its name as long as it has none of its own."""
        return self.template or self.name


@dataclass(frozen=True)
class Echo(Recipe):
    """The text twice; the embedding is the mean over the second one and the closing EOS.

    Args:
        template: Text with two `{text}`, the second one at its end.

    Raises:
        PromptError: If the template is none of that.

    Source: arXiv 2606.07502, after "Repetition Improves Language Model Embeddings".
    """

    name: ClassVar[str] = "echo"
    transformer: ClassVar[type[Transformer]] = EchoTransformer
    pooling: ClassVar[type[Pooling]] = EchoPooling
    times: ClassVar[int] = 2

    template: str = f"Rewrite the following paragraph: {SLOT}. The rewritten paragraph: {SLOT}"

    def __post_init__(self) -> None:
        _check_template(self.template, 2)
        if not self.template.endswith(SLOT):
            raise PromptError(
                f"an ECHO template must end with its second {SLOT}, whose tokens are the "
                f"embedding, got {self.template!r}"
            )

    @property
    def templates(self) -> tuple[str, ...]:
        """Its one template."""
        return (self.template,)

    def start(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The id that a text begins with; EOS for a tokenizer without any."""
        start = start_token(tokenizer)
        return [self._end(tokenizer) if start is None else start]

    def passes(self, tokenizer: PreTrainedTokenizerBase, start: list[int]) -> Passes:
        """The one template, whose second text is closed by EOS."""
        (found,) = super().passes(tokenizer, start)
        return [[*found[:-1], [self._end(tokenizer)]]]

    def _end(self, tokenizer: PreTrainedTokenizerBase) -> int:
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise PromptError("ECHO closes texts with an EOS token, got a tokenizer without one")
        return end

    def _install(
        self, backbone: Transformer, tokenizer: PreTrainedTokenizerFast, passes: Passes
    ) -> int:
        put_around(tokenizer, passes[0])
        return tokenizer.num_special_tokens_to_add()

    def _pool(self, width: int, fixed: int, mode: str | None) -> Pooling:
        return EchoPooling(width, fixed)


@dataclass(frozen=True)
class MetaEOL(Recipe):
    """Several templates as in `PromptEOL`; the embedding is the mean over their last tokens.

    Args:
        templates: At least one, each with one `{text}`. The default ones ask for category, feeling,
            meaning, subject and keyword.

    Raises:
        PromptError: If there is none, or one is malformed.

    Source: arXiv 2606.07502, after "Meta-Task Prompting Elicits Embeddings from LLMs".
    """

    name: ClassVar[str] = "metaeol"
    transformer: ClassVar[type[Transformer]] = MetaEOLTransformer

    templates: tuple[str, ...] = _META_TEMPLATES

    def __post_init__(self) -> None:
        if isinstance(self.templates, str) or not self.templates:
            raise PromptError(
                f"MetaEOL needs a list of at least one template, got {self.templates!r}"
            )
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates:
            _check_template(template, 1)

    def _install(
        self, backbone: Transformer, tokenizer: PreTrainedTokenizerFast, passes: Passes
    ) -> int:
        backbone.prompt_token_ids = passes  # type: ignore[assignment] # of MetaEOLTransformer
        return max(len(before) + len(after) for before, after in passes)


#: Every recipe by its name.
RECIPES: Final[dict[str, type[Recipe]]] = {kind.name: kind for kind in (PromptEOL, Echo, MetaEOL)}

#: Templates of the literature by a name for `prompt=`, in the spelling of their authors' code:
#: Pretended CoT and Knowledge Enhancement of Zhang, Chang and Li 2024, "Simple Techniques for
#: Enhancing Sentence Embeddings in Generative Language Models" (arXiv 2404.03921).
NAMED_TEMPLATES: Final[dict[str, str]] = {
    "pretended-cot": (
        f'After thinking step by step , this sentence : "{SLOT}" means in one word:"'
    ),
    "knowledge": (
        "The essence of a sentence is often captured by its main subjects and actions, while "
        "descriptive terms provide additional but less central details. With this in mind , this "
        f'sentence : "{SLOT}" means in one word:"'
    ),
}


def parse_prompt(prompt: str | Recipe | None, encoding: Encoding | None = None) -> Recipe | None:
    """A recipe from its name, from a template with one `{text}`, or itself.

    Args:
        prompt: "prompteol", "echo", "metaeol", a key of `NAMED_TEMPLATES`, a template, a recipe,
            or None for plain text.
        encoding: Encoding of a recipe that offers several; None for the recipe's own.

    Raises:
        PromptError: If the name is unknown, the template malformed, or there is no such encoding
            of this recipe.
    """
    if prompt is None or isinstance(prompt, Recipe):
        recipe = prompt
    elif isinstance(prompt, str) and prompt in RECIPES:
        recipe = RECIPES[prompt]()
    elif isinstance(prompt, str) and prompt in NAMED_TEMPLATES:
        recipe = PromptEOL(NAMED_TEMPLATES[prompt])
    elif isinstance(prompt, str) and ("{" in prompt or "}" in prompt):
        recipe = PromptEOL(prompt)
    else:
        raise PromptError(
            f"prompt must be None (plain text), one of {', '.join([*RECIPES, *NAMED_TEMPLATES])}, "
            f"or a template with one {SLOT}, got {prompt!r}"
        )
    if encoding is None:
        return recipe
    if recipe is None or "encoding" not in recipe.to_dict():
        raise PromptError(
            f"prompt_encoding is for PromptEOL and templates with one {SLOT}, got {encoding!r} "
            f"with prompt={prompt!r}; leave it out"
        )
    return recipe_from_dict({**recipe.to_dict(), "encoding": encoding})


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """A recipe from its JSON object, strictly: what `to_dict` gives and nothing else.

    Raises:
        PromptError: If a key is missing, unknown or malformed.
    """
    name = data.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        raise PromptError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    kind = RECIPES[name]
    keys = [field.name for field in fields(kind)]
    if set(data) != {"recipe", *keys}:
        raise PromptError(f"a {name} recipe has the keys {['recipe', *keys]}, got {list(data)}")
    return kind(**{key: data[key] for key in keys})


def describe_recipe(recipe: Recipe | None) -> str:
    """One line about a recipe: its name, its encoding and its templates."""
    if recipe is None:
        return "none (plain text)"
    encoding = f" ({recipe.encoding})" if "encoding" in recipe.to_dict() else ""
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
