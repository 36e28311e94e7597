"""Find the unembedding matrix W_U of a language model and stream it.

Which tensor it is comes from transformers itself: the output embedding of the model, built from its
config on the meta device with weights tied, so no list of names has to be kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

from st_embfilter.errors import UnembeddingError
from st_embfilter.files.hub import HubFiles
from st_embfilter.files.tensors import (
    Checkpoint,
    FolderFiles,
    ModelFiles,
    StoredTensor,
    open_checkpoint,
)
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import Precision, Spectrum, spectrum_of
from st_embfilter.unembedding.adapter import Adapter
from st_embfilter.unembedding.gguf import find_gguf, read_gguf
from st_embfilter.unembedding.quantized import check_not_packed, dequantized

logger = logging.getLogger(__name__)

#: Called with (bytes done, bytes in all) after each block that is read.
Progress = Callable[[int, int], None]

CONFIG_FILE: Final = "config.json"

#: More than any model has.
MAX_LAYERS: Final = 2_000

_BLOCK_BYTES: Final = 64 * 2**20
_LARGE_BYTES: Final = 32 * 2**20


@dataclass(frozen=True)
class Provenance:
    """Which unembedding matrix a filter was made from.

    Attributes:
        tensor: Name of the tensor in the checkpoint.
        shape: (V, d).
        dtype: Stored dtype, e.g. "bfloat16".
        tied: Whether the model shares it with its input embedding.
        sha256: Hash of the tensor's stored bytes, row by row, little-endian.
        model_id: Hub id, or the name of a local folder; None for a bare tensor.
        revision: Commit hash on the Hub, where known.
    """

    tensor: str
    shape: tuple[int, int]
    dtype: str
    tied: bool
    sha256: str
    model_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Unembedding:
    """A found unembedding matrix that can be streamed.

    Attributes:
        stored: The matrix.
        tied: Whether the model shares it with its input embedding.
        model_id: Hub id, or the name of a local folder; None for a bare tensor.
        revision: Commit hash on the Hub, where known.
    """

    stored: StoredTensor
    tied: bool = False
    model_id: str | None = None
    revision: str | None = None

    @property
    def d(self) -> int:
        """Width of the hidden state."""
        return self.stored.shape[1]

    def blocks(
        self, rows: int | None = None, *, seen: Callable[[Tensor], object] | None = None
    ) -> Iterator[Tensor]:
        """Row blocks in order, each read while the one before is worked on.

        Args:
            rows: Rows of a block; by default as many as fill 64 MiB in float64.
            seen: Called with each block in order, in the thread that reads.

        Yields:
            (n, d) tensors in the stored dtype, on the CPU.
        """
        total = self.stored.shape[0]
        rows = rows or max(256, _BLOCK_BYTES // (8 * self.d))
        spans = [(first, min(first + rows, total)) for first in range(0, total, rows)]

        def read(first: int, last: int) -> Tensor:
            block = self.stored.read_rows(first, last)
            if seen is not None:
                seen(block)
            return block

        with ThreadPoolExecutor(1, thread_name_prefix="read-unembedding") as reader:
            upcoming = reader.submit(read, *spans[0])
            for span in [*spans[1:], None]:
                block = upcoming.result()
                if span is not None:
                    upcoming = reader.submit(read, *span)
                yield block

    def fit(
        self,
        band: Band | None = None,
        *,
        precision: Precision | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> tuple[Spectrum, Provenance]:
        """Spectrum and provenance, in one pass over the matrix.

        Args:
            band: The band that must be exact.
            precision: Arithmetic inside a block, see `spectrum_of`. By default "auto" for matrices
                stored in 16 bits or less with more than 32 MiB, and "float64" for all others and
                for remote ones, which "auto" may have to read twice.
            device: Where the products are computed.
            progress: Called after each block.
        """
        digest = hashlib.sha256()
        passes = 0

        def hashed_blocks() -> Iterator[Tensor]:
            nonlocal passes
            passes += 1
            done = 0
            hashing = (lambda block: digest.update(_bytes(block))) if passes == 1 else None
            for block in self.blocks(seen=hashing):
                yield block
                done += block.nbytes
                if progress is not None:
                    progress(done, self.stored.nbytes)

        if precision is None:
            large = self.stored.nbytes > _LARGE_BYTES
            quick = large and self.stored.dtype.itemsize <= 2 and not self.stored.remote
            precision = "auto" if quick else "float64"
        spectrum = spectrum_of(hashed_blocks, self.d, band=band, precision=precision, device=device)
        if passes > 1:
            logger.info("float32 blocks were not exact enough for this band; summed in float64")
        return spectrum, self._provenance(digest.hexdigest())

    def provenance(self, dtype: torch.dtype | None = None) -> Provenance:
        """Provenance alone: one pass that only hashes.

        Args:
            dtype: Hash the matrix as if stored in this dtype, where it loses nothing: so a model
                that was loaded in a wider one hashes as its checkpoint does.
        """
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(_bytes(block if dtype is None else _narrowed(block, dtype)))
        return self._provenance(digest.hexdigest())

    def _provenance(self, sha256: str) -> Provenance:
        return Provenance(
            tensor=self.stored.name,
            shape=self.stored.shape,
            dtype=str(self.stored.dtype).removeprefix("torch."),
            tied=self.tied,
            sha256=sha256,
            model_id=self.model_id,
            revision=self.revision,
        )


def unembedding_of_tensor(weight: Tensor, name: str = "weight") -> Unembedding:
    """An unembedding matrix given as a tensor (V, d)."""
    return Unembedding(StoredTensor.of(name, weight))


def unembedding_of_model(model: nn.Module) -> Unembedding:
    """The unembedding matrix of a live transformers model.

    Args:
        model: A model with `get_output_embeddings()`; a causal LM, not its headless backbone.

    Raises:
        UnembeddingError: If it has no output embedding.
    """
    names, tied, weight = _output_embedding(model)
    config = getattr(model, "config", None)
    model_id, revision = model_identity(
        getattr(config, "_name_or_path", "") or None, getattr(config, "_commit_hash", None)
    )
    return Unembedding(StoredTensor.of(names[0], weight), tied, model_id, revision)


def unembedding_of_folder(
    folder: str | os.PathLike[str], *, masked_lm: bool = False, trust_remote_code: bool = False
) -> Unembedding:
    """The unembedding matrix in a local checkpoint folder; the model is not loaded.

    Args:
        folder: Holds `config.json` and the weights, or a PEFT adapter (`adapter_config.json`), or
            one GGUF file, which may also be given itself.
        masked_lm: Take the decoder matrix of a masked language model; outside the paper.
        trust_remote_code: Allow model code of the checkpoint to run (it names the tensor).

    Raises:
        UnembeddingError: If the folder, its head or its weights are missing or unfit.
    """
    folder = Path(folder)
    gguf = find_gguf(folder)
    if gguf is not None:
        stored, tied = read_gguf(gguf)
        return Unembedding(stored, tied, gguf.name)
    if not folder.is_dir():
        raise UnembeddingError(f"a model folder must exist, got {folder}; check the path")
    return _unembedding_of_files(FolderFiles(folder), None, masked_lm, trust_remote_code)


def unembedding_of_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    masked_lm: bool = False,
    trust_remote_code: bool = False,
) -> Unembedding:
    """The unembedding matrix of a checkpoint on the Hub; the model is not downloaded.

    Only the bytes of the matrix are read, by range requests. A file that is in the Hub cache is
    read from there; `.bin` weights, which have no index of their bytes, are downloaded into it.

    Args:
        repo_id: E.g. "org/name"; of a language model or of a PEFT adapter.
        revision: Branch, tag or commit.
        token: Hub token.
        masked_lm: Take the decoder matrix of a masked language model; outside the paper.
        trust_remote_code: Allow model code of the checkpoint to run (it names the tensor).

    Raises:
        HubError: If the Hub, the repository or the revision cannot be reached.
        UnembeddingError: If the head or the weights are missing or unfit.
    """
    files = HubFiles(repo_id, revision=revision, token=token)
    return _unembedding_of_files(files, token, masked_lm, trust_remote_code)


def _unembedding_of_files(
    files: ModelFiles, token: str | bool | None, masked_lm: bool, trust_remote_code: bool
) -> Unembedding:
    config_file = files.path(CONFIG_FILE)  # first, as it pins the commit
    adapter = Adapter.open(files)
    base = files
    if adapter is not None:
        base = adapter.base_files(token)
        config_file = base.path(CONFIG_FILE)
    if config_file is None:
        raise UnembeddingError(
            f"a model folder must hold {CONFIG_FILE}, got none in {base.where}; give the folder or "
            "the Hub id of a transformers checkpoint"
        )
    config = _load_config(base, token, trust_remote_code)
    model = meta_model(config, masked_lm=masked_lm, trust_remote_code=trust_remote_code)
    head, tied = find_output_embedding(model, open_checkpoint(base), base.where, adapter)
    source = files if adapter is not None and adapter.trains(head.name) else base
    return Unembedding(head, tied, *model_identity(source.name, source.commit))


def meta_model(
    config: PretrainedConfig, *, masked_lm: bool = False, trust_remote_code: bool = False
) -> nn.Module:
    """The language model of a config without weights, on the meta device.

    Args:
        config: Of a causal LM; of a vision-language model, whose text decoder is nested; or, with
            `masked_lm`, of a masked LM.
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
            f"{model_type!r}: {_reason(error)}"
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
    names, tied, weight = _output_embedding(model)
    # Most checkpoints hold it under the model's own name. Only for others does transformers compile
    # the renamings of all its architectures, which takes as long as the spectrum of a small model.
    found = next((name for name in names if name in checkpoint.names), None)
    if found is None:
        stored_as = _stored_names(model, checkpoint.names)
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


