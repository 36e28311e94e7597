"""Rows of unit length."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound="np.floating[Any]")


def unit_rows(rows: NDArray[F]) -> NDArray[F]:
    """Rows scaled to Euclidean length 1; rows of zeros stay zero.

    Args:
        rows: (n, d), float32 or float64.

    Returns:
        (n, d), C-contiguous, of the same dtype.
    """
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[F] = np.ascontiguousarray(rows / np.maximum(lengths, np.finfo(rows.dtype).tiny))
    return unit
