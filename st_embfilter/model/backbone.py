"""The language model under a filter: load it as plain text in, find its source files again."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from st_embfilter.errors import BackboneError, EmbedFilterError, UnembeddingError
from st_embfilter.files.folder import check_inside
from st_embfilter.files.tensors import SAFETENSORS_FILE, TORCH_FILE
from st_embfilter.model.gguf_backbone import readable
from st_embfilter.model.whole import check_finite, loaded_whole
from st_embfilter.text import first_line, is_failure, json_text, read_json, reading
from st_embfilter.unembedding.adapter import Adapter
from st_embfilter.unembedding.source import Source

#: What `SentenceTransformer` calls on a plain text backbone. Given explicitly, because it would
#: otherwise wrap every text in the chat template of a tokenizer that has one.
TEXT_ONLY: Final[dict[str, Any]] = {
    "text": {"method": "forward", "method_output_name": "last_hidden_state"}
}

#: Texts are cut to this many tokens unless asked otherwise, as in the paper.
DEFAULT_MAX_SEQ_LENGTH: Final = 512

TOKENIZER_CONFIG: Final = "tokenizer_config.json"

#: Files of a checkpoint that a text backbone and its tokenizer need.
_BACKBONE_FILES: Final = re.compile(
    r"config\.json|generation_config\.json|(added_tokens|special_tokens_map|vocab)\.json|merges\.txt"
    r"|tokenizer.*\.json|.*\.(model|spm|tiktoken)|vocab\.txt|tekken\.json"
    r"|(video_)?preprocessor_config\.json|processor_config\.json"
    r"|chat_template\.(json|jinja)|LICEN[CS]E.*|NOTICE.*|USE_POLICY.*|.*\.py"
)
_SAFETENSORS: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_TORCH_FILES: Final = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")

#: Values that are compared at a time.
_BLOCK_VALUES: Final = 2**24


def load_backbone(
    source: Source,
    *,
    max_seq_length: int | None = DEFAULT_MAX_SEQ_LENGTH,
    dtype: torch.dtype | str | None = None,
    module_class: type[Transformer] = Transformer,
    modality_config: dict[str, Any] = TEXT_ONLY,
) -> Transformer:
    """A decoder backbone as the first module of a `SentenceTransformer`.

    Texts are tokenized as they are, never through the checkpoint's chat template. A tokenizer
    without a padding token gets an existing token as one; it is masked out everywhere. Padding goes
    to the right, which leaves the positions of all texts the same in every batch. An
    adapter is merged.

    Args:
        source: A language model, a GGUF file or a PEFT adapter.
        max_seq_length: Longest text in tokens, capped by the model; None for the model's own limit.
        dtype: The backbone's, as transformers takes it; for a GGUF file see `gguf_folder`.
        module_class: What to make of it.
        modality_config: What the module calls on the backbone.

    Raises:
        BackboneError: If sentence-transformers cannot load it as a text backbone.
    """
    source, dtype = readable(source, dtype)
    if source.is_folder:
        check_links(Path(source.name))
    adapter = Adapter.open(source.files)
    base = source if adapter is None else source.base(adapter)
    hub = base.for_transformers()
    try:
        with loaded_whole(base.files):
            backbone: Transformer = module_class(
                base.name,
                model_kwargs={**hub, **({} if dtype is None else {"dtype": dtype})},
                processor_kwargs=dict(hub),
                config_kwargs=dict(hub),
                modality_config=modality_config,
                module_output_name="token_embeddings",
            )
            if adapter is not None:
                _merge(backbone, source)
    except EmbedFilterError:
        raise
    except BaseException as error:  # files of strangers fail in many ways, all mean the same
        if not is_failure(error):
            raise
        raise BackboneError(
            "EmbedFilter needs a text backbone that sentence-transformers can load with AutoModel "
            f"and AutoProcessor, got {source.name}: {first_line(error)}"
        ) from error
    check_finite(backbone.auto_model, source.name)
    tokenizer = backbone.tokenizer
    if tokenizer is None:
        raise BackboneError(
            f"EmbedFilter needs a text tokenizer, got none in {source.name}; add tokenizer files"
        )
    if not _makes_tokens(tokenizer):
        raise BackboneError(
            "EmbedFilter needs a tokenizer with a vocabulary, got one that makes no tokens in "
            f"{source.name}; add the tokenizer files of the model"
        )
    ensure_pad_token(tokenizer)
    tokenizer.padding_side = "right"
    if max_seq_length is not None:
        limit = backbone.max_seq_length
        backbone.max_seq_length = max_seq_length if limit is None else min(max_seq_length, limit)
    return backbone


def _merge(backbone: Transformer, adapter: Source) -> None:
    """Merges an adapter into its base model, whose tokenizer stays if the adapter has none."""
    hub = adapter.for_transformers()
    trust_remote_code = hub.pop("trust_remote_code")
    backbone.auto_model.load_adapter(adapter.name, adapter_kwargs=hub)
    merge_adapter(backbone.auto_model)
    if adapter.files.path(TOKENIZER_CONFIG) is not None:
        limit = backbone.max_seq_length
        tokenizer = AutoTokenizer.from_pretrained(
            adapter.name, trust_remote_code=trust_remote_code, **hub
        )
        if limit is not None:
            tokenizer.model_max_length = min(limit, tokenizer.model_max_length)
        backbone.processor = tokenizer


def measured(backbone: Transformer) -> Tensor:
    """The last hidden state (d,) of a short text, with the tokens that the tokenizer adds.

    Its width is not the config's hidden size where a projection follows the layers (OPT-350m).

    Raises:
        BackboneError: If it holds NaN or infinity, whatever the weights.
    """
    model = backbone.auto_model
    tokenizer: Any = backbone.tokenizer
    with reading("the model", BackboneError, "read a short text"), torch.no_grad():
        ids = tokenizer("A text.")["input_ids"] or [0]
        hidden: Tensor = model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state
    if not bool(torch.isfinite(hidden).all()):
        dtype = str(hidden.dtype).removeprefix("torch.")
        raise BackboneError(
            "a backbone must give finite hidden states, got NaN or infinity for a short text from "
            f"{type(model).__name__} in {dtype}; its checkpoint or its configuration is damaged, "
            "or its dtype is too narrow: try dtype='bfloat16'"
        )
    return hidden[0, -1]


def check_links(folder: Path) -> None:
    """Checks that no file of a checkpoint folder is a link out of it, see `check_inside`.

    Raises:
        LinkError: Names the link.
    """
    for path in folder.iterdir():
        if path.is_symlink() and _is_backbone_file(path.name):
            check_inside(path, folder)


def _is_backbone_file(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_BACKBONE_FILES, _SAFETENSORS, _TORCH_FILES))


def _makes_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return bool(tokenizer("a text", add_special_tokens=False)["input_ids"])
    except BaseException as error:  # tokenizers raises nothing narrower
        if not is_failure(error):
            raise
        return False


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer an existing token as padding if it has none; the vocabulary stays."""
    if tokenizer.pad_token is not None:
        return
    for candidate in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
        if candidate is not None:
            tokenizer.pad_token = candidate
            return
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)


