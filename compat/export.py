"""Writes the backbone of a saved folder for `backend="onnx"` or `"openvino"`, into that folder.

Runs in the environment of the exporter, with nothing of this project installed: `python export.py
onnx|openvino FOLDER`. `SentenceTransformer(FOLDER, backend=...)` then loads it beside pooling and
filter, which stay in torch.

What `SentenceTransformer` exports by itself does not work for decoders: the exporters of optimum
make `position_ids` an input of the graph, and sentence-transformers gives none. Here they are left
out, so that the graph counts positions from the left as the model does in torch. Texts must be
padded on the right, as those of a saved folder are.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

TASK = "feature-extraction"
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}


def export(backend: str, folder: Path) -> Path:
    """Exports the backbone in `folder`; returns the new file."""
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig, AutoModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, on every branch over a shape
        if backend == "onnx":
            from optimum.exporters.onnx import onnx_export_from_model as export_from_model
        else:
            from optimum.exporters.openvino.convert import export_from_model
        kind = TasksManager.get_exporter_config_constructor(
            backend,
            model_type=AutoConfig.from_pretrained(folder).model_type,
            task=TASK,
            library_name="transformers",
        )
        model = AutoModel.from_pretrained(folder).float().eval()
        config = without_positions(kind(model.config, task=TASK))
        name = "custom_onnx_configs" if backend == "onnx" else "custom_export_configs"
        target = folder / backend
        export_from_model(model, output=target, task=TASK, **{name: {"model": config}})
    return target / FILES[backend]


def without_positions(config: Any) -> Any:
    """An exporter's configuration whose graph computes the positions itself."""
    kind = type(config)

    class WithoutPositions(kind):
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {k: v for k, v in super().inputs.items() if k != "position_ids"}

    config.__class__ = WithoutPositions
    return config


if __name__ == "__main__":
    print(export(sys.argv[1], Path(sys.argv[2])))
