"""A filtered model baked into plain weights: a folder without a filter whose embeddings are it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from st_embfilter.errors import FormatError
from st_embfilter.files.staging import staged
from st_embfilter.files.stored import StoredTensor
from st_embfilter.files.tensors import SAFETENSORS_FILE, open_checkpoint
from st_embfilter.files.writer import SafetensorsWriter, Slot
from st_embfilter.model.backbone import backbone_files, check_links
from st_embfilter.model.baked import reading_rows, rotation_of, row_spans, writing_rows
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.metadata import BAKED_FILE
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.prompts import recipe_from_dict
from st_embfilter.saved.load import read_saved
from st_embfilter.text import read_json, write_json
from st_embfilter.unembedding.head import meta_model, stored_name
from st_embfilter.unembedding.residual import Residual, residual_of
from st_embfilter.unembedding.source import Source

_POOLING_FILE: Final = "1_Pooling/config.json"
_COPIED: Final = (_POOLING_FILE, "sentence_bert_config.json", "config_sentence_transformers.json")

_CARD: Final = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
{base_model}tags:
- sentence-transformers
- embedfilter
---
# A filter baked into the weights

The language model is {base}; its logits are unchanged. Its pooled embedding of {d} numbers is that
of an EmbedFilter ({band} band) at full width: the first k numbers are the filter of width k, for
every k. {k} was chosen: `SentenceTransformer(path, truncate_dim={k})`, or `dimensions` in a server.
"""


@dataclass(frozen=True)
class Bakeable:
    """A filtered model whose filter can be baked.

    Attributes:
        layer: The filter, of a folded norm and not calibrated.
        pooling: Mode of its pooling, e.g. "mean".
        template: Template of its prompt, with `{text}`; None for plain text.
    """

    layer: EmbedFilterLayer
    pooling: str
    template: str | None


def bakeable(source: Source) -> Bakeable:
    """What a saved filtered model needs to be baked.

    Raises:
        FormatError: If its filter is no rotation of the normed state, or its prompt needs code.
    """
    layer = read_saved(source.files, trust_remote_code=True)  # no code runs
    metadata = layer.metadata
    if metadata.norm != "folded":
        raise FormatError(
            "only a filter with norm='folded' can be baked, because a rotation does not commute "
            f"with the norm's gain, got one without in {source.name}; build it with --norm folded"
        )
    if metadata.calibration is not None:
        raise FormatError(
            "a baked filter is a rotation, got a calibrated one, which also centres and stretches; "
            "build the filter without calibration"
        )
    recipe = None if metadata.prompt is None else recipe_from_dict(metadata.prompt)
    if recipe is not None and recipe.own_pooling is None:
        raise FormatError(
            f"a baked model reads one text once, got the prompt {recipe.name!r}, which needs code; "
            "build the model with prompteol, a template, or none"
        )
    path = source.files.path(_POOLING_FILE)
    config = {} if path is None else read_json(path.read_bytes(), _POOLING_FILE, FormatError)
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    name = modes[0].removeprefix("pooling_mode_") if len(modes) == 1 else "+".join(modes)
    return Bakeable(
        layer,
        {"cls_token": "cls", "mean_tokens": "mean"}.get(name, name),
        None if recipe is None else recipe.templates[0],
    )


