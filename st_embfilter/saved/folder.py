"""Save a filtered model as a portable folder that loads everywhere with no custom code.

Every stack reads the names and keys of early sentence-transformers, so those are written, whatever
version is installed. Prompt recipes that need code of their own (ECHO, MetaEOL) are saved in plugin
form: the same folder and that code, which `trust_remote_code=True` runs from there. See
`portable_files` for the small files and `save_pretrained` for the rest.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn

from st_embfilter.errors import FormatError, OutputError
from st_embfilter.files.staging import check_target, staged
from st_embfilter.model.backbone import (
    TOKENIZER_CONFIG,
    backbone_files,
    backbone_model,
    check_links,
    has_adapter,
    is_unchanged,
    source_folder,
    source_name,
    tokenizer_patch,
)
from st_embfilter.model.cut import blocks_to_keep, cut_checkpoint
from st_embfilter.model.layer import EmbedFilterLayer, check_placement
from st_embfilter.model.metadata import METADATA_FILE
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.prompts import Recipe, recipe_from_dict
from st_embfilter.model.static import static_metadata
from st_embfilter.model.tokenizer import write_tokenizer
from st_embfilter.saved.card import base_card, render
from st_embfilter.saved.card_facts import facts_of_files
from st_embfilter.saved.cast import asked_dtype, cast_weights, other_dtype, state_dtype
from st_embfilter.saved.layout import (
    CARD_FILE,
    DENSE_CONFIG,
    DENSE_SPECTRUM,
    DENSE_WEIGHTS,
    MODEL_CONFIG,
    PLUGIN_CLASSES,
    POOLING_CONFIG,
    POOLING_KEYS,
    TRANSFORMER_CONFIG,
    modules_document,
    own_keys,
)
from st_embfilter.saved.runtimes import requirements, state_nesting
from st_embfilter.saved.static import static_files, write_table
from st_embfilter.text import json_text
from st_embfilter.unembedding.source import Source

logger = logging.getLogger(__name__)


_ALWAYS_WRITTEN: Final = ("cls", "mean", "max", "mean_sqrt_len_tokens")


def save_pretrained(
    model: SentenceTransformer,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Writes the portable folder; plain `SentenceTransformer(path)` loads it.

    The folder appears complete or not at all: it is written beside the target and renamed. Files
    of the backbone are copied unchanged from where it was loaded, but for one key of config.json,
    see `runtimes`; a backbone whose weights are no
    longer those is saved by transformers instead. In another dtype than the checkpoint's, its
    tensors are cast on the way, but for an unembedding matrix that this would round: so the filter
    can still be proven.

    A model with ECHO or MetaEOL is saved in plugin form; a log line says so.

    Args:
        model: Transformer, Pooling, EmbedFilterLayer and optionally Normalize.
        path: Target folder; must be missing or empty.
        overwrite: Replace a model folder that is there already.
        token: Hub token, to read the base model's card for its licence and languages.

    Returns:
        The target folder.

    Raises:
        FormatError: If the model has other modules, which no portable folder can express.
        OutputError: If the target is not empty, or cannot be written.
    """
    target = Path(path).absolute()
    check_target(target, overwrite=overwrite)
    static = static_metadata(model) is not None
    source = None if static else source_folder(model)
    if source is not None and source.resolve() == target.resolve():
        raise OutputError(f"the output folder must not be the model's source, got {path}")
    with staged(target, overwrite=overwrite) as folder:
        write_model(model, folder, token=token)
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


