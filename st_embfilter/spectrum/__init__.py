"""The spectrum of an unembedding matrix: tensors in, tensors out."""

from st_embfilter.text import lazy_names

__all__ = [
    "FAMILIES",
    "Band",
    "Spectrum",
    "spectrum_of",
    "spectrum_of_weight",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Band": "band",
        "FAMILIES": "band",
        "Spectrum": "spectrum",
        "spectrum_of": "gram",
        "spectrum_of_weight": "gram",
    },
)
