"""How unevenly embeddings fill their space: pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from st_embfilter.errors import ShapeError


@dataclass(frozen=True)
class Anisotropy:
    """Measures of one sample of embeddings.

    Attributes:
        mean_cosine: Mean cosine of two different embeddings, over all pairs, in [-1, 1]; 0 for
            directions spread evenly.
        participation_ratio: Number of dimensions in use, in [1, d]: (sum l)^2 / sum l^2 over the
            eigenvalues l of the covariance matrix. At most n - 1 for n embeddings.
        isoscore: IsoScore in [0, 1] (Rudman et al. 2022, arXiv 2108.07344): 0 if one dimension
            is in use, 1 if all d are, evenly. Comparable between widths.
    """

    mean_cosine: float
    participation_ratio: float
    isoscore: float


def anisotropy(embeddings: Tensor) -> Anisotropy:
    """Measures a sample of embeddings; exact, no pairs are drawn.

    The defect of IsoScore is a function of the participation ratio r alone: working its definition
    through gives (r - 1) / (d - 1).

    Args:
        embeddings: (n, d), n >= 2, d >= 2, as they are compared: filtered or not, any length.

    Raises:
        ShapeError: If there are too few, or all are the same.
    """
    if embeddings.ndim != 2 or min(embeddings.shape) < 2:
        raise ShapeError(
            f"anisotropy needs at least 2 embeddings of at least 2 dimensions, got shape "
            f"{tuple(embeddings.shape)}"
        )
    x = embeddings.detach().to("cpu", torch.float64)
    n, d = x.shape
    unit = torch.nn.functional.normalize(x, dim=1)
    # The squared length of the sum is the sum over all pairs, each embedding with itself included.
    cosine = (unit.sum(dim=0).square().sum() - unit.square().sum()) / (n * (n - 1))
    centred = x - x.mean(dim=0)
    gram = centred.T @ centred if d <= n else centred @ centred.T
    spread = gram.square().sum()
    if not float(spread) > 0:
        raise ShapeError(f"anisotropy needs embeddings that differ, got {n} times the same")
    ratio = float(gram.trace().square() / spread)
    return Anisotropy(float(cosine), ratio, (ratio - 1) / (d - 1))
