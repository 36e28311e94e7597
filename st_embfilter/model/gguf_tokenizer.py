"""The tokenizer of a GGUF file, by transformers' own conversion."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

from st_embfilter.errors import BackboneError
from st_embfilter.text import first_line, reading, write_json
from st_embfilter.unembedding.gguf import GGUFFile

_SPECIAL_TOKENS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


#: Byte-level vocabularies that take digits one by one and are else like GPT-2's, as llama.cpp
#: splits them (src/llama-vocab.cpp); transformers splits those as GPT-2's.
_DIGITS_APART: Final = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}
)


#: Byte-level vocabularies whose texts start with BOS in llama.cpp, unless the file says otherwise.
_BOS_BY_DEFAULT: Final = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
    | {"tekken", "chameleon"}
)


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with the special tokens that it puts around a text.

    Raises:
        BackboneError: If the file holds none, or transformers cannot make it.
    """
    with reading(f"the tokenizer of {file.path.name}", BackboneError, "be whole"):
        return _tokenizer(file)


def _tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    metadata = {
        key.removeprefix("tokenizer."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.")
    }
    tokens = metadata.get("ggml.tokens")
    if not tokens or "ggml.model" not in metadata:
        raise BackboneError(
            f"a GGUF model must hold its tokenizer, got none in {file.path.name}; give the file to "
            "add_filter as unembedding=, with the model that it was made from"
        )
    home = "gguf" if find_spec("transformers.integrations.gguf") else "ggml"  # in its version 4
    convert = import_module(f"transformers.integrations.{home}").convert_gguf_tokenizer
    mapping: Any = GGUF_TO_TRANSFORMERS_MAPPING
    names = mapping["tokenizer"]["tokenizer"]
    parts = {new: metadata[old] for old, new in names.items() if old in metadata}
    try:
        backend, _ = convert(file.metadata.get("general.architecture"), parts)
    except Exception as error:
        raise BackboneError(
            f"transformers must be able to make the tokenizer of a GGUF file, got "
            f"{metadata['ggml.model']!r} in {file.path.name}: {first_line(error)}"
        ) from error
    backend = Tokenizer.from_str(backend.to_str())
    pre = metadata.get("ggml.pre")
    if metadata["ggml.model"] == "gpt2" and pre in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    special = {
        name: tokens[metadata[f"ggml.{key}"]]
        for name, key in _SPECIAL_TOKENS.items()
        if 0 <= metadata.get(f"ggml.{key}", -1) < len(tokens)
    }
    length = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        **({} if length is None else {"model_max_length": int(length)}),
        clean_up_tokenization_spaces=False,
        chat_template=_text(metadata.get("chat_template")),
    )
    by_default = metadata["ggml.model"] == "llama" or pre in _BOS_BY_DEFAULT
    bos = special.get("bos_token") if metadata.get("ggml.add_bos_token", by_default) else None
    eos = special.get("eos_token") if metadata.get("ggml.add_eos_token", False) else None
    if bos or eos:
        single = [*filter(None, (bos, "$A", eos))]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *("$B:1" if part == "$A" else part for part in single)],
            special_tokens=[(token, tokens.index(token)) for token in {bos, eos} - {None}],
        )
    return tokenizer


def _text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"a chat template must be a text, got {value!r:.60}")
    return value


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes `tokenizer.json` and its configuration for a class that reads them as they are."""
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which reads tokenizer.json as it is
        **{name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS if getattr(tokenizer, name)},
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer.chat_template, str):
        config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", config)