def portable_files(
    model: SentenceTransformer, *, token: str | bool | None = None
) -> dict[str, bytes]:
    """Every small file of the portable folder by its relative path; all but the backbone's own.

    Args:
        model: Transformer, Pooling, EmbedFilterLayer and optionally Normalize.
        token: Hub token, to read the base model's card.

    Raises:
        FormatError: If the model is not Transformer, Pooling, EmbedFilterLayer, [Normalize].
    """
    transformer, pooling, layer, normalize = _pipeline(model)
    found = [file for file in map(_code_file, (transformer, pooling)) if file is not None]
    names = [
        type(module).__name__ if _code_file(module) else kind
        for module, kind in ((transformer, "Transformer"), (pooling, "Pooling"))
    ]
    needed = requirements(
        getattr(getattr(transformer.auto_model, "config", None), "model_type", None)
    )
    documents = {
        MODULES_FILE: modules_document(*names, normalize=normalize),
        TRANSFORMER_CONFIG: _transformer_config(transformer, _recipe(layer)),
        MODEL_CONFIG: {
            "prompts": dict(model.prompts),
            "default_prompt_name": model.default_prompt_name,
            "similarity_fn_name": str(model.similarity_fn_name),
            **({"requirements": needed} if needed else {}),
        },
        POOLING_CONFIG: pooling.get_config_dict()
        if _code_file(pooling)
        else _pooling_config(pooling),
        DENSE_CONFIG: layer.get_config_dict(),
    }
    files = {
        **{file.name: file.read_bytes() for file in found},
        **{name: json_text(document).encode() for name, document in documents.items()},
        DENSE_WEIGHTS: save(layer.weights()),
        METADATA_FILE: layer.metadata.to_json().encode(),
    }
    if layer.singular_values is not None:
        files[DENSE_SPECTRUM] = save({"singular_values": layer.singular_values.cpu()})
    inherited_from = _base_card(model, token)
    of_gguf = layer.metadata.provenance.gguf_sha256 is not None
    dtype = asked_dtype(transformer.auto_model, source_folder(model), always=of_gguf)
    facts = facts_of_files(files, base_card=inherited_from, dtype=dtype)
    files[CARD_FILE] = render(facts).encode()
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
            + "; a saved model is opened with st_embfilter.load to be saved again, other pipelines "
            "are saved with model.save_pretrained(path)"
        )
    return modules[0], modules[1], modules[2], len(modules) == 4  # type: ignore[return-value]


def _code_file(module: nn.Module) -> Path | None:
    """The one file with the code of a module that travels with the model."""
    name = PLUGIN_CLASSES.get(type(module).__name__)
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
    if recipe is not None and recipe.encoding == "exact":
        config["modality_config"] = transformer.modality_config
        config["module_output_name"] = transformer.module_output_name
    return config | {key: getattr(transformer, key) for key in own_keys(type(transformer))}


def _pooling_config(pooling: Pooling) -> dict[str, Any]:
    mode = pooling.pooling_mode
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    config: dict[str, Any] = {"word_embedding_dimension": pooling.embedding_dimension}
    for name, key in POOLING_KEYS.items():
        if name in _ALWAYS_WRITTEN or name in modes:
            config[key] = name in modes
    if not pooling.include_prompt:
        config["include_prompt"] = False
    return config


def write_model(
    model: SentenceTransformer,
    folder: Path,
    place: Callable[[Path, Path], object] = shutil.copyfile,
    *,
    token: str | bool | None = None,
) -> None:
    """Fills an empty folder; `place(source, target)` puts the weights of the backbone there."""
    if static_metadata(model) is not None:
        write_table(model, folder)
        _write_small(folder, static_files(model, token=token))
        return
    _pipeline(model)
    inner = backbone_model(model)
    if has_adapter(inner):
        raise FormatError(
            "a portable folder holds merged weights, got a backbone with a PEFT adapter; load it "
            "with from_causal_lm, which merges, or save with model.save_pretrained(path)"
        )
    source = source_folder(model)
    if source is not None and is_unchanged(inner, source):
        check_links(source)  # no file of this machine becomes part of a model
        dtype = other_dtype(inner, source)
        head = _pipeline(model)[2].metadata.provenance.tensor
        kept = blocks_to_keep(inner, Source(str(source)))
        if kept is not None:
            cut_checkpoint(Source(str(source)), folder, kept)
            for file in folder.glob("*.safetensors") if dtype is not None else ():
                cast_weights(file, file, inner, head)
        elif dtype is not None:
            place = partial(cast_weights, model=inner, unembedding=head)
        for file in backbone_files(source) if kept is None else ():
            large = file.suffix in (".safetensors", ".bin")
            (place if large else shutil.copyfile)(file, folder / file.name)
        if dtype is not None:
            state_dtype(folder, dtype)
        patch = tokenizer_patch(source, model.tokenizer)
        if patch is not None:
            (folder / TOKENIZER_CONFIG).write_bytes(patch)
    else:
        inner.save_pretrained(str(folder))  # type: ignore[operator]
        model.tokenizer.save_pretrained(str(folder))
    state_nesting(folder)
    if _pipeline(model)[2].metadata.prompt is not None:
        write_tokenizer(folder, model.tokenizer)
    # Last, as it asks for the card of the base model: what cannot be saved was refused above.
    _write_small(folder, portable_files(model, token=token))


def _write_small(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _base_card(model: SentenceTransformer, token: str | bool | None) -> str | None:
    name = source_name(model)
    commit = getattr(getattr(backbone_model(model), "config", None), "_commit_hash", None)
    return None if name is None else base_card(name, commit, token)
