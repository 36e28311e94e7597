"""Calibration: centre and whiten the filtered embedding with the moments of some texts.

Beyond the paper. The filter picks directions by the unembedding matrix alone; inside the kept
window the embeddings of a language model still lie in a narrow cone. An affine map estimated from a
few texts, whoever wrote them, makes them spread evenly:

    z = S^(-a/2) (y - a m)

with the mean m and the shrunk covariance S of the filtered embeddings y, and the strength a: 0 is
the filter alone, 1 full whitening. The root is the symmetric one, which stays nearest to the filter
and keeps each output at its singular direction, so that prefixes remain useful.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from st_embfilter.errors import CalibrationError

#: Variances are raised to at least the largest one divided by this, so that the map's condition
#: number is at most 100 at full strength.
MAX_CONDITION: Final = 1e4

#: Fewer texts than this say nothing about a covariance.
MIN_TEXTS: Final = 16

#: Strength of whitening unless asked otherwise: the one that loses nothing on any model, recipe and
#: task of docs/calibration.md, in every window but the full one.
DEFAULT_STRENGTH: Final = 0.25


#: Where the texts of a calibration are from.
Source = Literal["self", "generic", "texts"]


@dataclass(frozen=True)
class Calibration:
    """How a filter was calibrated.

    Attributes:
        source: "self" for texts sampled from the language model, "generic" for those that come with
            the package, "texts" for given ones.
        texts: Number of different texts used.
        sha256: Hash of the texts, see `texts_hash`.
        strength: Strength of whitening in [0, 1]; 0 is the filter alone, 1 full whitening.
        shrinkage: Weight in [0, 1] of the identity in the covariance, chosen by Ledoit and Wolf's
            formula.
        seed: Seed of the sampling; None for other texts.
    """

    source: Source
    texts: int
    sha256: str
    strength: float
    shrinkage: float
    seed: int | None = None


@dataclass(frozen=True)
class Moments:
    """First two moments of filtered embeddings.

    Attributes:
        mean: (k,) float64.
        covariance: (k, k) float64, shrunk towards a multiple of the identity.
        shrinkage: Weight of that multiple, in [0, 1].
    """

    mean: Tensor
    covariance: Tensor
    shrinkage: float


def check_strength(strength: float) -> float:
    """A strength of whitening as a float.

    Raises:
        CalibrationError: If it is outside [0, 1].
    """
    if isinstance(strength, bool) or not 0.0 <= float(strength) <= 1.0:
        raise CalibrationError(f"calibration strength must be in [0, 1], got {strength!r}")
    return float(strength)


def different_texts(texts: Iterable[str]) -> list[str]:
    """The non-empty texts in order, each once.

    Raises:
        CalibrationError: If fewer than `MIN_TEXTS` remain.
    """
    if isinstance(texts, str):
        raise CalibrationError(
            "calibration takes a sequence of texts, got a single string; give a list"
        )
    kept = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(kept) < MIN_TEXTS:
        raise CalibrationError(
            f"calibration needs at least {MIN_TEXTS} different texts, got {len(kept)}; give more, "
            "hundreds are better"
        )
    return kept


def texts_hash(texts: Iterable[str]) -> str:
    """SHA-256 over the texts in UTF-8, each ended by a zero byte."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def moments(embeddings: Tensor) -> Moments:
    """Mean and shrunk covariance of embeddings.

    Shrinkage (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance
    matrices") keeps it stable with fewer texts than dimensions.

    Args:
        embeddings: (n, k), n >= 2.

    Raises:
        CalibrationError: If they are not finite, or all the same.
    """
    from sklearn.covariance import ledoit_wolf

    vectors = embeddings.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(vectors).all()):
        raise CalibrationError(
            "embeddings of the calibration texts must be finite, got NaN or Inf; load the model in "
            "bfloat16 or float32"
        )
    if bool((vectors == vectors[0]).all()):
        raise CalibrationError(
            f"embeddings of the calibration texts must differ, got {len(vectors)} times the same "
            "vector; check the pooling and the texts"
        )
    covariance, shrinkage = ledoit_wolf(vectors.numpy())
    return Moments(vectors.mean(dim=0), torch.from_numpy(covariance), float(shrinkage))


def affine_map(estimate: Moments, strength: float) -> tuple[Tensor, Tensor]:
    """The map z = A y + b that centres and whitens with the given strength a.

    A = S^(-a/2) is symmetric, b = -a A m; at a = 0 it is the identity.

    Args:
        estimate: Moments of the k filtered dimensions.
        strength: The strength a, in [0, 1].

    Returns:
        A (k, k) and b (k,), float64.
    """
    strength = check_strength(strength)
    variances, axes = torch.linalg.eigh(estimate.covariance)
    variances = variances.clamp(min=float(variances[-1]) / MAX_CONDITION)
    matrix = (axes * variances.pow(-strength / 2)) @ axes.T
    return matrix, -strength * (matrix @ estimate.mean)
