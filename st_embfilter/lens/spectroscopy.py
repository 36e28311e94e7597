"""Which singular directions write frequent tokens: the paper's logit spectroscopy.

Source: arXiv 2606.07502, section 3. The average token is the embedding whose logits are the log
frequencies of the tokens; dpi(i) is how much the logits of some tokens shift when direction i is
removed from it. It is large at the ends of the spectrum. W_U is streamed; no V x V matrix and no
pseudo-inverse (d, V) is formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from st_embfilter.errors import ShapeError
from st_embfilter.lens.counts import SMOOTHING, TokenCounts
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.unembedding.matrix import Unembedding


@dataclass(frozen=True)
class Spectroscopy:
    """The shift of each token group's logits by each singular direction.

    Attributes:
        shifts: By name of the group, (d,) float64 >= 0: dpi(i) of the paper. 0.25 is a shift by
            25 % of the group's absolute logits; shifts of different directions may cancel, so they
            add up to 1 or more.
    """

    shifts: Mapping[str, Tensor]

    def edges_and_middle(self, group: str = "frequent") -> dict[str, float]:
        """Mean shift in three parts of the spectrum.

        Returns:
            "largest": the quarter of the directions with the largest singular values, "middle": the
            middle half, "smallest": the other quarter.
        """
        shift = self.shifts[group]
        quarter = shift.shape[0] // 4
        parts = shift.tensor_split([quarter, shift.shape[0] - quarter])
        names = ("largest", "middle", "smallest")
        return {name: float(part.mean()) for name, part in zip(names, parts, strict=True)}


def average_token(
    unembedding: Unembedding, spectrum: Spectrum, log_probabilities: Tensor
) -> Tensor:
    """The embedding of least norm whose logits W_U h are nearest to given ones.

    h = pinv(W_U) log p = V S^-2 V^T (W_U^T log p), in one pass over W_U. The squared singular
    values lose half of the digits, so directions with a singular value below sqrt(d eps) of the
    largest count as null directions, where numpy's `pinv` draws the line at 1e-15.

    Args:
        unembedding: W_U, (V, d).
        spectrum: The matrix's spectrum, in float64.
        log_probabilities: (V,), see `TokenCounts.log_probabilities`.

    Returns:
        (d,) float64.

    Raises:
        ShapeError: If the number of tokens is not V.
    """
    rows = unembedding.stored.shape[0]
    if tuple(log_probabilities.shape) != (rows,):
        raise ShapeError(
            f"log probabilities must be one for each of the {rows} rows of the unembedding matrix, "
            f"got shape {tuple(log_probabilities.shape)}"
        )
    target = log_probabilities.to(torch.float64)
    moment = torch.zeros(spectrum.d, dtype=torch.float64)
    first = 0
    for block in unembedding.folded_blocks():
        moment += target[first : first + block.shape[0]] @ block
        first += block.shape[0]
    squares = spectrum.singular_values.square()
    cutoff = squares[0] * spectrum.d * torch.finfo(torch.float64).eps
    inverse = torch.where(squares > cutoff, squares.reciprocal(), 0.0)
    return (inverse * (spectrum.directions @ moment)) @ spectrum.directions


def spectroscopy(
    unembedding: Unembedding, spectrum: Spectrum, embedding: Tensor, groups: Mapping[str, Tensor]
) -> Spectroscopy:
    """dpi(i) of all d directions for every token group.

    dpi(i) = sum_j |w~_j - w_j| / sum_j |w_j| over the tokens j of a group, where w = W_U h and w~
    are the logits after direction i was removed from h: w_j - w~_j = (W_U v_i)_j (v_i^T h). So all
    directions come from one product of the group's rows with V, in one pass over W_U.

    Args:
        unembedding: W_U, (V, d).
        spectrum: The matrix's spectrum.
        embedding: h, (d,); the average token in the paper.
        groups: Token ids of each group, e.g. `TokenCounts.groups`.

    Raises:
        ShapeError: If the embedding is not (d,), or a token has no row.
    """
    rows, d = unembedding.stored.shape
    if tuple(embedding.shape) != (d,):
        raise ShapeError(f"the embedding must have shape ({d},), got {tuple(embedding.shape)}")
    members = torch.zeros((len(groups), rows), dtype=torch.float64)
    for number, ids in enumerate(groups.values()):
        if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= rows:
            raise ShapeError(
                f"a token group must hold ids from 0 to {rows - 1}, got {ids.tolist()[:5]} ... for "
                f"{list(groups)[number]!r}"
            )
        members[number, ids] = 1.0
    coordinates = spectrum.directions @ embedding.to(torch.float64)
    shifted = torch.zeros((len(groups), d), dtype=torch.float64)
    absolute = torch.zeros((len(groups), 1), dtype=torch.float64)
    first = 0
    for block in unembedding.folded_blocks():
        weights = members[:, first : first + block.shape[0]]
        first += block.shape[0]
        chosen = weights.any(dim=0)
        if not bool(chosen.any()):
            continue
        # (n, d): what each direction adds to each token's logit.
        shares = (block[chosen] @ spectrum.directions.T) * coordinates
        shifted += weights[:, chosen] @ shares.abs()
        absolute += weights[:, chosen] @ shares.sum(dim=1, keepdim=True).abs()
    return Spectroscopy(dict(zip(groups, shifted / absolute, strict=True)))


def optimal_band(shift: Tensor, keep: float | int = 0.5) -> Band:
    """The band that drops the directions of largest shift (the paper's "optimal" strategy).

    Args:
        shift: (d,) dpi of the frequent tokens.
        keep: Ratio or width, as in `Band`.

    Returns:
        A band of family "optimal". Its order of all d directions, by rising shift, is part of it
        and of `embfilter.json`, so the filter is rebuilt from W_U alone, at every width.
    """
    return Band("optimal", keep, order=tuple(shift.argsort(stable=True).tolist()))


def spectroscopy_of_counts(
    unembedding: Unembedding,
    spectrum: Spectrum,
    counts: TokenCounts,
    *,
    smoothing: float = SMOOTHING,
) -> Spectroscopy:
    """The paper's figure: the average token of a corpus, and its three token groups.

    Args:
        unembedding: W_U, (V, d).
        spectrum: The matrix's spectrum, in float64.
        counts: Token counts of the corpus.
        smoothing: Pseudo-count of the average token, see `TokenCounts.log_probabilities`.
    """
    rows = unembedding.stored.shape[0]
    target = counts.log_probabilities(rows, smoothing=smoothing)
    average = average_token(unembedding, spectrum, target)
    # A tokenizer may know more tokens than the model.
    groups = {name: ids[ids < rows] for name, ids in counts.groups().items()}
    return spectroscopy(unembedding, spectrum, average, groups)