def model_identity(name_or_path: str | None, revision: str | None) -> tuple[str | None, str | None]:
    """Hub id and commit of a model, without a path of this machine.

    A folder of the Hub cache is read as the repository it caches; of any other folder only the
    name remains.
    """
    if name_or_path is None or not os.path.isdir(name_or_path):
        return name_or_path, revision
    path = Path(name_or_path).absolute()
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})", str(path))
    if cached:
        return cached[1].replace("--", "/", 1), cached[2]
    return path.resolve().name, revision


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
    _, _, weight = _output_embedding(model)
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


def _output_embedding(model: nn.Module) -> tuple[list[str], bool, Tensor]:
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


def _stored_names(model: nn.Module, keys: frozenset[str]) -> dict[str, str]:
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


def _load_config(
    files: ModelFiles, token: str | bool | None, trust_remote_code: bool
) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            files.name, revision=files.commit, token=token, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # configs of strangers fail in many ways, all mean the same
        raise UnembeddingError(
            f"{CONFIG_FILE} in {files.where} must describe a model that transformers knows, got: "
            f"{_reason(error)}"
        ) from error
    return config


def _narrowed(block: Tensor, dtype: torch.dtype) -> Tensor:
    if block.dtype == dtype:
        return block
    cast = block.to(dtype)
    return cast if torch.equal(cast.to(block.dtype), block) else block


def _bytes(block: Tensor) -> memoryview:
    return memoryview(cast("Any", block.contiguous().view(torch.uint8).numpy())).cast("B")


def _reason(error: BaseException) -> str:
    message = str(error).strip()
    if "trust_remote_code" in message:
        return (
            "model code in the checkpoint, which runs only with trust_remote_code=True "
            "(--trust-remote-code); read that code first"
        )
    return (message.splitlines() or [type(error).__name__])[0]
