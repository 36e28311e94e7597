"""What `verify` compares of a folder with a filter baked into its weights.

By itself: with W' = W_U diag(g) R^T the Gram matrix W'^T W' is diagonal, and on its diagonal stand
the squares of the singular values in the order in which the window grows. Against the language
model: every tensor, rotated anew.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from transformers import AutoTokenizer

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.tensors import open_checkpoint
from st_embfilter.model.baked import rotation_of, rotation_order
from st_embfilter.model.depth import config_changes, text_config
from st_embfilter.model.metadata import BAKED_FILE, FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.saved import layout
from st_embfilter.saved.baked_folder import Job, baked_tensors
from st_embfilter.saved.checks import FLOAT32, turn_bounds
from st_embfilter.saved.file_checks import check_surroundings, document
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.text import reading, shown
from st_embfilter.unembedding.head import meta_model, stored_name
from st_embfilter.unembedding.matrix import Unembedding
from st_embfilter.unembedding.residual import residual_of
from st_embfilter.unembedding.source import Source

#: Keys of a configuration that export changes, and those that say where it came from.
_EXPORTED: Final = frozenset(
    {"tie_word_embeddings", "is_matryoshka", "dtype", "torch_dtype", "_name_or_path"}
    | {"architectures", "transformers_version"}
)

#: How many times its root mean square the largest of up to 10^8 rounding errors may be.
_LARGEST: Final = 8.0


def find_baked(files: ModelFiles) -> FilterMetadata | None:
    """What was baked into a folder; None for other folders.

    Raises:
        FormatError: If the metadata is malformed.
    """
    path = files.path(BAKED_FILE)
    return None if path is None else FilterMetadata.from_json(path.read_bytes())


def check_baked_modules(files: ModelFiles, d: int) -> tuple[bool | None, str]:
    """The pipeline and the small files must be those that `export` writes.

    Args:
        files: Of the folder.
        d: Width of the model.

    Raises:
        FormatError: If a file is missing or says something else.
    """
    found = [
        {k: v for k, v in one.items() if k != "idx"} if isinstance(one, dict) else one
        for one in document(files, MODULES_FILE, list)
    ]
    whole = layout.modules_document("Transformer", "Pooling", normalize=True)
    wanted = [
        {"name": str(i), "path": one["path"], "type": one["type"]}
        for i, one in enumerate([whole[0], whole[1], whole[3]])
    ]
    if found not in (wanted, wanted[:2]):
        return False, f"{MODULES_FILE} must hold Transformer > Pooling [> Normalize], got another"
    layout.check_transformer_config(document(files, layout.TRANSFORMER_CONFIG))
    layout.check_pooling_config(document(files, layout.POOLING_CONFIG), d)
    config = document(files, layout.BACKBONE_CONFIG, infinity=True)
    if config.get("is_matryoshka") is not True or config.get("tie_word_embeddings") is not False:
        return False, "config.json must say is_matryoshka and untied embeddings"
    return check_surroundings(files, "as export writes them")


def check_config(source: Source, base: Source, metadata: FilterMetadata) -> tuple[bool, str]:
    """The configuration must be that of the language model, but for what export changes in it.

    Of the same tensors another activation, another number of heads, or another base of RoPE makes
    another model.

    Args:
        source: The folder.
        base: The language model.
        metadata: Of the filter that was baked.

    Raises:
        EmbedFilterError: If a config cannot be read, or has other blocks than the metadata say.
    """
    config = base.config()
    found, expected = source.config().to_dict(), config.to_dict()
    if metadata.depth is not None:
        expected |= config_changes(text_config(config), metadata.depth.layers)
    for key in sorted(set(found) | set(expected)):
        mine, theirs = found.get(key), expected.get(key)
        if key not in _EXPORTED and mine != theirs:
            told = f"config.json: {key} is {mine!r:.60}, that of the language model {theirs!r:.60}"
            return False, shown(told)
    return True, "that of the language model"


def check_tokenizer(source: Source, base: Source, metadata: FilterMetadata) -> tuple[bool, str]:
    """The tokenizer must be that of the language model, but for a prompt that it puts around texts.

    Raises:
        FormatError: If one of the two cannot be loaded.
    """
    parts = []
    for one in (source, base):
        with reading(f"the tokenizer of {one.name}", FormatError):
            loaded = AutoTokenizer.from_pretrained(one.name, **one.for_transformers())
            content = json.loads(loaded.backend_tokenizer.to_str())
        left_out = ("padding", "truncation") + (
            ("post_processor",) if metadata.prompt is not None else ()
        )
        parts.append({key: value for key, value in content.items() if key not in left_out})
    differ = [key for key in parts[0] if parts[0][key] != parts[1].get(key)]
    if differ:
        return False, f"its {differ[0]} is not that of the language model"
    return True, "that of the language model" + (
        "" if metadata.prompt is None else ", and a prompt"
    )


def check_gains(source: Source) -> tuple[bool, str]:
    """The gains of the norms must be one: they are folded into the matrices.

    Raises:
        UnembeddingError: If the stream of the model cannot be followed.
    """
    config = source.config()
    residual = residual_of(config)
    model, checkpoint = meta_model(config), open_checkpoint(source.files)
    for name in sorted(residual.gains):
        stored = checkpoint.tensor(stored_name(model, checkpoint, name))
        values = stored.read_rows(0, stored.shape[0]).to(torch.float64) + residual.offset
        if not bool((values == 1).all()):
            return False, f"{shown(name)} is no gain of one"
    return True, f"one, in {len(residual.gains)} norms"


def check_gram(unembedding: Unembedding, metadata: FilterMetadata) -> tuple[bool, str]:
    """Whether the rotated head has the singular directions as its columns, in nested order.

    A stored number has a relative error of at most u, on average u / sqrt(3); the Gram matrix gets
    the sum of their products.

    Args:
        unembedding: W', (V, d), of the folder itself.
        metadata: Of the filter that was baked.
    """
    d = unembedding.d
    if unembedding.stored.dtype not in layout.FLOATS:
        return False, f"the head is stored as {unembedding.stored.dtype}, which no export writes"
    gram = torch.zeros(d, d, dtype=torch.float64)
    powers = torch.zeros_like(gram)
    for block in unembedding.blocks():
        wide = block.to(torch.float64)
        gram += wide.T @ wide
        powers += wide.square().T @ wide.square()
    # Narrow types are rotated in float32, whose sums round as well.
    unit = torch.finfo(unembedding.stored.dtype).eps / 2 + FLOAT32 * (
        d**0.5 if unembedding.stored.dtype.itemsize < 4 else 1
    )
    squares = gram.diagonal()
    error = _LARGEST * unit * powers.sqrt() + d * 2.0**-53 * squares.max()
    outside = gram.abs() - error
    outside.diagonal().zero_()
    if float(outside.max()) > 0:
        worst = float((outside / squares.max()).max())
        return False, f"columns of the head are no singular directions: mixed by {worst:.1e}"
    descending = torch.empty_like(squares)
    order = rotation_order(metadata.band, d)
    descending[order] = squares
    slack = torch.empty_like(squares)
    slack[order] = error.diagonal()
    rises = descending[1:] - descending[:-1] - slack[1:] - slack[:-1]
    if float(rises.max()) > 0:
        place = int(rises.argmax())
        return False, f"singular values {place} and {place + 1} stand in another order"
    return True, f"{d} columns are singular directions in nested order"


def check_weights(
    source: Source, base: Source, spectrum: Spectrum, metadata: FilterMetadata
) -> tuple[bool, str]:
    """Every tensor against that of the language model, rotated anew.

    Args:
        source: The folder.
        base: The language model.
        spectrum: Of its W_U diag(g), in float64.
        metadata: Of the filter that was baked.

    Raises:
        UnembeddingError: If a tensor is missing.
    """
    config = source.config()
    model, checkpoint = meta_model(config), open_checkpoint(source.files)
    rotation = rotation_of(spectrum, metadata.band)
    order = rotation_order(metadata.band, spectrum.d)
    exact = replace(spectrum, energy=None)  # as the export computes it
    turns = turn_bounds(exact, order).norm(dim=1)
    dtypes = {name: checkpoint.tensor(name).dtype for name in model.state_dict()}
    for name, dtype in dtypes.items():
        if dtype not in layout.FLOATS:
            return False, f"{shown(name)} is stored as {dtype}, which no export writes"
    count = 0
    for job in baked_tensors(base, config, residual_of(config), rotation, dtypes):
        stored = checkpoint.tensor(stored_name(model, checkpoint, job.name))
        found = stored.read_rows(0, stored.shape[0])
        if len(job.shape) == 1:
            found = found[:, 0]
        if tuple(found.shape) != job.shape:
            return False, f"{shown(job.name)} has shape {tuple(found.shape)}, not {job.shape}"
        worst = _excess(job, found, turns)
        if worst > 0:
            return False, f"{shown(job.name)} is not that of the language model, by {worst:.1e}"
        count += 1
    return True, f"{count} tensors, each that of the language model after the rotation"


def _excess(job: Job, found: Tensor, turns: Tensor) -> float:
    """How far a tensor is beyond what rounding explains; 0 if it is not, inf for no numbers."""
    worst, first = 0.0, 0
    narrow = job.dtype.itemsize < 4
    sums = FLOAT32 * len(turns) ** 0.5 if narrow else 2.0**-53 * len(turns)
    wide = found.to(torch.float64)
    columns = wide.norm(dim=0)
    for block in job.rows:
        expected = block.to(torch.float64)
        if expected.ndim != wide.ndim:  # a vector as one column
            expected = expected.reshape(-1)
        part = wide[first : first + len(expected)]
        if not bool(torch.isfinite(part).all()):
            return float("inf")
        allowed = torch.finfo(job.dtype).eps * expected.abs() + torch.finfo(job.dtype).tiny
        if job.axis == 1:
            allowed = allowed + part.norm(dim=1, keepdim=True) * (turns + 4 * sums)
        elif job.axis == 0:
            rows = turns[first : first + len(expected)] + 4 * sums
            allowed = allowed + (rows[:, None] * columns if part.ndim > 1 else rows * columns)
        worst = max(worst, float(((part - expected).abs() - allowed).max()))
        first += len(expected)
    return worst
