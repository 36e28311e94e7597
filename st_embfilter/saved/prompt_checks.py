"""What `verify` asks of a prompt: texts are read in the one that the metadata name, in no other.

Whatever the form of a template in a folder: the ids that come out are held against the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from st_embfilter.errors import FormatError
from st_embfilter.model.backbone import TEXT_ONLY
from st_embfilter.model.gguf_tokenizer import gguf_tokenizer
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.prompts import Echo, MetaEOL, Recipe, recipe_from_dict
from st_embfilter.model.tokenizer import (
    PROBES,
    chat_template,
    frozen,
    leading_ids,
    put_around,
    token_ids,
)
from st_embfilter.saved import layout
from st_embfilter.saved.file_checks import document
from st_embfilter.text import reading, shown
from st_embfilter.unembedding.gguf import GGUFFile, find_gguf
from st_embfilter.unembedding.source import Source


def check_prompt(
    source: Source, prompt: Mapping[str, Any] | None, d: int, base: Source | None = None
) -> tuple[bool, str]:
    """The modules and the tokenizer must read texts in the prompt that the metadata name.

    What a language model's own tokenizer begins and ends a text with is not in the folder: these
    may be special tokens, and are told; `base` says which.

    Args:
        source: A folder or repository with a backbone.
        prompt: The recipe in its metadata; None for plain texts.
        d: Width of the backbone.
        base: The language model, if it is given.

    Raises:
        EmbedFilterError: If a file is missing or malformed, or the recipe does not fit.
    """
    recipe = None if prompt is None else recipe_from_dict(prompt)
    named = "no prompt" if recipe is None else f"the prompt {recipe.name}"
    config = document(source.files, layout.TRANSFORMER_CONFIG)
    wrong = _other_modules(source, recipe, config)
    if wrong is not None:
        return False, f"{wrong}, embfilter.json names {named}"
    tokenizer = _tokenizer(source)
    found = _edges(tokenizer, recipe, config)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if found is None or not special.issuperset(found[0] + found[1]):
        return False, f"the tokens around texts are not those of {named} in embfilter.json"
    start, end = found
    if isinstance(recipe, Echo):
        if len(start) != 1:
            return False, f"ECHO begins with one token, got {_words(tokenizer, start)}"
        fixed = sum(map(len, recipe.passes(_bare(tokenizer), start)[0]))
        pooled = document(source.files, layout.POOLING_CONFIG)
        if pooled != {"embedding_dimension": d, "fixed_tokens": fixed}:
            told = f"{pooled!r:.80}, not those of {d} dimensions and {fixed} tokens of the prompt"
            return False, f"{layout.POOLING_CONFIG} holds {shown(told)}"
    if base is not None:
        other = _tokenizer(base)
        wanted = leading_ids(other) if recipe is None else recipe.start(other)
        if start != wanted:
            told = f"{_words(tokenizer, start)}, of the language model {_words(other, wanted)}"
            return False, f"texts begin with {told}"
    detail = "plain texts" if recipe is None else f"{recipe.name}, token by token"
    detail += f", after {_words(tokenizer, start)}" if start else ""
    return True, detail + (f", before {_words(tokenizer, end)}" if end else "")


def _other_modules(source: Source, recipe: Recipe | None, config: Mapping[str, Any]) -> str | None:
    """What the modules of another recipe are; None for those of this one."""
    modules = document(source.files, MODULES_FILE, list)
    types = [one.get("type") if isinstance(one, dict) else None for one in modules[:2]]
    classes = ("Transformer", "Pooling")
    if recipe is not None:
        classes = (recipe.transformer.__name__, recipe.pooling.__name__)
    if types != [layout.module_type(name) for name in classes]:
        return f"{MODULES_FILE} holds other modules than {' > '.join(classes)}"
    wanted = TEXT_ONLY if recipe is None else recipe.modality_config
    if config.get("modality_config", TEXT_ONLY) != wanted:
        return f"{layout.TRANSFORMER_CONFIG} calls something else on the backbone"
    return None


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    gguf = find_gguf(Path(source.name))
    if gguf is not None:
        return gguf_tokenizer(GGUFFile.open(gguf))
    with reading(f"the tokenizer of {source.name}", FormatError):
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, **source.for_transformers()
        )
        loaded("a text")
    return loaded


def _edges(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe | None, config: Mapping[str, Any]
) -> tuple[list[int], list[int]] | None:
    """The ids before and after texts in their prompt; None if they are read in another way."""
    start = leading_ids(tokenizer)
    if recipe is not None and recipe.encoding == "exact":
        same = tokenizer.chat_template == chat_template(tokenizer, recipe.templates[0])
        return (start, []) if same else None
    if isinstance(recipe, MetaEOL):
        same = config.get("prompt_token_ids") == recipe.passes(tokenizer, start)
        return (start, []) if same else None
    bare: PreTrainedTokenizerBase = tokenizer
    pieces: list[list[int]] = [[], []]
    if recipe is not None:
        bare = _bare(tokenizer)
        (pieces,) = recipe.passes(bare, [])
    found = []
    for probe in filter(None, PROBES):
        with reading("the tokenizer", FormatError, f"read {probe!r}"):
            ids: list[int] = list(tokenizer(probe)["input_ids"])
        found.append(_around(ids, token_ids(bare, probe), pieces, last=recipe is not None))
    return found[0] if all(one == found[0] for one in found) else None


def _bare(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that puts nothing around a text, and no text twice."""
    copy = frozen(tokenizer)
    put_around(copy, [[], []])
    return copy


def _around(
    ids: list[int], text: list[int], pieces: list[list[int]], *, last: bool
) -> tuple[list[int], list[int]] | None:
    """What stands before and after a text in its prompt; None if they do not stand there.

    Args:
        ids: All ids.
        text: Those of the text.
        pieces: Those before, between and after it.
        last: Whether nothing may follow.
    """
    whole = list(pieces[0])
    for piece in pieces[1:]:
        whole += text + piece
    end = len(ids) - len(whole)
    for at in range(max(end, 0) if last else 0, end + 1):
        if ids[at : at + len(whole)] == whole:
            return ids[:at], ids[at + len(whole) :]
    return None


def _words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return shown(" ".join(map(str, tokenizer.convert_ids_to_tokens(ids)))) if ids else "nothing"
