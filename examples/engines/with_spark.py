"""A corpus encoded by PySpark: python with_spark.py MODEL TEXTS.parquet OUTPUT."""

import sys
from collections.abc import Callable

import numpy as np
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType

model_name, texts, output = sys.argv[1:4]


def load() -> Callable[[np.ndarray], np.ndarray]:
    """Runs once in each worker process."""
    import st_embfilter

    model = st_embfilter.load(model_name)
    return lambda batch: model.encode_document(batch.tolist(), show_progress_bar=False)


encode = predict_batch_udf(load, return_type=ArrayType(FloatType()), batch_size=1024)
spark = SparkSession.builder.getOrCreate()
table = spark.read.parquet(texts)
table.withColumn("embedding", encode("text")).drop("text").write.parquet(output)
