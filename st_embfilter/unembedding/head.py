"""Which tensor of a checkpoint is the unembedding matrix W_U.

The answer comes from transformers itself: the output embedding of the model, built from its config
on the meta device with weights tied, so no list of names has to be kept.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

from st_embfilter.errors import UnembeddingError
from st_embfilter.files.stored import StoredTensor
from st_embfilter.files.tensors import Checkpoint
from st_embfilter.text import first_line
from st_embfilter.unembedding.adapter import Adapter
from st_embfilter.unembedding.quantized import check_not_packed, dequantized

#: More than any model has.
MAX_LAYERS: Final = 2_000


def meta_model(
    config: PretrainedConfig, *, masked_lm: bool = False, trust_remote_code: bool = False
) -> nn.Module:
    """The language model of a config without weights, on the meta device.

    Args:
        config: The config of a causal LM; of a vision-language model, whose text decoder is nested;
            or, with `masked_lm`, of a masked LM.
        masked_lm: Build a masked LM instead, and accept heads with layers of their own.
        trust_remote_code: Allow model code of the checkpoint to run.

    Raises:
        UnembeddingError: If the config describes no such model, or one whose unembedding matrix
            does not read the last hidden state.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    if not masked_lm:
        _check_decoder(config, model_type)
    _check_layers(config)
    factory = AutoModelForMaskedLM if masked_lm else _auto_class(config, model_type)
    try:
        with torch.device("meta"):
            model: nn.Module = factory.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # configs of strangers fail in many ways, all mean the same
        raise UnembeddingError(
            f"EmbedFilter needs a model that {factory.__name__} can build, got model type "
            f"{model_type!r}: {reason_of(error)}"
        ) from error
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    if not masked_lm:
        _check_head(model, model_type)
    return model


def find_output_embedding(
    model: nn.Module, checkpoint: Checkpoint, where: str, adapter: Adapter | None = None
) -> tuple[StoredTensor, bool]:
    """The stored tensor that transformers would load as the model's output embedding.

    Args:
        model: From `meta_model`.
        checkpoint: The named tensors.
        where: Names the checkpoint in errors.
        adapter: Weights trained on top of the checkpoint, which may include the head.

    Returns:
        The matrix, and whether it is tied to the input embedding. The bias of a head, where it has
        one, shifts logits and is no part of it.

    Raises:
        UnembeddingError: If none of its names is stored, its shape is not the model's, or it is
            quantised in a way that cannot be undone exactly.
    """
    names, tied, weight = output_embedding(model)
    # Most checkpoints hold it under the model's own name. Only for others does transformers compile
    # the renamings of all its architectures, which takes as long as the spectrum of a small model.
    found = next((name for name in names if name in checkpoint.names), None)
    if found is None:
        stored_as = stored_names(model, checkpoint.names)
        found = next((stored_as[name] for name in names if name in stored_as), None)
    if found is None:
        check_not_packed(names, checkpoint.names)
        raise UnembeddingError(
            f"the checkpoint must hold the output embedding ({' or '.join(names)}), got "
            f"{len(checkpoint.names)} other tensors in {where}; a backbone saved without its "
            "language-model head has no unembedding matrix unless the two are tied; take that of "
            "the model it was made from (unembedding=)"
        )
    stored = dequantized(checkpoint, found, _scale_block(model))
    if adapter is not None:
        stored = adapter.head(names, stored)
    if stored.shape != tuple(weight.shape):
        raise UnembeddingError(
            f"the output embedding must have the shape of the config, {tuple(weight.shape)}, got "
            f"{stored.shape} for {stored.name!r} in {where}"
        )
    return stored, tied


def stored_name(model: nn.Module, checkpoint: Checkpoint, name: str) -> str:
    """The key under which a checkpoint holds a parameter of the model.

    Raises:
        UnembeddingError: If it holds none.
    """
    if name in checkpoint.names:
        return name
    found = stored_names(model, checkpoint.names).get(name)
    if found is None:
        raise UnembeddingError(
            f"the checkpoint must hold every tensor of the model, got none for {name!r}; download "
            "it again"
        )
    return found


