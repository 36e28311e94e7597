"""Save a filtered model as a portable folder that loads everywhere with no custom code.

Every stack reads the names and keys of early sentence-transformers, so those are written, whatever
version is installed. Prompt recipes that need code of their own (ECHO, MetaEOL) are saved in plugin
form: the same folder and that code, which `trust_remote_code=True` runs from there. See
`portable_files` for the small files and `save_pretrained` for the rest.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn

from st_embfilter.backbone import (
    TOKENIZER_CONFIG,
    backbone_files,
    backbone_model,
    has_adapter,
    is_unchanged,
    source_folder,
    source_name,
    tokenizer_patch,
)
from st_embfilter.card import CARD_FILE, base_card, facts_of_files, render
from st_embfilter.errors import FormatError, OutputError
from st_embfilter.layer import EmbedFilterLayer, check_placement
from st_embfilter.metadata import METADATA_FILE, SPECTRUM_FILE
from st_embfilter.prompting import write_tokenizer
from st_embfilter.prompts import PromptEOL, Recipe, recipe_from_dict

logger = logging.getLogger(__name__)

MODULES_FILE: Final = "modules.json"

#: Modules that are saved with their code, by file. By name, because those that were loaded from
#: such a folder are classes of their own.
_PLUGIN_CLASSES: Final = {
    "EchoTransformer": "echo_pooling.py",
    "EchoPooling": "echo_pooling.py",
    "MetaEOLTransformer": "meta_eol.py",
}

_POOLING_KEYS: Final = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}
_ALWAYS_WRITTEN: Final = ("cls", "mean", "max", "mean_sqrt_len_tokens")


def save_pretrained(
    model: SentenceTransformer, path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Writes the portable folder; plain `SentenceTransformer(path)` loads it.

    The folder appears complete or not at all: it is written beside the target and renamed. Files
    of the backbone are copied unchanged from where it was loaded; a backbone whose weights are no
    longer those is saved by transformers instead.

    A model with ECHO or MetaEOL is saved in plugin form; a log line says so.

    Args:
        model: Transformer, Pooling, EmbedFilterLayer and optionally Normalize.
        path: Target folder; must be missing or empty.
        overwrite: Replace a model folder that is there already.

    Returns:
        The target folder.

    Raises:
        FormatError: If the model has other modules, which no portable folder can express.
        OutputError: If the target is not empty, or cannot be written.
    """
    target = Path(path).absolute()
    check_target(target, overwrite=overwrite)
    files = portable_files(model)
    source = source_folder(model)
    if source is not None and source.resolve() == target.resolve():
        raise OutputError(f"the output folder must not be the model's source, got {path}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        )
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        _write_backbone(model, source, staging)
        for name, content in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
        staging.chmod(0o755)
        _replace(staging, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if is_plugin(model):
        logger.warning(
            "%s is in plugin form, because no portable folder can express its prompt; load it with "
            "trust_remote_code=True",
            target,
        )
    return target


def is_plugin(model: SentenceTransformer) -> bool:
    """Whether a model is saved with code of its own, which needs `trust_remote_code=True`."""
    return any(_code_file(module) is not None for module in model.children())


def check_target(target: Path, *, overwrite: bool) -> None:
    """Checks that a folder may be written, before any work is done for it.

    Raises:
        OutputError: If it exists and is not empty, or is no model folder to overwrite.
    """
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise OutputError(
                f"the output folder must be missing or empty, got {target} with files in it; "
                "choose another or pass overwrite (--overwrite)"
            )
        if not (target / MODULES_FILE).is_file():
            raise OutputError(
                f"only a model folder (with {MODULES_FILE}) is overwritten, got {target}; remove "
                "it yourself if you mean it"
            )
    elif target.exists():
        raise OutputError(f"the output must be a folder, got the file {target}")


def portable_files(model: SentenceTransformer) -> dict[str, bytes]:
    """Every small file of the portable folder by its relative path; all but the backbone's own.

    Raises:
        FormatError: If the model is not Transformer, Pooling, EmbedFilterLayer, [Normalize].
    """
    transformer, pooling, layer, normalize = _pipeline(model)
    code = {}
    types = []
    for module, name in ((transformer, "Transformer"), (pooling, "Pooling")):
        file = _code_file(module)
        if file is None:
            types.append(f"sentence_transformers.models.{name}")
        else:
            code[file.name] = file.read_bytes()
            types.append(f"{file.stem}.{type(module).__name__}")
    modules = [(types[0], ""), (types[1], "1_Pooling")]
    modules.append(("sentence_transformers.models.Dense", "2_Dense"))
    if normalize:
        modules.append(("sentence_transformers.models.Normalize", "3_Normalize"))
    files = {
        **code,
        MODULES_FILE: _json(
            [
                {"idx": i, "name": str(i), "path": folder, "type": name}
                for i, (name, folder) in enumerate(modules)
            ]
        ),
        "sentence_bert_config.json": _json(_transformer_config(transformer, _recipe(layer))),
        "config_sentence_transformers.json": _json(
            {
                "prompts": dict(model.prompts),
                "default_prompt_name": model.default_prompt_name,
                "similarity_fn_name": str(model.similarity_fn_name),
            }
        ),
        "1_Pooling/config.json": _json(
            pooling.get_config_dict() if _code_file(pooling) else _pooling_config(pooling)
        ),
        "2_Dense/config.json": _json(layer.get_config_dict()),
        "2_Dense/model.safetensors": save(layer.weights()),
        METADATA_FILE: layer.metadata.to_json().encode(),
    }
    if layer.singular_values is not None:
        files[SPECTRUM_FILE] = save({"singular_values": layer.singular_values.cpu()})
    files[CARD_FILE] = render(facts_of_files(files, base_card=_base_card(model))).encode()
    return files


def _pipeline(
    model: SentenceTransformer,
) -> tuple[Transformer, Pooling, EmbedFilterLayer, bool]:
    modules = list(model.children())
    check_placement(modules)
    kinds = (Transformer, Pooling, EmbedFilterLayer, Normalize)
    fits = len(modules) in (3, 4) and all(
        isinstance(module, kind) for module, kind in zip(modules, kinds, strict=False)
    )
    if not fits:
        raise FormatError(
            "a portable folder holds Transformer > Pooling > EmbedFilterLayer [> Normalize], got "
            + " > ".join(type(module).__name__ for module in modules)
            + "; save other pipelines with model.save_pretrained(path)"
        )
    return modules[0], modules[1], modules[2], len(modules) == 4  # type: ignore[return-value]


def _code_file(module: nn.Module) -> Path | None:
    """The one file with the code of a module that travels with the model."""
    name = _PLUGIN_CLASSES.get(type(module).__name__)
    file = Path(inspect.getfile(type(module)))
    return file if file.name == name else None


def _recipe(layer: EmbedFilterLayer) -> Recipe | None:
    prompt = layer.metadata.prompt
    return None if prompt is None else recipe_from_dict(prompt)


def _transformer_config(transformer: Transformer, recipe: Recipe | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "max_seq_length": transformer.max_seq_length,
        "do_lower_case": bool(getattr(transformer, "do_lower_case", False)),
    }
    if isinstance(recipe, PromptEOL) and recipe.encoding == "exact":
        config["modality_config"] = transformer.modality_config
        config["module_output_name"] = transformer.module_output_name
    if hasattr(transformer, "prompt_token_ids"):
        config["prompt_token_ids"] = transformer.prompt_token_ids
    return config


def _pooling_config(pooling: Pooling) -> dict[str, Any]:
    mode = pooling.pooling_mode
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    config: dict[str, Any] = {"word_embedding_dimension": pooling.embedding_dimension}
    for name, key in _POOLING_KEYS.items():
        if name in _ALWAYS_WRITTEN or name in modes:
            config[key] = name in modes
    if not pooling.include_prompt:
        config["include_prompt"] = False
    return config


def _write_backbone(model: SentenceTransformer, source: Path | None, target: Path) -> None:
    inner = backbone_model(model)
    if has_adapter(inner):
        raise FormatError(
            "a portable folder holds merged weights, got a backbone with a PEFT adapter; load it "
            "with from_causal_lm, which merges, or save with model.save_pretrained(path)"
        )
    if source is not None and is_unchanged(inner, source):
        for file in backbone_files(source):
            shutil.copyfile(file, target / file.name)
        patch = tokenizer_patch(source, model.tokenizer)
        if patch is not None:
            (target / TOKENIZER_CONFIG).write_bytes(patch)
    else:
        inner.save_pretrained(str(target))  # type: ignore[operator]
        model.tokenizer.save_pretrained(str(target))
    if _pipeline(model)[2].metadata.prompt is not None:
        write_tokenizer(target, model.tokenizer)


def _replace(staging: Path, target: Path) -> None:
    """Renames the complete folder into place."""
    if not target.is_dir() or not any(target.iterdir()):
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old)  # onto an empty folder
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _base_card(model: SentenceTransformer) -> str | None:
    name = source_name(model)
    commit = getattr(getattr(backbone_model(model), "config", None), "_commit_hash", None)
    return None if name is None else base_card(name, commit)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
