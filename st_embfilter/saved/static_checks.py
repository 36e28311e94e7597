"""What `verify` compares of a static model: its table against the language model it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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
        base: The language model, a folder or a repository.
        metadata: Of the static model.

    Returns:
        (V, d) float32, times the weights of tokens.

    Raises:
        EmbedFilterError: If the model cannot be loaded.
    """
    backbone, _ = load_cut(
        base, 0, lambda one: load_backbone(one, max_seq_length=None, dtype=torch.float32)
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


@dataclass(frozen=True)
class StaticTable:
    """A static model's table beside what it was made of.

    A direction has the sign of the first entry of nearly its largest magnitude (`signs`). Which
    entry that is can hang on the last bits, and a table does not show the entries: the directions
    whose sign is open are taken as the table has them.

    Attributes:
        table: (V, k), as stored.
        metadata: Of the static model.
        states: (V, d) float32, of the language model.
        spectrum: Of its unembedding matrix.
        gain: g, (d,), of a folded norm.
    """

    table: Tensor
    metadata: FilterMetadata
    states: Tensor
    spectrum: Spectrum
    gain: Tensor | None = None

    @cached_property
    def indices(self) -> Tensor:
        """(k,) of the directions that are kept."""
        return torch.as_tensor(self.metadata.band.indices(self.spectrum.d))

    @cached_property
    def turns(self) -> Tensor:
        """(k, d), how far another computation may turn each of them."""
        return turn_bounds(self.spectrum, self.indices)

    @cached_property
    def coordinates(self) -> Tensor:
        """The states along every direction, (V, d) float64."""
        states = self.states.to(torch.float64)
        if self.gain is not None:
            states = states / self.gain
        return states @ self.spectrum.directions.to(torch.float64).T

    @cached_property
    def signs(self) -> Tensor:
        """(k,) of 1 and -1: how the table has the directions."""
        either = _sign_is_open(self.spectrum.directions[self.indices], self.turns)
        if not bool(either.any()):
            return torch.ones(len(either), dtype=torch.float64)
        kept, stored = self.coordinates[:, self.indices], self.table.to(torch.float64)
        if self.metadata.calibration is None:
            agreement = (kept * stored).sum(0)
        else:  # the polar factor of a positive map of turned directions turns them
            left, _, right = torch.linalg.svd(_map_between(kept, stored))
            agreement = (left @ right).diagonal()
        return torch.where(either & (agreement < 0), -1.0, 1.0).to(torch.float64)

    @property
    def kept(self) -> Tensor:
        """The states along the directions that are kept, (V, k) float64."""
        return self.coordinates[:, self.indices] * self.signs

    @property
    def rows(self) -> Tensor:
        """(k, d) float32, the filter that takes a state to its row."""
        directions = self.spectrum.projection(self.metadata.band) * self.signs[:, None].float()
        return directions if self.gain is None else directions / self.gain


def _sign_is_open(directions: Tensor, turns: Tensor) -> Tensor:
    """Whether entries of both signs may decide the sign of a direction, (k,).

    Args:
        directions: (k, d), each of unit length.
        turns: (k, d), how far another computation may turn each of them, towards every other.
    """
    magnitude = directions.to(torch.float64).abs()
    largest = magnitude.amax(dim=1, keepdim=True)
    error = 2 * turns.norm(dim=1, keepdim=True) / largest
    surely = magnitude >= largest * (NEARLY + error)
    before = surely.cumsum(dim=1) - surely.long() == 0  # up to the first that surely is one
    may_decide = before & (magnitude >= largest * (NEARLY - error))
    up, down = may_decide & (directions > 0), may_decide & (directions < 0)
    either: Tensor = up.any(dim=1) & down.any(dim=1)
    return either


def _map_between(kept: Tensor, stored: Tensor) -> Tensor:
    """The linear part of the affine map that takes rows (V, k) to others, (k, k), fitted."""
    fitted: Tensor = torch.linalg.lstsq(kept - kept.mean(0), stored - stored.mean(0)).solution.T
    return fitted


def check_table_rows(held: StaticTable) -> tuple[bool, str]:
    """Every row of the table against the normed embedding of its token, filtered.

    The table of a calibrated filter must be one symmetric positive affine map of the window's
    directions, which is fitted to its rows. Directions that no computation tells apart well may be
    turned, but in all rows alike: what one map does not explain must be rounding.
    """
    table, metadata, turns = held.table, held.metadata, held.turns
    coordinates, kept = held.coordinates, held.kept
    stored = table.to(torch.float64)
    if table.dtype is torch.float16 and float(table.abs().max()) > 1:
        return False, "entries above 1 in float16, so sums of long texts overflow"
    matrix = scale_of(table, kept) * torch.eye(metadata.k, dtype=torch.float64)
    bias = torch.zeros(metadata.k, dtype=torch.float64)
    if metadata.calibration is not None:
        matrix = _map_between(kept, stored)
        bias = stored.mean(0) - matrix @ kept.mean(0)
        skew = float((matrix - matrix.T).abs().max() / matrix.abs().max())
        lowest = float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
        if lowest <= 0 or skew > _rounding(table.dtype) + float(turns[:, held.indices].max()):
            return False, f"no calibration: asymmetric by {skew:.1e}, lowest value {lowest:.1e}"
    unit, lengths = _rounding(table.dtype), matrix.norm(dim=1)

    def rounding(rows: Tensor) -> Tensor:
        """Of stored numbers, and of the float32 sums of norm and product, which grow with d."""
        sums = coordinates[rows].norm(dim=1, keepdim=True) * lengths + bias.abs()
        sums *= 4 * FLOAT32 * held.spectrum.d**0.5
        found: Tensor = sums + unit * (
            stored[rows].abs() + torch.finfo(table.dtype).smallest_normal
        )
        return found

    reach = (matrix.abs() @ turns).T
    far = _Worst()
    for rows in torch.arange(len(stored)).split(_BLOCK):
        gap = (stored[rows] - kept[rows] @ matrix.T - bias).abs()
        far.see(rows, gap - rounding(rows) - coordinates[rows].abs() @ reach)
    _see_one_map(far, coordinates, stored, rounding, lengths)
    if far.excess > 0:
        told = f"the row of token {far.row} is not that of the language model"
        return False, f"{told}, by {far.excess:.1e}"
    return True, f"{len(stored):,} rows, each its token's" + (
        "" if metadata.calibration is None else ", by a symmetric positive map"
    )


class _Worst:
    """The row that is farthest beyond what is allowed."""

    def __init__(self) -> None:
        self.excess, self.row = -1.0, 0

    def see(self, rows: Tensor, beyond: Tensor) -> None:
        """Looks at what numbers (n, k) of rows (n,) are beyond what is allowed."""
        largest = beyond.amax(dim=1)
        if float(largest.max()) > self.excess:
            self.excess, self.row = float(largest.max()), int(rows[largest.argmax()])


def _see_one_map(
    far: _Worst,
    coordinates: Tensor,
    stored: Tensor,
    rounding: Callable[[Tensor], Tensor],
    lengths: Tensor,
) -> None:
    """Looks for rows that are off the one affine map that fits all of them best.

    Of rows T = C M + N with |N| <= r, least squares leave (1 - H) N, which is at most
    r + sqrt(h) |r|, h the leverage of a row. Of directions that no row reaches M stays unknown.

    Args:
        far: Where the worst row is kept.
        coordinates: C, (V, d).
        stored: T, (V, k).
        rounding: r of rows (n,), (n, k).
        lengths: (k,), of the columns of M.
    """
    centre, middle = coordinates.mean(0), stored.mean(0)
    d, k = len(centre), len(middle)
    gram, cross = coordinates.new_zeros(d, d), coordinates.new_zeros(d, k)
    squares = coordinates.new_zeros(k)
    blocks = torch.arange(len(stored)).split(_BLOCK)
    for rows in blocks:
        part = coordinates[rows] - centre
        gram += part.T @ part
        cross += part.T @ (stored[rows] - middle)
        squares += rounding(rows).square().sum(0)
    inverse = torch.linalg.pinv(gram, hermitian=True)
    fitted, reached = inverse @ cross, inverse @ gram
    for rows in blocks:
        part = coordinates[rows] - centre
        leverage = (part @ inverse * part).sum(1, keepdim=True).clamp(min=0) + 1 / len(stored)
        unreached = (part - part @ reached).norm(dim=1, keepdim=True)
        gap = (stored[rows] - middle - part @ fitted).abs()
        allowed = rounding(rows) + leverage.sqrt() * squares.sqrt() + unreached * lengths
        far.see(rows, gap - allowed)


def _rounding(dtype: torch.dtype) -> float:
    """Largest relative error of a number that is stored in this dtype."""
    return float(torch.finfo(dtype).eps)
