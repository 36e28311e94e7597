"""The examples for other engines give the vectors of `encode_document`; plans multiply right."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from benchmarks.scale import duration, plan, size
from examples.search.search import titles
from tests.conftest import ROOT, TEXTS, same


@pytest.mark.parametrize(("engine", "needs"), [("with_spark", "pyspark"), ("with_daft", "daft")])
def test_other_engines(engine: str, needs: str, saved_demo: Path, tmp_path: Path) -> None:
    pytest.importorskip(needs, reason=f"needs {needs}")
    import st_embfilter

    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pq.write_table(table, tmp_path / "texts.parquet")
    script = ROOT / "examples" / "engines" / f"{engine}.py"
    arguments = [saved_demo, tmp_path / "texts.parquet", tmp_path / "out"]
    # Spark's workers are the first python3 of the path unless they are told.
    env = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    subprocess.run([sys.executable, "-W", "ignore", script, *arguments], check=True, env=env)
    found = ds.dataset(tmp_path / "out", format="parquet").to_table().sort_by("id")
    assert found["id"].to_pylist() == table["id"].to_pylist()
    vectors = np.stack(found["embedding"].to_numpy())
    assert same(vectors, st_embfilter.load(saved_demo, device="cpu").encode_document(TEXTS))


def test_plans() -> None:
    one, many = (plan(10**9, 100.0, dims=288, price=0.5, workers=n) for n in (1, 1000))
    assert one.hours == pytest.approx(10**7 / 3600)
    assert many.hours == pytest.approx(one.hours / 1000)
    assert many.cost == one.cost == pytest.approx(one.hours * 0.5)
    assert one.output == 10**9 * (288 * 4 + 8)
    assert one.eighth == 10**9 * (36 * 4 + 8)
    assert many.written == pytest.approx(1000 * 100 * (288 * 4 + 8))
    assert (size(1.5e12), duration(3.0), duration(72.0)) == ("1.5 TB", "3 h", "3 days")


def test_invented_titles_are_made_of_real_ones(tmp_path: Path) -> None:
    real = ["how to sort a list", "what is a monad"]
    (tmp_path / "titles.txt").write_text("\n".join(real))
    found = titles(tmp_path / "titles.txt", 50)
    assert found[:2] == real
    assert len(found) == 50
    assert {word for title in found for word in title.split()} <= set(" ".join(real).split())
