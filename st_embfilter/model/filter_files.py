"""The files of a saved filter: what must be in them, and the card of a filter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.tensors import SAFETENSORS_FILE
from st_embfilter.model.find import find_in
from st_embfilter.model.metadata import METADATA_FILE, SPECTRUM_FILE, FilterMetadata
from st_embfilter.text import reading

#: What a projection and a bias may be stored in; the layer computes in float32.
_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


#: Rounding to 16 bits leaves less than this, a damaged matrix more.
MAX_SKEW: Final = 0.01


class FilterParts(NamedTuple):
    """What a filter is made of.

    Attributes:
        projection: (k, d), any floating dtype of 16 bits or more.
        metadata: What the filter was made from.
        singular_values: (d,) float64 of the whole spectrum, if known.
        bias: (k,) of a calibrated filter.
    """

    projection: Tensor
    metadata: FilterMetadata
    singular_values: Tensor | None
    bias: Tensor | None


def check_parts(
    weights: dict[str, Tensor], metadata: FilterMetadata, spectrum: dict[str, Tensor] | None
) -> FilterParts:
    """Checks the contents of a filter's three files against each other.

    Raises:
        FormatError: If the weights or the spectrum do not fit the metadata.
    """
    expected = (metadata.k, metadata.d)
    names = {"linear.weight"} | ({"linear.bias"} if metadata.calibration is not None else set())
    if set(weights) != names:
        raise FormatError(
            f"the weights of this filter must be {sorted(names)} as {METADATA_FILE} says, got "
            f"{sorted(weights)}"
        )
    projection, bias = weights["linear.weight"], weights.get("linear.bias")
    fits = tuple(projection.shape) == expected and projection.dtype in _DTYPES
    if not fits or not bool(torch.isfinite(projection).all()):
        raise FormatError(
            f"the projection must be finite and of shape {expected} as {METADATA_FILE} says, got "
            f"shape {tuple(projection.shape)} and {projection.dtype}; the files do not belong "
            "together"
        )
    if metadata.calibration is None and metadata.norm is None and _skew(projection) > MAX_SKEW:
        raise FormatError(
            "the rows of a projection must be orthonormal, got a matrix that is not; the file was "
            "edited or is damaged"
        )
    if bias is not None and (
        tuple(bias.shape) != expected[:1]
        or bias.dtype not in _DTYPES
        or not bool(torch.isfinite(bias).all())
    ):
        raise FormatError(
            f"the bias must be finite and of shape {expected[:1]} as {METADATA_FILE} says, got "
            f"shape {tuple(bias.shape)}; the files do not belong together"
        )
    singular_values = None
    if spectrum is not None:
        singular_values = spectrum.get("singular_values")
        if singular_values is None or not _is_spectrum(singular_values, metadata.d):
            raise FormatError(
                f"{SPECTRUM_FILE} must hold {metadata.d} singular values, finite, >= 0 and "
                f"descending, got {', '.join(sorted(spectrum)) or 'no tensor'}"
            )
    return FilterParts(projection, metadata, singular_values, bias)


def read_parts(files: ModelFiles, folder: str | None = None) -> FilterParts:
    """What the files of a model hold of its filter, in any form.

    Args:
        files: The files of a filtered model, or of a filter alone.
        folder: Where its weights must lie, with a slash at the end; None for where they are found.

    Raises:
        FormatError: If there is no filter, or its files contradict each other.
    """
    found = find_in(files)
    if found is not None and folder in (None, found.weights_folder):
        weights = files.path(f"{found.weights_folder}{SAFETENSORS_FILE}")
        spectrum = files.path(f"{found.weights_folder}{SPECTRUM_FILE}") or files.path(
            f"{found.metadata_folder}{SPECTRUM_FILE}"  # where 0.1.0 put it
        )
        if weights is not None:
            with reading(files.where, FormatError, "hold a filter that can be read"):
                return check_parts(
                    load_tensors(weights),
                    found.metadata,
                    None if spectrum is None else load_tensors(spectrum),
                )
    where = "" if folder is None else f" in {folder!r:.80}, where modules.json places them"
    raise FormatError(
        f"a filtered model must hold {METADATA_FILE} and the weights of its filter{where}, got "
        f"none in {files.where}; build one with from_causal_lm or `st-embfilter build`"
    )


def _skew(projection: Tensor) -> float:
    """How far P P^T x is from x, relative to its length, for some fixed random vectors x.

    Takes O(k d) instead of the O(k^2 d) of the whole product, which `verify` checks.
    """
    rows = projection.to(torch.float32)
    x = torch.randn(rows.shape[0], 4, generator=torch.Generator().manual_seed(0))
    return float((rows @ (rows.T @ x) - x).norm() / x.norm())


def _is_spectrum(values: Tensor, d: int) -> bool:
    return (
        tuple(values.shape) == (d,)
        and values.dtype in (torch.float32, torch.float64)
        and bool(torch.isfinite(values).all())
        and bool((values >= 0).all())
        and bool((values.diff() <= 0).all())
    )


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        FormatError: If it is none.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} must be a safetensors file, got: {error}") from error
    return tensors


def filter_card(metadata: FilterMetadata, name: str = "path/to/this/folder") -> str:
    """The card of a filter alone; `name` is the folder or Hub id that it is loaded from."""
    source = metadata.provenance
    on_hub = source.model_id is not None and source.revision is not None
    base = f"base_model: {source.model_id}\nbase_model_relation: adapter\n" if on_hub else ""
    model = source.model_id or "a language model"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
{base}tags:
- sentence-transformers
- embedfilter
---

# EmbedFilter for {model}

The {metadata.band} band of the singular directions of `{source.tensor}`, without the model: it maps
pooled hidden states of {metadata.d} dimensions to {metadata.k}
([EmbedFilter](https://arxiv.org/abs/2606.07502)). It fits every model with the same unembedding
matrix:

`sha256 {source.sha256}`

```python
import st_embfilter
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{source.model_id or "my-decoder-model"}")
st_embfilter.add_filter(model, "{name}")
```
"""
