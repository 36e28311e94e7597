"""What a prompt does to a tokenizer: fixed ids around every text, or a chat template of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, processors
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from st_embfilter.errors import PromptError
from st_embfilter.model.backbone import TOKENIZER_CONFIG
from st_embfilter.text import read_json, write_json

TOKENIZER_FILE: Final = "tokenizer.json"

#: Stands for the text in a template.
SLOT: Final = "{text}"

#: The one class that reads `tokenizer.json` as it is, in transformers 4 and 5.
_TOKENIZER_CLASS: Final = "PreTrainedTokenizerFast"

#: Keys of `tokenizer_config.json` that make any class build its post-processor anew, or that name
#: another class.
_REBUILDING_KEYS: Final = ("add_bos_token", "add_eos_token", "auto_map")

#: Other sources of a vocabulary, from which a stack would make a tokenizer without the prompt, and
#: chat templates, which would go before the one in `tokenizer_config.json`.
_SOURCE_FILES: Final = re.compile(
    r"(vocab|tekken|chat_template)\.json|merges\.txt|vocab\.txt|.*\.(model|spm|tiktoken|jinja)"
)

_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")

#: Name that byte-level vocabularies give to the token between the documents of their training.
DOCUMENT_SEPARATOR: Final = "<|endoftext|>"

#: Texts whose edges join differently with what stands around them.
PROBES: Final = ("", "word", " word ", "A word.", '"A word?"', "(1)\n", "\u05e9\u05dc\u05d5\u05dd")


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text alone, without special tokens around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts in front of a text by itself, e.g. that of BOS.

    What it puts at the end is left out: the last token of a prompt is the embedding.
    """
    encoded = tokenizer("word", return_special_tokens_mask=True)
    mask = [*encoded["special_tokens_mask"], 0]
    return list(encoded["input_ids"][: mask.index(0)])


def start_token(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None
) -> int | None:
    """The id that stands before the first one of a plain text, also where no text is given yet.

    What the tokenizer itself puts there, as Gemma's does; else the separator of documents, where
    the vocabulary has one. Only then BOS, or EOS for models without one: that of a chat model may
    start a turn of a chat (`<|im_start|>` of SmolLM2), after which it writes roles.

    Args:
        tokenizer: Tokenizer of the language model, or of one saved with a prompt.
        config: Configuration of the model, which may know ids that its tokenizer does not.
    """
    lead = leading_ids(tokenizer)
    vocabulary = tokenizer.get_vocab()
    candidates = [
        *(token for token in lead[:1] if token in tokenizer.all_special_ids),  # and no prompt
        vocabulary.get(DOCUMENT_SEPARATOR),
        tokenizer.bos_token_id,
        getattr(config, "bos_token_id", None),
        tokenizer.eos_token_id,
        getattr(config, "eos_token_id", None),
    ]
    return next((token for token in candidates if isinstance(token, int)), None)


