"""What a filter does for a model, measured."""

from st_embfilter.text import lazy_names

__all__ = [
    "ClassificationTask",
    "ClusteringTask",
    "RawModel",
    "RetrievalTask",
    "STSTask",
    "default_configurations",
    "raw_model",
    "search_window",
    "sweep",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ClassificationTask": "tasks",
        "ClusteringTask": "tasks",
        "RawModel": "sweep",
        "RetrievalTask": "tasks",
        "STSTask": "tasks",
        "default_configurations": "sweep",
        "raw_model": "sweep",
        "search_window": "search",
        "sweep": "sweep",
    },
)