def export_folder(
    name_or_path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Writes a filtered model as a plain one with rotated weights, for what loads no Dense.

    Tensors go through memory one at a time and in blocks.

    Args:
        name_or_path: Portable folder of a filtered model that was built with `norm="folded"`.
        target: Folder to write; must be missing or empty.
        dtype: The matrices' dtype; None for that in which each is stored.
        overwrite: Replace a model folder that is there.

    Returns:
        The width k of the filter, and d, the width of the embeddings.

    Raises:
        FormatError: If the filter cannot be baked.
        UnembeddingError: If the model's stream cannot be rotated, with the reason.
        OutputError: If the target is not empty, or cannot be written.
    """
    source = Source.of(name_or_path, norm="folded")
    if not source.is_folder:
        raise FormatError(f"a model to bake must be a folder, got {source.name}; download it")
    folder = Path(source.name)
    check_links(folder)
    found = bakeable(source)
    config = source.config()
    residual = residual_of(config)  # refuses what cannot be rotated before anything is read
    spectrum, provenance = source.unembedding().fit(precision="float64")
    metadata = found.layer.metadata
    if provenance.sha256 != metadata.provenance.sha256:
        raise FormatError(
            f"the filter must be of the model beside it, got one of another matrix in {folder}; "
            "build it again"
        )
    rotation = rotation_of(spectrum, metadata.band)
    with staged(target, overwrite=overwrite) as out:
        for file in backbone_files(folder):
            if not file.name.endswith((".safetensors", ".bin", ".index.json")):
                shutil.copyfile(file, out / file.name)
        for name in _COPIED:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)
        modules = read_json((folder / MODULES_FILE).read_bytes(), MODULES_FILE, FormatError, list)
        plain = [module for module in modules if not module["type"].endswith(".Dense")]
        for i, module in enumerate(plain):
            module |= {"idx": i, "name": str(i)}
        write_json(out / MODULES_FILE, plain)
        document = read_json(
            (folder / "config.json").read_bytes(), "config.json", FormatError, infinity=True
        )
        # vLLM cuts embeddings only of models that say so.
        document |= {"tie_word_embeddings": False, "is_matryoshka": True}
        if dtype is not None:
            document.pop("torch_dtype", None)
            document["dtype"] = str(dtype).removeprefix("torch.")
        write_json(out / "config.json", document)
        made_from = metadata.provenance
        base_model = (
            f"base_model: {made_from.model_id}\nbase_model_relation: finetune\n"
            if made_from.revision is not None
            else ""
        )
        (out / "README.md").write_text(
            _CARD.format(
                base=metadata.provenance.model_id,
                base_model=base_model,
                d=metadata.d,
                k=metadata.k,
                band=metadata.band,
            ),
            encoding="utf-8",
        )
        (out / BAKED_FILE).write_text(metadata.to_json(), encoding="utf-8")
        with (out / SAFETENSORS_FILE).open("wb") as weights:
            jobs = list(baked_tensors(source, config, residual, rotation, dtype))
            _write_safetensors(weights, jobs)
    return metadata.k, metadata.d


@dataclass(frozen=True)
class Job:
    """A tensor of a baked model.

    Attributes:
        name: The tensor's name in the model.
        shape: Shape of the whole tensor.
        dtype: What it is stored in.
        rows: The tensor's blocks of rows, in the dtype of the arithmetic.
        axis: Which of its axes is rotated, 0 or 1; None for none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Iterable[Tensor]
    axis: int | None = None


def baked_tensors(
    source: Source,
    config: PretrainedConfig,
    residual: Residual,
    rotation: Tensor,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None,
) -> Iterator[Job]:
    """The tensors of a language model after the rotation.

    Args:
        source: The language model, which may have more blocks than the config.
        config: Of the model that is made.
        residual: How its tensors meet the stream.
        rotation: R, (d, d) float64.
        dtype: Of the matrices, all of them or by name; None for that in which each is stored.

    Raises:
        FormatError: If a tensor is quantised.
        UnembeddingError: If a tensor is missing.
    """
    model = meta_model(config)
    checkpoint, tied = open_checkpoint(source.files), source.unembedding().tied
    gains = residual.gains
    narrow = rotation.to(torch.float32)

    def stored(name: str) -> StoredTensor:
        place = residual.embedding if tied and name == residual.head else name
        found = checkpoint.tensor(stored_name(model, checkpoint, place))
        if found.dtype.itemsize < 2:
            raise FormatError(
                f"a model to bake must hold unquantised weights, got {found.name!r} in "
                f"{found.dtype}; take the unquantised model"
            )
        return found

    for name, parameter in model.state_dict().items():
        tensor, shape = stored(name), tuple(parameter.shape)
        target = (dtype.get(name) if isinstance(dtype, Mapping) else dtype) or tensor.dtype
        axis = None
        # Float32 and wider get products in float64, so that their rounding is the only one.
        turn = rotation if target.itemsize >= 4 else narrow
        rows: Iterable[Tensor]
        if name in gains:
            rows = iter([torch.full(shape, 1.0 - residual.offset)])
        elif name in residual.writes and len(shape) == 1:
            rows, axis = (turn @ vector.to(turn.dtype) for vector in _blocks(tensor, shape)), 0
        elif name in residual.writes:
            rows, axis = writing_rows(tensor.read_rows, tensor.shape, turn), 0
        elif name in residual.reads or name == residual.embedding:
            norm = residual.reads.get(name)
            gain = None
            if norm is not None:
                weight = stored(norm)
                gain = weight.read_rows(0, weight.shape[0])[:, 0].double() + residual.offset
            rows, axis = reading_rows(tensor.read_rows, tensor.shape, turn, gain), 1
        else:
            rows, target = _blocks(tensor, shape), tensor.dtype
        yield Job(name, shape, target, rows, axis)


def _blocks(tensor: StoredTensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    if len(shape) == 1:  # vectors are columns
        yield tensor.read_rows(0, tensor.shape[0])[:, 0]
        return
    for first, last in row_spans(*tensor.shape):
        yield tensor.read_rows(first, last)


def _write_safetensors(out: BinaryIO, jobs: list[Job]) -> None:
    """A safetensors file, tensor by tensor; the library's own writer wants all in memory."""
    writer = SafetensorsWriter(out, {job.name: Slot.of_shape(job.dtype, job.shape) for job in jobs})
    for job in jobs:
        blocks = (block.to(job.dtype).contiguous().view(torch.uint8) for block in job.rows)
        writer.write(job.name, (memoryview(cast("Any", block.numpy())) for block in blocks))
