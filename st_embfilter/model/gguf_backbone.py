"""A GGUF file as a checkpoint folder: dequantised weights, `config.json` and tokenizer.

Names, shapes and layout of the weights and the vocabulary come from transformers' own conversion of
GGUF files. The tensors pass one by one from file to file, because its loader holds all of them
twice; and every other part of the package then meets an ordinary checkpoint.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from st_embfilter.errors import BackboneError
from st_embfilter.files.tensors import SAFETENSORS_FILE
from st_embfilter.files.writer import SafetensorsWriter, Slot
from st_embfilter.model.gguf_tokenizer import gguf_tokenizer, write_tokenizer
from st_embfilter.text import first_line, progress_bar, write_json
from st_embfilter.unembedding.gguf import INPUT, OUTPUT, GGUFFile, GGUFTensor, find_gguf
from st_embfilter.unembedding.head import meta_model
from st_embfilter.unembedding.source import Source

logger = logging.getLogger(__name__)

#: Dtypes in which the weights may be stored.
_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)

#: Values that are dequantised at a time, of the matrices that no processor of transformers touches.
_BLOCK_VALUES: Final = 2**22

#: Of RoPE for texts longer than in training; transformers leaves it out as well.
_LEFT_OUT: Final = frozenset({"rope_freqs.weight"})

#: Keys of a config that name this machine or the quantisation.
_UNCLEAN_KEYS: Final = ("_name_or_path", "_model_name_or_path", "name_or_path")


_folders: dict[tuple[object, ...], Source] = {}


def readable(
    source: Source, dtype: torch.dtype | str | None = None, *, show_progress_bar: bool = True
) -> tuple[Source, torch.dtype | str | None]:
    """A source that transformers can load, and the dtype to ask it for: as they are, but for GGUF.

    Args:
        source: A language model in any form.
        dtype: Dtype of a GGUF file's weights, see `gguf_folder`.
        show_progress_bar: Show a bar while weights are dequantised.

    Raises:
        EmbedFilterError: Whatever `gguf_folder` raises.
    """
    path = find_gguf(Path(source.name))
    if path is None:
        return source, dtype
    return gguf_folder(path, dtype, show_progress_bar=show_progress_bar), None


def gguf_folder(
    path: Path, dtype: torch.dtype | str | None = None, *, show_progress_bar: bool = True
) -> Source:
    """Writes a GGUF file as a checkpoint folder below the system's temporary folder.

    The same file in the same dtype is written once in a process. The folder holds the whole causal
    LM, its head included, in one safetensors file in the dtype of its config, from which
    transformers loads without a second copy in memory. It is named like the file, and removed when
    the process ends.

    Args:
        path: The GGUF file.
        dtype: float16, bfloat16 or float32, or its name; None and "auto" for float16, or bfloat16
            where the hidden states leave float16's range (Gemma).
        show_progress_bar: Show a bar while the weights are dequantised.

    Raises:
        UnembeddingError: If the file is damaged, or none of a kind that can be read.
        BackboneError: If transformers cannot make this architecture from GGUF, the tokenizer or a
            weight is missing, or a weight does not fit the dtype.
    """
    file = None
    if dtype is None or dtype == "auto":
        file = GGUFFile.open(path)
        dtype = _default_dtype(file)
    chosen = _dtype(dtype)
    state = path.stat()
    key = (path.resolve(), state.st_size, state.st_mtime_ns, chosen)
    found = _folders.get(key)
    if found is None or not found.is_folder:
        parent = Path(tempfile.mkdtemp(prefix="st-embfilter-"))
        atexit.register(_remove, parent, os.getpid())
        folder = parent / path.name
        folder.mkdir()
        file = file or GGUFFile.open(path)
        write_gguf_folder(file, folder, chosen, show_progress_bar=show_progress_bar)
        found = _folders[key] = Source(os.fspath(folder), gguf_sha256=_sha256(path))
    return found


def write_gguf_folder(
    file: GGUFFile, folder: Path, dtype: torch.dtype, *, show_progress_bar: bool = True
) -> None:
    """Writes a GGUF file into an empty folder, see `gguf_folder`; takes its tokenizer apart."""
    path = file.path
    tokenizer = gguf_tokenizer(file)  # first, as it takes memory that it gives back
    write_tokenizer(tokenizer, folder)
    del tokenizer
    for name in [key for key, value in file.metadata.items() if isinstance(value, list)]:
        if name.startswith("tokenizer."):
            file.metadata[name] = []
    config = gguf_config(file)
    model = meta_model(config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    write_json(folder / "config.json", _clean(config))
    licence = file.metadata.get("general.license")
    if isinstance(licence, str):  # which the card of a filtered model inherits
        (folder / "README.md").write_text(
            f"---\nlicense: {json.dumps(licence)}\n---\n", encoding="utf-8"
        )
    values = sum(prod(tensor.shape) for tensor in file.tensors.values())
    with (
        (folder / SAFETENSORS_FILE).open("wb") as target,
        progress_bar(
            f"Weights of {path.name}", "", values, show=show_progress_bar, scaled=True
        ) as bar,
    ):
        sink = _Parameters(target, model, dtype, path.name)
        for name, first, part in _weights(file, model, config, bar):
            sink.write(name, first, part)
        sink.check()


def gguf_config(file: GGUFFile) -> PretrainedConfig:
    """The config of a GGUF model, as transformers reads it.

    Raises:
        BackboneError: If it knows no such architecture; names those that it knows.
    """
    architecture = file.metadata.get("general.architecture")
    known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
    if INPUT not in file.tensors:
        raise BackboneError(
            f"a GGUF model must hold {INPUT}, got {len(file.tensors)} other tensors in "
            f"{file.path.name}"
        )
    if f"{architecture}.block_count" not in file.metadata:
        raise BackboneError(
            "a GGUF model must state its architecture and sizes, got metadata without them in "
            f"{file.path.name}"
        )
    with tempfile.TemporaryDirectory(prefix="st-embfilter-") as folder:
        _write_outline(file, Path(folder) / "outline.gguf")
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file="outline.gguf")
        except Exception as error:  # metadata of strangers fail in many ways, all mean the same
            raise BackboneError(
                f"transformers must be able to read the architecture from GGUF ({known}), got "
                f"{architecture!r} in {file.path.name}: {first_line(error)}"
            ) from error
    config.vocab_size = file.tensors[INPUT].shape[0]
    return config


def _weights(
    file: GGUFFile, model: nn.Module, config: PretrainedConfig, bar: Any
) -> Iterator[tuple[str, int, Tensor]]:
    """Parts of the weights: name in transformers, first row, values."""
    architecture = file.metadata["general.architecture"]
    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=config.to_dict())
    headless: Any = getattr(model, str(model.base_model_prefix))
    names = get_gguf_hf_weights_map(_names_of(model, headless), processor)
    merged: dict[str, Any] = {"tensors": {}}  # experts, which several tensors of the file make up
    for tensor in file.tensors.values():
        target = names.get(tensor.name)
        if tensor.name in (INPUT, OUTPUT) and target is not None and len(tensor.shape) == 2:
            rows = max(1, _BLOCK_VALUES // tensor.shape[1])
            for first in range(0, tensor.shape[0], rows):
                part = file.rows(tensor, first, min(first + rows, tensor.shape[0]))
                yield target, first, part
                bar.update(part.numel())
            continue
        values = file.rows(tensor).to(torch.float32).numpy()
        made = processor.process(
            weights=values,
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=merged,
        )
        bar.update(prod(tensor.shape))
        if made.name in names:
            yield names[made.name], 0, torch.from_numpy(made.weights.copy())
        elif made.name is not None:
            _check_left_out(tensor, file)
    for name, value in merged["tensors"].items():
        yield name, 0, value


def _names_of(model: Any, *children: Any) -> Any:
    """What transformers asks of a model to map names: of itself, then of its modules.

    It makes a map of all names of gguf for each module; that of the headless model suffices.
    """
    return SimpleNamespace(
        config=model.config,
        state_dict=model.state_dict,
        named_children=lambda: [(model.base_model_prefix, _names_of(child)) for child in children],
    )


def _check_left_out(tensor: GGUFTensor, file: GGUFFile) -> None:
    if tensor.name not in _LEFT_OUT:
        raise BackboneError(
            f"transformers must have a place for every tensor, got {tensor.name!r} of "
            f"{tensor.shape} in {file.path.name}, which is not of its architecture"
        )
    logger.warning(
        "%s scales positions for texts longer than in training (%s); transformers leaves that out",
        file.path.name,
        tensor.name,
    )


class _Parameters:
    """The parameters of a model in a safetensors file, written in any order.

    Args:
        file: Open for writing, and empty.
        model: A causal LM; tied parameters are one.
        dtype: Dtype of all of them in the file.
        origin: Name of the GGUF file, for errors.
    """

    def __init__(self, file: BinaryIO, model: nn.Module, dtype: torch.dtype, origin: str) -> None:
        self._dtype = dtype
        self._origin = origin
        self._shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        self._missing = {name: prod(shape) for name, shape in self._shapes.items()}
        self._writer = SafetensorsWriter(
            file, {name: Slot.of_shape(dtype, shape) for name, shape in self._shapes.items()}
        )

    def write(self, name: str, first: int, part: Tensor) -> None:
        """Writes rows of a parameter.

        Args:
            name: Name of the parameter; of tied ones, all but the first are left out.
            first: First row.
            part: (n, ...) in any floating dtype.
        """
        shape = self._shapes.get(name)
        if shape is None:
            return
        if tuple(part.shape[1:]) != shape[1:] or first + part.shape[0] > shape[0]:
            raise BackboneError(
                f"the weights of a GGUF file must have the shapes of its metadata, got "
                f"{tuple(part.shape)} for {name!r} of {shape} in {self._origin}"
            )
        cast = part.to(self._dtype).contiguous()
        if not bool(torch.isfinite(cast).all()):
            largest = float(part.abs().max())
            raise BackboneError(
                f"weights must be finite in {str(self._dtype).removeprefix('torch.')} (at most "
                f"{torch.finfo(self._dtype).max:.5g}), got {largest:.5g} in {name!r} of "
                f"{self._origin}; build with dtype bfloat16 or float32"
            )
        row = prod(shape[1:]) * self._dtype.itemsize
        self._writer.write(name, [cast.view(torch.uint8).numpy().data], first * row)
        self._missing[name] -= part.numel()

    def check(self) -> None:
        """Checks that every parameter was written."""
        missing = [name for name, count in self._missing.items() if count]
        if missing:
            raise BackboneError(
                f"a GGUF model must hold every weight of its architecture, got none for "
                f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)} in {self._origin}"
            )


def _write_outline(file: GGUFFile, path: Path) -> None:
    """A GGUF file of the same metadata and tensor names, with one number for each tensor.

    transformers has to read it to tell the config, and makes an object of each value that it reads.
    """
    import gguf

    architecture = file.metadata["general.architecture"]
    writer = gguf.GGUFWriter(path, architecture)
    add: dict[type, Any] = {
        bool: writer.add_bool,
        str: writer.add_string,
        float: writer.add_float32,
    }
    add[int] = writer.add_int64
    for key, value in file.metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            if value:
                writer.add_array(key, value)
        elif type(value) is int and value >= 0:
            writer.add_uint64(key, value)
        else:
            add[type(value)](key, value)
    rows = file.tensors[INPUT].shape[0]
    if f"{architecture}.vocab_size" not in file.metadata:  # else taken from the vocabulary
        writer.add_uint32(f"{architecture}.vocab_size", rows)
    for name in file.tensors:
        writer.add_tensor(name, torch.zeros(1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _clean(config: PretrainedConfig) -> dict[str, Any]:
    """The content of `config.json`, also for readers that know RoPE by its older keys."""
    document: dict[str, Any] = json.loads(config.to_json_string())
    for key in _UNCLEAN_KEYS:
        document.pop(key, None)
    rope = document.get("rope_parameters")
    if isinstance(rope, dict):
        whole = rope.get("full_attention", rope)
        document.setdefault("rope_theta", whole.get("rope_theta"))
        if "sliding_attention" in rope:
            document.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])
    return document


def _default_dtype(file: GGUFFile) -> torch.dtype:
    # Gemma was trained in bfloat16, and its residual stream grows past 65,504.
    gemma = str(file.metadata.get("general.architecture", "")).startswith("gemma")
    return torch.bfloat16 if gemma else torch.float16


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in _DTYPES:
        raise BackboneError(
            f"the weights of a GGUF file are stored in float16, bfloat16 or float32, got {dtype!r}"
        )
    return chosen


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)
