"""Which singular directions a filter keeps: bands, in nested order."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Final, cast

import torch
from torch import Tensor

from st_embfilter.errors import BandError

#: What each family keeps.
FAMILIES: Final[dict[str, str]] = {
    "bulk": "the middle of the spectrum, the paper's symmetric window",
    "offset": "a window from a fixed start, e.g. offset:128 for Mistral",
    "dominant": "the largest singular values",
    "secondary": "the smallest singular values",
    "edges": "both ends of the spectrum",
    "random": "random directions, e.g. random:7 with seed 7",
    "optimal": "the directions that shift frequent tokens least, in a measured order",
}


@dataclass(frozen=True)
class Band:
    """Which singular directions a filter keeps, named by what it keeps.

    `indices` gives them in nested order: the first k' of them are the same family's band of width
    k', so a prefix of the filtered embedding is the stronger filter.

    Attributes:
        family: One of `FAMILIES`.
        keep: Ratio in (0, 1], rounded as in the paper (k = d // tau), or a width as an int >= 1.
        offset: Start of the window, for family "offset" only.
        seed: Seed, for family "random" only (default 0).
        order: All d directions, the ones to keep first, for family "optimal" only; depends on data,
            see `st_embfilter.lens.spectroscopy.optimal_band`.

    Raises:
        BandError: For an unknown family, a `keep` out of range or a parameter of another family.
    """

    family: str = "bulk"
    keep: float | int = 0.5
    offset: int | None = None
    seed: int | None = None
    order: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise BandError(f"band must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        if (self.offset is not None) != (self.family == "offset"):
            raise BandError(
                "offset= belongs to family 'offset' and only there, got "
                f"family {self.family!r} with offset {self.offset!r}; write e.g. band='offset:128'"
            )
        if self.offset is not None and (
            isinstance(self.offset, bool) or not isinstance(self.offset, int) or self.offset < 0
        ):
            raise BandError(f"offset must be an int >= 0, got {self.offset!r}")
        if self.family == "random":
            seed = 0 if self.seed is None else int(self.seed)
            if not 0 <= seed < 2**63:
                raise BandError(f"seed must be in [0, 2**63), got {seed!r:.60}")
            object.__setattr__(self, "seed", seed)
        elif self.seed is not None:
            raise BandError(f"seed= belongs to family 'random', got family {self.family!r}")
        if self.family == "optimal" and self.order is None:
            raise BandError(
                "the band 'optimal' is measured on a model, got its name alone; `st-embfilter lens "
                "MODEL --band optimal` shows it, st_embfilter.lens.optimal_band measures one to "
                "build with"
            )
        if self.family != "optimal" and self.order is not None:
            raise BandError(f"order= belongs to family 'optimal', got family {self.family!r}")
        if self.order is not None:
            object.__setattr__(self, "order", _checked_order(self.order))

    @classmethod
    def parse(cls, band: str | Band, keep: float | int | None = None) -> Band:
        """A band from its name, e.g. "bulk", "offset:128" or "random:7".

        Args:
            band: The name, or a `Band`, which is returned as it is.
            keep: Ratio or width as in the class; None for 0.5, or for what the `Band` brings.

        Raises:
            BandError: For an unknown name, or a `keep` that contradicts the `Band`'s.
        """
        if isinstance(band, Band):
            given = band.keep if keep is None else _checked_keep(keep)
            if (type(given), given) != (type(band.keep), band.keep):  # 1 is not 1.0
                raise BandError(
                    f"a Band brings its own keep ({band.keep!r}), got keep={keep!r} beside it; "
                    "give one of them"
                )
            return band
        keep = 0.5 if keep is None else keep
        family, colon, value = band.partition(":")
        if not colon:
            return cls(family, keep)
        try:
            number = int(value)
        except ValueError:
            number = -1
        if number < 0 or family not in ("offset", "random"):
            raise BandError(
                f"band must look like 'bulk', 'offset:128' or 'random:7', got {band!r:.60}"
            )
        if family == "offset":
            return cls(family, keep, offset=number)
        return cls(family, keep, seed=number)

    def __str__(self) -> str:
        parameter = self.offset if self.family == "offset" else self.seed
        return self.family if parameter is None else f"{self.family}:{parameter}"

    def width(self, d: int) -> int:
        """Number of kept directions k of d.

        Raises:
            BandError: If the band does not fit into d directions.
        """
        if isinstance(self.keep, int):
            k = self.keep
        else:
            # The exact fraction: floor(d * 1/3) must be d // 3 in spite of binary rounding.
            k = math.floor(d * Fraction(self.keep).limit_denominator(1_000_000))
        if not 1 <= k <= d:
            raise BandError(f"keep must be in (0, 1] or an int in [1, {d}], got {self.keep!r}")
        if self.order is not None and len(self.order) != d:
            raise BandError(
                f"the order must hold all {d} directions, got {len(self.order)}; measure it on "
                "this model"
            )
        if self.offset is not None and self.offset + k > d:
            raise BandError(
                f"offset + k must be at most {d}, got offset {self.offset} + k {k}; "
                f"keep at most {d - self.offset} directions from this offset"
            )
        return k

    def start(self, d: int) -> int | None:
        """First kept singular direction of a contiguous band, None for the other families."""
        k = self.width(d)
        starts = {"bulk": (d - k) // 2, "offset": self.offset, "dominant": 0, "secondary": d - k}
        return starts.get(self.family)

    def indices(self, d: int) -> Tensor:
        """The kept directions in nested order.

        Returns:
            (k,) int64 indices into the descending spectrum, without repetition.
        """
        k = self.width(d)
        if self.family == "offset":
            return torch.arange(operator.index(cast("int", self.offset)), d)[:k]
        if self.order is not None:
            return torch.tensor(self.order[:k])
        return _growth_order(self.family, d, self.seed)[:k]

    def at(self, k: int) -> Band:
        """The same family at another width k, an int >= 1."""
        return replace(self, keep=k)


def _growth_order(family: str, d: int, seed: int | None) -> Tensor:
    """All d directions in the order in which the family's windows grow."""
    if family == "dominant":
        return torch.arange(d)
    if family == "secondary":
        return torch.arange(d).flip(0)
    if family == "random":
        return torch.randperm(d, generator=torch.Generator().manual_seed(cast("int", seed)))
    # bulk: window k starts at (d - k) // 2, so it grows right, left, right, ... from the middle.
    steps = torch.arange(d)
    middle = (d - 1) // 2
    distance = (steps + 1) // 2
    rightwards = steps % 2 == (1 if d % 2 == 0 else 0)
    bulk = torch.where(rightwards, middle + distance, middle - distance)
    # edges keeps what the bulk drops, so it grows in the opposite order.
    return bulk.flip(0) if family == "edges" else bulk


def _checked_order(order: Iterable[int]) -> tuple[int, ...]:
    given = tuple(order)
    if any(type(i) is not int for i in given) or sorted(given) != list(range(len(given))):
        raise BandError(
            "order must hold every direction from 0 to d - 1 once, as ints, got "
            f"{', '.join(map(repr, given[:5]))} ... ({len(given)} entries)"
        )
    return given


def _checked_keep(keep: float | int) -> float | int:
    number: float | int
    try:
        number = operator.index(keep)  # type: ignore[arg-type]
    except TypeError:
        try:
            number = float(keep)
        except (TypeError, ValueError):
            number = math.nan
    is_ratio = isinstance(number, float) and 0.0 < number <= 1.0
    is_width = isinstance(number, int) and number >= 1
    if isinstance(keep, bool) or not (is_ratio or is_width):
        raise BandError(f"keep must be a ratio in (0, 1] or an int >= 1, got {keep!r}")
    return number
