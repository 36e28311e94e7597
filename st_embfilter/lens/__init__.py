"""What embeddings say."""

from st_embfilter.text import lazy_names

__all__ = [
    "TokenCounts",
    "count_tokens",
    "load_tokenizer",
    "look",
    "open_model",
    "optimal_band",
    "read_texts",
    "study",
]

__getattr__ = lazy_names(
    __name__,
    {
        "TokenCounts": "counts",
        "count_tokens": "counts",
        "load_tokenizer": "report",
        "look": "report",
        "open_model": "report",
        "optimal_band": "spectroscopy",
        "read_texts": "counts",
        "study": "report",
    },
)