def has_adapter(model: nn.Module) -> bool:
    """Whether a model holds a PEFT adapter beside its own weights."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def merge_adapter(model: nn.Module) -> None:
    """Merges the adapter of a model into its weights, in place; without one, does nothing.

    A folder that loads everywhere can hold no adapter.
    """
    if not has_adapter(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            merged = module.unload_and_optionally_merge_module(True, False, None)
        elif isinstance(module, BaseTunerLayer):
            module.merge()
            merged = module.get_base_layer()
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, merged)
    vars(model)["_hf_peft_config_loaded"] = False
    del model.peft_config


def backbone_model(model: SentenceTransformer) -> nn.Module:
    """The transformers model inside, e.g. a `LlamaModel`."""
    inner = getattr(model[0], "auto_model", None)
    if not isinstance(inner, nn.Module):
        raise UnembeddingError(
            "EmbedFilter needs a SentenceTransformer whose first module is a Transformer, got "
            f"{type(model[0]).__name__}"
        )
    return inner


def source_name(model: SentenceTransformer) -> str | None:
    """The folder or Hub id from which the backbone was loaded."""
    name = getattr(getattr(backbone_model(model), "config", None), "_name_or_path", None)
    return name or None


def source_folder(model: SentenceTransformer) -> Path | None:
    """The local folder that holds the backbone's files: a folder, or the Hub cache's snapshot."""
    name = source_name(model)
    if name is None:
        return None
    if os.path.isdir(name):
        return Path(name)
    commit = getattr(getattr(backbone_model(model), "config", None), "_commit_hash", None)
    try:
        return Path(snapshot_download(name, revision=commit, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def backbone_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that make up the backbone and its tokenizer.

    Raises:
        UnembeddingError: If there are no weights among them.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if path.name == SAFETENSORS_FILE]
    weights = weights or [path for path in files if _SAFETENSORS.fullmatch(path.name)]
    weights = weights or [path for path in files if path.name == TORCH_FILE]
    weights = weights or [path for path in files if _TORCH_FILES.fullmatch(path.name)]
    if not weights:
        raise UnembeddingError(f"a checkpoint folder must hold weights, got none in {folder}")
    return sorted(weights + [path for path in files if _BACKBONE_FILES.fullmatch(path.name)])


def small_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder beside its weights that a copy of it needs, and its card."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [p for p in files if _BACKBONE_FILES.fullmatch(p.name) or p.name == "README.md"]


def is_unchanged(model: nn.Module, folder: Path) -> bool:
    """Whether a live model still has the weights of its folder.

    Compares every tensor that is stored under a name of the model, whole: training may have moved a
    few rows of one matrix. False if a value differs beyond the cast to the live dtype, or nothing
    could be compared.
    """
    live = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    compared = 0
    for file in filter(Path.is_file, sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118 - no mapping
                    value = live.get(key, live.get(key.removeprefix(prefix)))
                    if value is None or value.device.type == "meta" or value.ndim == 0:
                        continue
                    theirs = stored.get_slice(key)
                    if list(theirs.get_shape()) != list(value.shape):
                        return False
                    rows = max(1, _BLOCK_VALUES * len(value) // max(1, value.numel()))
                    for first in range(0, len(value), rows):
                        mine = value[first : first + rows].cpu()
                        if not torch.equal(mine, theirs[first : first + rows].to(mine.dtype)):
                            return False
                    compared += 1
        except SafetensorError:
            return False
    return compared > 0


def tokenizer_patch(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """`tokenizer_config.json` with the padding of the live tokenizer.

    Returns:
        The new content, or None if the stored file already pads as the live tokenizer does.
    """
    path = folder / TOKENIZER_CONFIG
    config = read_json(path.read_bytes(), path.name, BackboneError) if path.is_file() else {}
    pad = config.get("pad_token")
    stored_pad = pad.get("content") if isinstance(pad, dict) else pad
    side = config.get("padding_side", "right")
    if stored_pad == tokenizer.pad_token and side == tokenizer.padding_side:
        return None
    config["pad_token"] = tokenizer.pad_token
    config["padding_side"] = tokenizer.padding_side
    return json_text(config).encode()