def _check_decoder(config: PretrainedConfig, model_type: str) -> None:
    # The class says so too: a decoder saved alone is loaded with an encoder again.
    if any(getattr(one, "is_encoder_decoder", False) for one in (config, type(config))):
        raise UnembeddingError(
            "EmbedFilter needs a decoder language model, got the encoder-decoder "
            f"{model_type!r}; use a decoder-only model"
        )
    masked = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
        raise UnembeddingError(
            "EmbedFilter needs a decoder language model, got the encoder-only model type "
            f"{model_type!r}; pass masked_lm=True (--masked-lm) to try the decoder matrix of its "
            "masked language model, which the paper does not cover"
        )
    backbone = modeling_auto.MODEL_MAPPING_NAMES.get(model_type)
    heads = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if getattr(config, "auto_map", None):
        return
    if backbone is None or backbone == heads.get(model_type):
        raise UnembeddingError(
            "EmbedFilter needs a model type of which AutoModel loads a backbone that gives hidden "
            f"states, got {model_type!r}, for which transformers has "
            f"{'none' if backbone is None else f'{backbone} alone'}"
        )


def _check_layers(config: PretrainedConfig) -> None:
    """Each layer costs memory, even on the meta device."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text_config, "num_hidden_layers", 1)
    if type(layers) is int and layers > MAX_LAYERS:
        raise UnembeddingError(
            f"a config must have at most {MAX_LAYERS:,} layers, got num_hidden_layers = {layers:,}"
        )


def _check_head(model: nn.Module, model_type: str) -> None:
    """Nothing may stand between the backbone's last hidden state and W_U."""
    base = getattr(model, "base_model", model)
    if base is model:
        return
    _, _, weight = output_embedding(model)
    known = {id(weight), *(id(parameter) for parameter in base.parameters())}
    between = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in known
    ]
    if between:
        masked = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        hint = "; pass masked_lm=True (--masked-lm) to try it all the same" if masked else ""
        raise UnembeddingError(
            "EmbedFilter needs a head that is the unembedding matrix alone, so that the matrix "
            f"reads the last hidden state, got {type(model).__name__} with {between[0]!r} in "
            f"between{hint}"
        )


def _auto_class(config: PretrainedConfig, model_type: str) -> type[Any]:
    """The auto class of the model that was saved; a composite config may fit two."""
    classes = {
        AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    saved = getattr(config, "architectures", None) or ()
    fits = [auto for auto, mapping in classes.items() if mapping.get(model_type) in saved]
    fits += [auto for auto, mapping in classes.items() if model_type in mapping]
    return fits[0] if fits else AutoModelForCausalLM


def _scale_block(model: nn.Module) -> tuple[int, int]:
    """Rows and columns that share a scale in a checkpoint with 8-bit weights."""
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    return (int(block[0]), int(block[1])) if block else (128, 128)


def output_embedding(model: nn.Module) -> tuple[list[str], bool, Tensor]:
    """Names of the output embedding's weight (its own first, then tied ones), tied or not."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    weight = getattr(output, "weight", None)
    if isinstance(output, nn.ModuleList):
        raise UnembeddingError(
            f"EmbedFilter needs a language model with one output embedding, got "
            f"{type(model).__name__} with {len(output)}, one for each codebook"
        )
    if not isinstance(weight, Tensor):
        raise UnembeddingError(
            "EmbedFilter needs a language model with an output embedding, got "
            f"{type(model).__name__}, which has none; give the causal LM, not its backbone"
        )
    modules = {id(module): name for name, module in model.named_modules()}
    own = f"{modules.get(id(output), '')}.weight".lstrip(".")
    shared = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and name != own
    ]
    get_input = getattr(model, "get_input_embeddings", None)
    try:
        given = get_input() if callable(get_input) else None
    except NotImplementedError:
        given = None
    tied = getattr(given, "weight", None) is weight
    return [own, *shared], tied, weight


def stored_names(model: nn.Module, keys: frozenset[str]) -> dict[str, str]:
    """Maps names of the model's parameters to keys of a checkpoint, as loading it would."""
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "") or ""
    renamings = _key_renamings(model)
    mapping: dict[str, str] = {}
    for key in sorted(keys):
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        if name not in state and f"{prefix}.{name}" in state:
            name = f"{prefix}.{name}"
        elif name not in state and prefix and name.removeprefix(f"{prefix}.") in state:
            name = name.removeprefix(f"{prefix}.")
        mapping.setdefault(name, key)
    return mapping


def _key_renamings(model: nn.Module) -> list[Any]:
    """Key renamings that transformers applies when it loads this model (transformers >= 5)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    return [
        item
        for item in get_model_conversion_mapping(cast("Any", model))
        if type(item) is WeightRenaming
    ]


def reason_of(error: BaseException) -> str:
    """The first line of an error of transformers, which may need a word of ours."""
    if "trust_remote_code" in str(error):
        return (
            "model code in the checkpoint, which runs only with trust_remote_code=True "
            "(--trust-remote-code); read that code first"
        )
    return first_line(error)