def frozen(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerFast:
    """A copy that any stack makes from its `tokenizer.json` alone, and that all make alike.

    Tokenizer classes of a model family differ between versions of transformers, and put a
    post-processor of their own in the place of the template.

    Raises:
        PromptError: If it is no tokenizer of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or not isinstance(backend, Tokenizer):
        raise PromptError(
            f"a prompt recipe needs a tokenizer that tokenizer.json can hold, got "
            f"{type(tokenizer).__name__}"
        )
    present = {name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend_json(tokenizer)),
        **{name: token for name, token in present.items() if token is not None},
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side="right",
        model_input_names=list(tokenizer.model_input_names),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )


def put_around(tokenizer: PreTrainedTokenizerFast, fixed_ids: Sequence[list[int]]) -> None:
    """Makes the tokenizer put fixed ids around and between its text, by its post-processor.

    Truncation cuts the text and nothing else. Type ids are 1 from the second text on.

    Args:
        tokenizer: Changed in place.
        fixed_ids: Ids before, between and after the text: one list more than texts.
    """
    sequence: list[str] = []
    special_tokens = []
    for i, ids in enumerate(fixed_ids):
        if ids:
            name = f"prompt{i}"
            tokens = tokenizer.convert_ids_to_tokens(ids)
            special_tokens.append({"id": name, "ids": ids, "tokens": tokens})
            sequence.append(f"{name}:{int(i > 1)}")
        if i < len(fixed_ids) - 1:
            sequence.append(f"$A:{i}")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=sequence,
        pair=[*sequence, *(piece.replace("$A", "$B") for piece in sequence)],
        special_tokens=special_tokens,
    )


def single_pieces(processor: Any) -> Any:
    """The post-processor of a `tokenizer.json` with one piece for every token that it puts there.

    transformers.js reads neither `ids` nor `tokens` of a piece: its name must be the token. The ids
    that the tokenizers library gives stay the same.

    Args:
        processor: The post-processor's JSON, of any kind; None for none.
    """
    if not isinstance(processor, dict):
        return processor
    if processor.get("type") == "Sequence":
        return {**processor, "processors": [single_pieces(one) for one in processor["processors"]]}
    if processor.get("type") != "TemplateProcessing":
        return processor
    known = processor["special_tokens"]

    def single(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts = []
        for piece in pieces:
            special = piece.get("SpecialToken")
            if special is None:
                parts.append(piece)
                continue
            names = known[special["id"]]["tokens"]
            parts += [{"SpecialToken": {**special, "id": name}} for name in names]
        return parts

    pairs = (
        (i, t) for one in known.values() for i, t in zip(one["ids"], one["tokens"], strict=True)
    )
    return {
        **processor,
        "single": single(processor["single"]),
        "pair": single(processor["pair"]),
        # Sorted, as the tokenizers library writes them: saved again, the file is the same.
        "special_tokens": {
            t: {"id": t, "ids": [i], "tokens": [t]}
            for t, i in sorted({t: i for i, t in pairs}.items())
        },
    }


def chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A chat template that renders a text inside the template as one string.

    A task prompt of sentence-transformers, which arrives as the system message, goes to the front
    of the text. The ids are those of the tokenizer for the whole string, but for a closing special
    token, which the prompt replaces; this is tried out.

    Raises:
        PromptError: If no chat template gives these ids.
    """
    lead = leading_ids(tokenizer)
    start = "".join(tokenizer.convert_ids_to_tokens(lead))
    before, after = template.split(SLOT)
    wanted = [lead + token_ids(tokenizer, before + probe + after) for probe in PROBES]
    # Behind a special token, some tokenizers only add the space of a word's start if it is there.
    for gap in ("", " "):
        jinja = (
            f"{{{{ {_literal(start + gap * bool(lead) + before)} }}}}"
            "{% for message in messages %}{{ message['content'] }}{% endfor %}"
            f"{{{{ {_literal(after)} }}}}"
        )
        if wanted == [rendered_ids(tokenizer, probe, jinja) for probe in PROBES]:
            return jinja
    raise PromptError(
        "no chat template gives this tokenizer's ids of the whole prompt; use "
        "prompt_encoding='portable'"
    )


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the tokenizer of a prompt recipe over the tokenizer files of its source.

    Args:
        folder: Holds the files of the source already.
        tokenizer: The live one, after `Recipe.apply`.
    """
    for path in folder.iterdir():
        if _SOURCE_FILES.fullmatch(path.name):
            path.unlink()
    document = json.loads(_backend_json(tokenizer))
    document["post_processor"] = single_pieces(document["post_processor"])
    (folder / TOKENIZER_FILE).write_text(
        json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8"
    )
    path = folder / TOKENIZER_CONFIG
    config = read_json(path.read_bytes(), path.name, PromptError) if path.is_file() else {}
    for key in _REBUILDING_KEYS:
        config.pop(key, None)
    config["tokenizer_class"] = _TOKENIZER_CLASS
    config["model_input_names"] = list(tokenizer.model_input_names)
    if isinstance(tokenizer.chat_template, str):
        config["chat_template"] = tokenizer.chat_template
    for name in _SPECIAL_TOKENS:  # which a class of a model family may only know by itself
        token, stored = getattr(tokenizer, name), config.get(name)
        content = stored.get("content") if isinstance(stored, dict) else stored
        if token is not None and token != content:
            config[name] = token
    write_json(path, config)


def _backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the last batch.
    document["truncation"] = document["padding"] = None
    return json.dumps(document, ensure_ascii=False)


def rendered_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, jinja: str | None = None
) -> list[int]:
    """The ids of a text that went through a chat template; None for the tokenizer's own."""
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, chat_template=jinja, tokenize=False)
    return token_ids(tokenizer, str(rendered))


def _literal(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
