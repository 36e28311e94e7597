"""Filters and what they are compared with: affine maps of raw vectors.

Sources: the bands and the ablation are of arXiv 2606.07502; all-but-the-top is Mu and Viswanath
(2018); whitening with a cut is Su et al. (2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_embfilter.errors import BandError, DataError
from st_embfilter.evaluation.vectors import Vectors
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.spectrum.band import FAMILIES, Band
from st_embfilter.spectrum.spectrum import Spectrum

#: What each method other than a band does to the raw vectors.
METHODS: Final[dict[str, str]] = {
    "raw": "nothing",
    "truncate": "keeps the first coordinates",
    "centre": "subtracts the mean of sample texts",
    "all-but-the-top": "subtracts the mean and removes the d/100 strongest principal components",
    "pca": "keeps the strongest principal components of sample texts",
    "whiten": "keeps them and gives them equal variance",
    "calibrated": "what the calibrated filter of a saved model does",
}

#: Methods that are fitted on texts, which EmbedFilter is not.
FITTED: Final = frozenset({"centre", "all-but-the-top", "pca", "whiten"})

#: Methods whose result is as wide as the raw vectors.
FULL_WIDTH: Final = frozenset({"raw", "centre", "all-but-the-top"})

RATIOS: Final = (1 / 2, 1 / 4, 1 / 8)

#: Before the name of a band: its directions are those of W_U diag(g), as in `norm="folded"`.
FOLDED: Final = "folded"


@dataclass(frozen=True)
class Transform:
    """x -> (x - mean) matrix^T + bias in float32, then unit length if asked for.

    Attributes:
        matrix: (k, d) float32, or None for the identity.
        mean: (d,) float32, or None for zero.
        normalize: Scale the result to unit length.
        bias: (k,) float32, or None for zero.
    """

    matrix: Tensor | None = None
    mean: Tensor | None = None
    normalize: bool = False
    bias: Tensor | None = None

    def __call__(self, vectors: Vectors) -> Vectors:
        """Maps (n, d) to (n, k)."""
        x = torch.from_numpy(vectors)
        if self.mean is not None:
            x = x - self.mean
        if self.matrix is not None:
            x = torch.nn.functional.linear(x, self.matrix, self.bias)
        if self.normalize:
            x = torch.nn.functional.normalize(x, dim=1)
        result: Vectors = x.numpy()
        return result


class Folded(NamedTuple):
    """What bands of a folded norm are made of.

    Attributes:
        spectrum: Spectrum of W_U diag(g).
        gain: g, (d,) float64, of the norm before W_U.
    """

    spectrum: Spectrum
    gain: Tensor


@dataclass(frozen=True)
class Configuration:
    """One row of a sweep.

    Attributes:
        name: A method of `METHODS`, or a band such as "bulk", "offset:128"; "random" stands for
            the mean over `seeds`, "random:7" for one seed. "folded", "folded:offset:128" are bands
            of a folded norm.
        keep: Ratio of dimensions kept in (0, 1], or their number; None for methods of full width.
        seeds: Seeds of "random".
        order: Order of directions of "optimal", see `Band`; measured on a corpus.

    Raises:
        BandError: For an unknown name, or `keep` out of range.
    """

    name: str
    keep: float | int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        family = self._band.partition(":")[0]
        if self.name not in METHODS and family not in FAMILIES:
            raise BandError(
                f"a configuration must be one of {', '.join([*METHODS, *FAMILIES])}, got "
                f"{self.name!r}"
            )
        if (self.keep is None) != (self.name in FULL_WIDTH):
            raise BandError(
                f"keep= belongs to the methods that reduce the width, got {self.keep!r} for "
                f"{self.name!r}"
            )
        if self.keep is not None:
            self.bands()  # checks keep, and the name of a band

    @property
    def folded(self) -> bool:
        """Whether it is a band of W_U diag(g)."""
        return self.name.partition(":")[0] == FOLDED

    @property
    def _band(self) -> str:
        return self.name.partition(":")[2] or "bulk" if self.folded else self.name

    @property
    def needs_data(self) -> bool:
        """Whether it was fitted on texts."""
        return self.name in FITTED or self.name == "calibrated" or self.order is not None

    def bands(self) -> list[Band]:
        """The bands to average over; for other methods one that stands for the width."""
        keep = 1.0 if self.keep is None else self.keep
        if self.name in METHODS:
            return [Band("dominant", keep)]
        if self.order is not None:
            return [Band(self.name, keep, order=self.order)]
        if self._band == "random":
            return [Band("random", keep, seed=seed) for seed in self.seeds]
        return [Band.parse(self._band, keep)]

    def dims(self, d: int) -> int:
        """Width of the result for raw vectors of width d."""
        return self.bands()[0].width(d)

    def start(self, d: int) -> int | None:
        """First kept singular direction of a contiguous band, None for everything else."""
        return None if self.name in METHODS else self.bands()[0].start(d)

    def transforms(
        self,
        spectrum: Spectrum,
        sample: Vectors | None = None,
        *,
        normalize: bool = False,
        layer: EmbedFilterLayer | None = None,
        folded: Folded | None = None,
    ) -> list[Transform]:
        """Its maps; several for a mean over seeds.

        Args:
            spectrum: Spectrum of the model's unembedding matrix.
            sample: (n, d) raw vectors for the methods that are fitted.
            normalize: Scale results to unit length.
            layer: The saved model's filter, for "calibrated".
            folded: Spectrum and gain for bands of a folded norm.

        Raises:
            BandError: If it does not fit into the width, or there is no such filter or spectrum.
            DataError: If there is no sample, or too small a one.
        """
        d = spectrum.d
        k = self.dims(d)
        if self.name == "raw":
            return [Transform(normalize=normalize)]
        if self.name == "truncate":
            return [Transform(torch.eye(d)[:k].contiguous(), None, normalize)]
        if self.name == "calibrated":
            if layer is None or k > layer.out_features:
                raise BandError(
                    f"'calibrated' at {k} dimensions must be a calibrated model's folder at least "
                    f"as wide, got {'none' if layer is None else layer.out_features}"
                )
            bias = layer.linear.bias
            return [
                Transform(
                    layer.projection[:k].cpu(),
                    None,
                    normalize,
                    None if bias is None else bias[:k].cpu(),
                )
            ]
        if self.name in FITTED:
            return [_fitted(self.name, k, sample, normalize)]
        gain: Tensor | None = None
        if self.folded:
            if folded is None:
                raise BandError(
                    f"{self.name!r} needs the spectrum of a folded norm, got none; open the model "
                    "with folded=True"
                )
            spectrum, gain = folded
        rows = [spectrum.projection(band) for band in self.bands()]
        if gain is not None:  # the directions are those of h / g
            rows = [(row / gain).to(torch.float32) for row in rows]
        return [Transform(row, None, normalize) for row in rows]


def grid(
    names: Iterable[str], keeps: Sequence[float | int] = RATIOS, seeds: tuple[int, ...] = (0, 1, 2)
) -> list[Configuration]:
    """Every name at every width; names of full width once."""
    configurations = []
    for name in names:
        for keep in (None,) if name in FULL_WIDTH else keeps:
            configurations.append(Configuration(name, keep, seeds))
    return configurations


def baseline_names() -> list[str]:
    """Everything a filter should be compared with, and the paper's ablation."""
    ablation = ["dominant", "secondary", "edges", "random"]
    return ["truncate", *ablation, *(method for method in METHODS if method in FITTED)]


def _fitted(name: str, k: int, sample: Vectors | None, normalize: bool) -> Transform:
    needed = 2 if name == "centre" else k + 1
    if sample is None or len(sample) < needed:
        raise DataError(
            f"{name} to {k} dimensions must be fitted on at least {needed} texts, got "
            f"{0 if sample is None else len(sample)}; give more texts to fit on"
        )
    rows = torch.from_numpy(np.asarray(sample, dtype=np.float64))
    mean = rows.mean(dim=0)
    if name == "centre":
        return Transform(None, mean.float(), normalize)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(rows) - 1))
    values, vectors = values.flip(0), vectors.flip(1).T
    if name == "all-but-the-top":
        top = vectors[: max(1, round(rows.shape[1] / 100))]
        matrix = torch.eye(rows.shape[1], dtype=torch.float64) - top.T @ top
    else:
        matrix = vectors[:k]
        if name == "whiten":
            # Directions without variance stay as short as they are instead of exploding.
            floor = values[0] * torch.finfo(torch.float32).eps
            matrix = matrix / values[:k].clamp(min=float(floor)).sqrt()[:, None]
    return Transform(matrix.float().contiguous(), mean.float(), normalize)
