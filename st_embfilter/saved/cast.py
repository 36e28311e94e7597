"""The dtype of a saved backbone: that of the live model, whatever its checkpoint is stored in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from torch import nn

from st_embfilter.errors import BackboneError, FormatError
from st_embfilter.files.folder import FolderFiles
from st_embfilter.files.stored import DTYPE_NAMES, SAFETENSORS_DTYPES, LocalSafetensors
from st_embfilter.files.tensors import SAFETENSORS_FILE
from st_embfilter.files.writer import RawTensor, raw_tensors, write_safetensors
from st_embfilter.saved.layout import STATIC_FOLDER, TABLE
from st_embfilter.text import read_json, write_json

_CONFIG: Final = "config.json"
_KEYS: Final = ("dtype", "torch_dtype")
_CAST: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def other_dtype(model: nn.Module, folder: Path) -> torch.dtype | None:
    """The dtype of a live model, if a copy of its checkpoint would load in another one.

    Args:
        model: A transformers model whose weights are those of the folder, but for their dtype.
        folder: The checkpoint that it was loaded from.

    Returns:
        None if a copy keeps the dtype, and for quantised weights, which have several.
    """
    config = read_json((folder / _CONFIG).read_bytes(), _CONFIG, BackboneError)
    live: Any = model.dtype
    if "quantization_config" in config or live not in _CAST:
        return None
    stated = next((config[key] for key in _KEYS if config.get(key) is not None), None)
    if int(transformers.__version__.split(".")[0]) < 5:
        loads_in: object = torch.float32  # whatever is stored
    elif isinstance(stated, str):
        loads_in = getattr(torch, stated.removeprefix("torch."), None)
    else:
        stored = {raw.dtype for file in _shards(folder) for raw in _raw(file).values()}
        loads_in = live if stored == {DTYPE_NAMES[live]} else None
    return None if live == loads_in else live


def asked_dtype(model: nn.Module, folder: Path | None, *, always: bool = False) -> str | None:
    """The dtype of a live model, e.g. "float32", if it is not the one that its checkpoint loads in.

    Args:
        model: A transformers model.
        folder: Its checkpoint, if there is one.
        always: Whether to name it in any case.
    """
    there = folder is not None and (folder / _CONFIG).is_file()
    if not always and (folder is None or not there or other_dtype(model, folder) is None):
        return None
    live: Any = model.dtype
    return str(live).removeprefix("torch.")


def stored_dtype(files: FolderFiles) -> str | None:
    """The dtype in which a saved model is stored and loads; of a static model that of its table.

    Returns:
        None where it loads in another dtype than it is stored in, as its checkpoint did.

    Raises:
        EmbedFilterError: If the file that says it is damaged.
    """
    table = files.open(f"{STATIC_FOLDER}/{SAFETENSORS_FILE}")
    if table is not None:
        return str(table.tensor(TABLE).dtype).removeprefix("torch.")
    path = files.path(_CONFIG)
    config = (
        {} if path is None else read_json(path.read_bytes(), _CONFIG, FormatError, infinity=True)
    )
    stated = next((config[key] for key in _KEYS if config.get(key) is not None), None)
    name = stated.removeprefix("torch.") if isinstance(stated, str) else ""
    dtype = getattr(torch, name, None)
    if dtype not in _CAST:
        return None
    stored = {raw.dtype for file in _shards(Path(files.name)) for raw in _raw(file).values()}
    return name if DTYPE_NAMES[dtype] in stored else None


def cast_weights(source: Path, target: Path, model: nn.Module, unembedding: str) -> None:
    """Writes a safetensors file anew, each tensor in the dtype that it has in a live model.

    One tensor keeps its dtype where the live one would round it: the unembedding matrix, whose hash
    the filter names.

    Args:
        source: The file as it is stored.
        target: Where it goes; may be the same.
        model: A transformers model with these weights; tensors that it has not take its `dtype`.
        unembedding: Name of W_U in the checkpoint.
    """
    live = {name: value.dtype for name, value in model.state_dict().items()}
    main: Any = model.dtype
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tensors = {}
    for name, raw in _raw(source).items():
        dtype = live.get(name, live.get(name.removeprefix(prefix), main))
        stored = SAFETENSORS_DTYPES.get(raw.dtype)
        rounds = stored in _CAST and torch.promote_types(stored, dtype) != dtype
        if stored not in _CAST or dtype not in _CAST or (name == unembedding and rounds):
            tensors[name] = raw
        else:
            tensors[name] = _cast(raw, stored, dtype)
    written = target.with_name(f"{target.name}.new")
    write_safetensors(written, tensors)
    os.replace(written, target)


def state_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Makes `config.json` and the index of the shards say what `cast_weights` wrote."""
    name = str(dtype).removeprefix("torch.")
    path = folder / _CONFIG
    config = read_json(path.read_bytes(), _CONFIG, BackboneError, infinity=True)
    parts = [v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict)]
    for part in (config, *parts):
        part.update(dict.fromkeys([key for key in _KEYS if key in part], name))
    if not any(key in config for key in _KEYS):
        config["torch_dtype"] = name  # which every version of transformers reads
    write_json(path, config)
    for path in folder.glob("*.safetensors.index.json"):
        index = read_json(path.read_bytes(), path.name, BackboneError)
        sizes = (raw.nbytes for file in _shards(folder) for raw in _raw(file).values())
        index["metadata"] = {"total_size": sum(sizes)}
        write_json(path, index)


def _shards(folder: Path) -> list[Path]:
    return sorted(filter(Path.is_file, folder.glob("model*.safetensors")))


def _raw(file: Path) -> dict[str, RawTensor]:
    return raw_tensors(LocalSafetensors(file))


def _cast(raw: RawTensor, stored: torch.dtype, dtype: torch.dtype) -> RawTensor:
    if stored == dtype:
        return raw

    def pieces() -> Iterator[memoryview]:
        for piece in raw.pieces():
            values = torch.frombuffer(piece, dtype=stored).to(dtype)
            yield memoryview(cast("Any", values.view(torch.uint8).numpy()))

    size = raw.nbytes // stored.itemsize * dtype.itemsize
    return RawTensor(DTYPE_NAMES[dtype], raw.shape, size, pieces)
