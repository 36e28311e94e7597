"""What `verify` compares of a static model: its table against the language model it was made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.tensors import SAFETENSORS_FILE
from st_embfilter.model.backbone import load_backbone
from st_embfilter.model.cut import load_cut
from st_embfilter.model.gguf_backbone import readable
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.static import scale_of, token_embeddings
from st_embfilter.saved import layout
from st_embfilter.saved.checks import FLOAT32, turn_bounds
from st_embfilter.saved.file_checks import document
from st_embfilter.saved.layout import STATIC_FOLDER
from st_embfilter.saved.static import static_modules
from st_embfilter.spectrum.gram import NEARLY
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.text import read_json, reading, shown
from st_embfilter.unembedding.source import Source

#: Rows of the table that are compared at a time.
_BLOCK: Final = 4096

TABLE_FILE: Final = f"{STATIC_FOLDER}/{SAFETENSORS_FILE}"
TOKENIZER_FILE: Final = f"{STATIC_FOLDER}/tokenizer.json"


def check_static_modules(files: ModelFiles, metadata: FilterMetadata) -> tuple[bool, str]:
    """The pipeline must be one that `save_pretrained` writes, which has no prompt.

    Raises:
        FormatError: If `modules.json` is missing or no JSON.
    """
    path = files.path(MODULES_FILE)
    if path is None:
        raise FormatError(f"a saved model must hold {MODULES_FILE}, got none")
    modules = read_json(path.read_bytes(), MODULES_FILE, FormatError, list)
    if modules not in (static_modules(normalize=False), static_modules(normalize=True)):
        return False, f"{MODULES_FILE} must hold StaticEmbedding [> Normalize], got another one"
    if metadata.prompt is not None:
        return False, "embfilter.json names a prompt, which no static model has"
    prompt = layout.check_model_config(document(files, layout.MODEL_CONFIG))
    with_prompt = f"; {shown(repr(prompt))} goes before every text" if prompt else ""
    return True, f"as save_pretrained writes them{with_prompt}"


def states_of(base: Source, metadata: FilterMetadata) -> tuple[Tensor, Tokenizer]:
    """The normed token embeddings of a language model, and the tokenizer of its static model.

    Args:
        base: The language model; a GGUF file is dequantised.
        metadata: Of the static model.

    Returns:
        (V, d) float32, times the weights of tokens.

    Raises:
        EmbedFilterError: If the model cannot be loaded.
    """
    source, _ = readable(base, None, show_progress_bar=False)
    backbone, _ = load_cut(
        source, 0, lambda one: load_backbone(one, max_seq_length=None, dtype=torch.float32)
    )
    weights = None if metadata.depth is None else metadata.depth.token_weights
    module: Any = token_embeddings(backbone, weights)
    return module.embedding.weight.detach(), module.tokenizer


def check_tokenizer(path: Path | None, tokenizer: Tokenizer) -> tuple[bool, str]:
    """The stored tokenizer must be that of the language model, without special tokens.

    Raises:
        FormatError: If it is missing or cannot be read.
    """
    if path is None:
        raise FormatError(f"a static model must hold {TOKENIZER_FILE}, got none")
    with reading(TOKENIZER_FILE, FormatError):
        stored = json.loads(Tokenizer.from_file(str(path)).to_str())
    same = stored == json.loads(tokenizer.to_str())
    return same, "that of the language model" if same else "not that of the language model"


def facing(
    table: Tensor,
    metadata: FilterMetadata,
    states: Tensor,
    spectrum: Spectrum,
    gain: Tensor | None = None,
) -> Spectrum:
    """The spectrum, with the directions whose sign is open turned as the table has them.

    A direction has the sign of the first entry of nearly its largest magnitude (`signs`). Which
    entry that is can hang on the last bits, and a table does not show the entries.

    Args:
        table: (V, k), as stored.
        metadata: Of the static model.
        states: (V, d) float32, of the language model.
        spectrum: Of its unembedding matrix.
        gain: g, (d,), of a folded norm.
    """
    indices = torch.as_tensor(metadata.band.indices(spectrum.d))
    directions = spectrum.directions[indices].to(torch.float64)
    turns = turn_bounds(spectrum, indices).norm(dim=1, keepdim=True)
    either = _sign_is_open(directions, turns)
    if not bool(either.any()):
        return spectrum
    kept = _coordinates(states, spectrum, gain)[:, indices]
    stored = table.to(torch.float64)
    if metadata.calibration is None:
        agreement = (kept * stored).sum(0)
    else:  # the polar factor of a positive map of turned directions turns them
        left, _, right = torch.linalg.svd(_map_between(kept, stored))
        agreement = (left @ right).diagonal()
    turned = indices[either & (agreement < 0)]
    directions = spectrum.directions.clone()
    directions[turned] *= -1
    return replace(spectrum, directions=directions)


def _sign_is_open(directions: Tensor, turns: Tensor) -> Tensor:
    """Whether entries of both signs may decide the sign of a direction, (k,).

    Args:
        directions: (k, d), each of unit length.
        turns: (k, 1), how far another computation may turn each of them.
    """
    magnitude = directions.abs()
    largest = magnitude.amax(dim=1, keepdim=True)
    error = 2 * turns / largest
    surely = magnitude >= largest * (NEARLY + error)
    before = surely.cumsum(dim=1) - surely.long() == 0  # up to the first that surely is one
    may_decide = before & (magnitude >= largest * (NEARLY - error))
    up, down = may_decide & (directions > 0), may_decide & (directions < 0)
    return up.any(dim=1) & down.any(dim=1)


def _coordinates(states: Tensor, spectrum: Spectrum, gain: Tensor | None) -> Tensor:
    """The states along every direction, (V, d) float64."""
    wide = states.to(torch.float64)
    return (wide if gain is None else wide / gain) @ spectrum.directions.to(torch.float64).T


def _map_between(kept: Tensor, stored: Tensor) -> Tensor:
    """The linear part of the affine map that takes rows (V, k) to others, (k, k), fitted."""
    fitted: Tensor = torch.linalg.lstsq(kept - kept.mean(0), stored - stored.mean(0)).solution.T
    return fitted


def check_table_rows(
    table: Tensor,
    metadata: FilterMetadata,
    states: Tensor,
    spectrum: Spectrum,
    gain: Tensor | None = None,
) -> tuple[bool, str]:
    """Every row of the table against the normed embedding of its token, filtered.

    The table of a calibrated filter must be one symmetric positive affine map of the window's
    directions, which is fitted to its rows.

    Args:
        table: (V, k), as stored.
        metadata: Of the static model.
        states: (V, d) float32, of the language model.
        spectrum: Of its unembedding matrix.
        gain: g, (d,), of a folded norm.
    """
    indices = torch.as_tensor(metadata.band.indices(spectrum.d))
    coordinates = _coordinates(states, spectrum, gain)
    kept = coordinates[:, indices]
    stored = table.to(torch.float64)
    turns = turn_bounds(spectrum, indices)
    if table.dtype is torch.float16 and float(table.abs().max()) > 1:
        return False, "entries above 1 in float16, so sums of long texts overflow"
    matrix = scale_of(table, kept) * torch.eye(metadata.k, dtype=torch.float64)
    bias = torch.zeros(metadata.k, dtype=torch.float64)
    if metadata.calibration is not None:
        matrix = _map_between(kept, stored)
        bias = stored.mean(0) - matrix @ kept.mean(0)
        skew = float((matrix - matrix.T).abs().max() / matrix.abs().max())
        lowest = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
        if lowest <= 0 or skew > _rounding(table.dtype) + float(turns[:, indices].max()):
            return False, f"no calibration: asymmetric by {skew:.1e}, lowest value {lowest:.1e}"
    # Rounding of the stored number; of the float32 sums of norm and product, which grow with d;
    # and directions that no computation tells apart better.
    reach = matrix.abs()
    unit = _rounding(table.dtype)
    worst, where = -1.0, 0
    for rows in torch.arange(len(stored)).split(_BLOCK):
        gap = (stored[rows] - kept[rows] @ matrix.T - bias).abs()
        lengths = coordinates[rows].norm(dim=1, keepdim=True)
        sums = FLOAT32 * spectrum.d**0.5 * (lengths * matrix.norm(dim=1) + bias.abs())
        allowed = unit * stored[rows].abs() + torch.finfo(table.dtype).smallest_normal * unit
        allowed += 4 * sums + coordinates[rows].abs() @ (reach @ turns).T
        excess = (gap - allowed).max(dim=1).values
        if float(excess.max()) > worst:
            worst, where = float(excess.max()), int(rows[excess.argmax()])
    if worst > 0:
        return False, f"the row of token {where} is not that of the language model, by {worst:.1e}"
    return True, f"{len(stored):,} rows, each its token's" + (
        "" if metadata.calibration is None else ", by a symmetric positive map"
    )


def _rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a number that is stored in this dtype."""
    return float(torch.finfo(dtype).eps)
