"""A corpus encoded by Daft: python with_daft.py MODEL TEXTS.parquet OUTPUT."""

import sys

import daft
import numpy as np
from daft import DataType, Series, col

model_name, texts, output = sys.argv[1:4]


@daft.cls
class Encode:
    """Holds the model; one in each worker."""

    def __init__(self) -> None:
        import st_embfilter

        self.model = st_embfilter.load(model_name)

    @daft.method.batch(return_dtype=DataType.list(DataType.float32()), batch_size=1024)
    def __call__(self, batch: Series) -> list[np.ndarray]:
        """Vectors of a batch of texts."""
        found = self.model.encode_document(batch.to_pylist(), show_progress_bar=False)
        return [row.tolist() for row in found]


table = daft.read_parquet(texts)
table.with_column("embedding", Encode()(col("text"))).exclude("text").write_parquet(output)
