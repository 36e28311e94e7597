"""A filtered model on disk and on the Hub: write, read, check, describe."""

from st_embfilter.text import lazy_names

__all__ = [
    "Result",
    "read_results",
    "results_frame",
    "write_results",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Result": "results",
        "read_results": "results",
        "results_frame": "results",
        "write_results": "results",
    },
)
