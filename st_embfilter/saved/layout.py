"""The form of a saved folder: its names, and the pipelines that `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from sentence_transformers import SimilarityFunction
from sentence_transformers.sentence_transformer.modules import Transformer

from st_embfilter.errors import FormatError
from st_embfilter.files.tensors import SAFETENSORS_FILE
from st_embfilter.model.backbone import TEXT_ONLY
from st_embfilter.model.metadata import METADATA_FILE, SPECTRUM_FILE
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.prompts import MESSAGES, RECIPES

#: Dtypes of the weights that a save or an export writes.
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

CARD_FILE: Final = "README.md"
RESULTS_FILE: Final = "results.jsonl"
#: A section of the card that `st-embfilter lens --section` wrote.
LENS_FILE: Final = "lens.md"

BACKBONE_CONFIG: Final = "config.json"
TRANSFORMER_CONFIG: Final = "sentence_bert_config.json"
MODEL_CONFIG: Final = "config_sentence_transformers.json"
POOLING_CONFIG: Final = "1_Pooling/config.json"
DENSE_CONFIG: Final = "2_Dense/config.json"
DENSE_WEIGHTS: Final = f"2_Dense/{SAFETENSORS_FILE}"
DENSE_SPECTRUM: Final = f"2_Dense/{SPECTRUM_FILE}"

#: A static model: its one folder, and the name of its table.
STATIC_FOLDER: Final = "0_StaticEmbedding"
TABLE: Final = "embedding.weight"

#: What no published folder can do without, beside the weights of the backbone and its tokenizer.
FILTER_FILES: Final = (METADATA_FILE, "config.json", SAFETENSORS_FILE, CARD_FILE)
PORTABLE_FILES: Final = (
    MODULES_FILE,
    TRANSFORMER_CONFIG,
    MODEL_CONFIG,
    POOLING_CONFIG,
    DENSE_CONFIG,
    DENSE_WEIGHTS,
    METADATA_FILE,
    CARD_FILE,
    "config.json",
)

#: Modules that are saved with their code, by file. By name, because those that were loaded from
#: such a folder are classes of their own.
PLUGIN_CLASSES: Final = {
    module.__name__: f"{module.__module__.rpartition('.')[2]}.py"
    for kind in RECIPES.values()
    for module in (kind.transformer, kind.pooling)
    if module.__module__.startswith("st_embfilter.")
}

POOLING_KEYS: Final = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}

_PLAIN: Final = "sentence_transformers.models."
_FOLDERS: Final = ("", "1_Pooling", "2_Dense", "3_Normalize")


def module_type(name: str) -> str:
    """The type in `modules.json` of a module by its class name, e.g. "Pooling"."""
    file = PLUGIN_CLASSES.get(name)
    return f"{_PLAIN}{name}" if file is None else f"{file.removesuffix('.py')}.{name}"


def modules_document(transformer: str, pooling: str, *, normalize: bool) -> list[dict[str, object]]:
    """The content of `modules.json`.

    Args:
        transformer: Class name of the first module.
        pooling: Class name of the second.
        normalize: Whether embeddings are scaled to unit length at the end.
    """
    names = [transformer, pooling, "Dense", *(["Normalize"] if normalize else [])]
    return [
        {"idx": i, "name": str(i), "path": folder, "type": module_type(name)}
        for i, (folder, name) in enumerate(zip(_FOLDERS, names, strict=False))
    ]


#: SHA-256 of what earlier versions wrote as their code, and of which version it is.
EARLIER_CODE: Final = {
    (
        "echo_pooling.py",
        "54fdf41a2df213c2b28ac1e8a1015b7206f9fd367f1b70f1c9f2976b3c973a10",
    ): "0.1.0",
}


def plugin_files(modules: object) -> tuple[str, ...]:
    """The code files that a pipeline of ours is saved with.

    Args:
        modules: Content of `modules.json`.

    Raises:
        FormatError: If `save_pretrained` writes no such pipeline. The order, the classes and the
            folders all decide what sentence-transformers computes.
    """
    for pair in {(k.transformer.__name__, k.pooling.__name__) for k in RECIPES.values()}:
        for normalize in (False, True):
            if modules == modules_document(*pair, normalize=normalize):
                return tuple(dict.fromkeys(PLUGIN_CLASSES[n] for n in pair if n in PLUGIN_CLASSES))
    raise FormatError(
        f"{MODULES_FILE} must hold Transformer > Pooling > Dense [> Normalize] in the folders "
        f"{', '.join(map(repr, _FOLDERS))} as save_pretrained writes them, got another pipeline"
    )


def own_keys(transformer: type[Transformer]) -> list[str]:
    """What the first module of a recipe keeps in its configuration beside what all of them keep."""
    return [key for key in transformer.config_keys if key not in Transformer.config_keys]


def check_transformer_config(config: Mapping[str, Any]) -> None:
    """Checks what `sentence_bert_config.json` says.

    Raises:
        FormatError: For a key that is never written, or a value that cannot be.
    """
    _check_keys(
        TRANSFORMER_CONFIG,
        config,
        {
            "max_seq_length",
            "do_lower_case",
            "modality_config",
            "module_output_name",
            *(key for kind in RECIPES.values() for key in own_keys(kind.transformer)),
        },
    )
    check_length(config)
    if config.get("module_output_name", "token_embeddings") != "token_embeddings":
        raise FormatError(f"{TRANSFORMER_CONFIG}: module_output_name must be 'token_embeddings'")
    called = config.get("modality_config", TEXT_ONLY)
    if called not in (TEXT_ONLY, MESSAGES):
        raise FormatError(
            f"{TRANSFORMER_CONFIG}: modality_config must be one that save_pretrained writes, got "
            f"{called!r:.80}; it says what is called on the backbone"
        )
    if type(config.get("do_lower_case", False)) is not bool:
        raise FormatError(f"{TRANSFORMER_CONFIG}: do_lower_case must be true or false")


def check_model_config(config: Mapping[str, Any]) -> str:
    """Checks what `config_sentence_transformers.json` says.

    Returns:
        The prompt that sentence-transformers puts before every text; mostly none, "".

    Raises:
        FormatError: For a key that is never written, or a value that cannot be.
    """
    known = {"prompts", "default_prompt_name", "similarity_fn_name", "requirements"}
    _check_keys(MODEL_CONFIG, config, known)
    prompts, name = config.get("prompts", {}), config.get("default_prompt_name")
    needed = config.get("requirements", {})
    for what, value in (("prompts", prompts), ("requirements", needed)):
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise FormatError(f"{MODEL_CONFIG}: {what} must be texts by name, got {value!r:.80}")
    if name is not None and (not isinstance(name, str) or name not in prompts):
        raise FormatError(
            f"{MODEL_CONFIG}: default_prompt_name must be null or among prompts, got {name!r:.80}"
        )
    similarity = config.get("similarity_fn_name")
    if similarity is not None and similarity not in SimilarityFunction.possible_values():
        raise FormatError(
            f"{MODEL_CONFIG}: similarity_fn_name must be one of "
            f"{', '.join(SimilarityFunction.possible_values())}, got {similarity!r:.80}"
        )
    prompt: str = "" if name is None else prompts[name]
    return prompt


def check_length(config: Mapping[str, Any]) -> None:
    """Checks the longest text that `sentence_bert_config.json` names.

    Raises:
        FormatError: If it is no number of tokens.
    """
    length = config.get("max_seq_length")
    if length is not None and (type(length) is not int or not 1 <= length < 2**31):
        raise FormatError(
            f"{TRANSFORMER_CONFIG}: max_seq_length must be null or a number of tokens >= 1, got "
            f"{length!r:.80}"
        )


def check_pooling_config(config: Mapping[str, Any], d: int) -> None:
    """Checks what the configuration of `Pooling` says.

    Args:
        config: Content of `1_Pooling/config.json`.
        d: Width of the token embeddings.

    Raises:
        FormatError: For a key that is never written, another width, or not exactly one mode.
    """
    _check_keys(
        POOLING_CONFIG,
        config,
        {"word_embedding_dimension", "include_prompt", *POOLING_KEYS.values()},
    )
    modes = [config.get(key, False) for key in POOLING_KEYS.values()]
    if (
        config.get("word_embedding_dimension") != d
        or any(type(mode) is not bool for mode in modes)
        or sum(modes) != 1
        or type(config.get("include_prompt", True)) is not bool
    ):
        raise FormatError(
            f"{POOLING_CONFIG}: must name one mode and the width {d}, got {dict(config)!r:.200}"
        )


def _check_keys(file: str, config: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise FormatError(
            f"{file} must hold keys that save_pretrained writes, got {unknown[0]!r:.80}; other "
            "keys change what sentence-transformers computes"
        )
