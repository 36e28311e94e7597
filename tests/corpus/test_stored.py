"""Stored vectors get the filter that their model would have had."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import normalize_embeddings

import st_embfilter
from st_embfilter.corpus import stored
from st_embfilter.errors import (
    BandError,
    CalibrationError,
    CorpusError,
    OutputError,
    ShapeError,
)
from st_embfilter.model.layer import filter_of
from tests.cli.test_cli import cli, text
from tests.conftest import DEMO_LM, FLOAT32, TEXTS, same

LINES = [f"{line} {i}" for i, line in enumerate(TEXTS * 3)]


@pytest.fixture(scope="module")
def raw(saved_demo: Path) -> np.ndarray:
    """(n, 256): what the model says without its filter."""
    model = st_embfilter.load(saved_demo, device="cpu")
    return SentenceTransformer(modules=list(model.children())[:2], device="cpu").encode(LINES)


@pytest.fixture(scope="module")
def filtered(saved_demo: Path) -> np.ndarray:
    """(n, 128): what the filtered model says."""
    return st_embfilter.load(saved_demo, device="cpu").encode(LINES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_BLOCK", 5 * 4 * 256)


def test_arrays_tensors_and_single_vectors(
    saved_demo: Path, raw: np.ndarray, filtered: np.ndarray
) -> None:
    found = st_embfilter.filter_vectors(raw, saved_demo)
    assert found.dtype == np.float32
    assert same(found, filtered)
    layer = st_embfilter.EmbedFilterLayer.from_pretrained(saved_demo)
    tensor = st_embfilter.filter_vectors(torch.from_numpy(raw).double(), layer)
    assert isinstance(tensor, torch.Tensor)
    assert same(tensor.numpy(), filtered)
    assert same(st_embfilter.filter_vectors(raw[3], layer), filtered[3])
    assert st_embfilter.filter_vectors(raw[:0], layer).shape == (0, 128)


def test_widths_are_prefixes_and_unit_length_comes_last(
    saved_demo: Path, raw: np.ndarray, filtered: np.ndarray
) -> None:
    found = st_embfilter.filter_vectors(raw, saved_demo, dims=0.25, normalize=True)
    expected = torch.nn.functional.normalize(torch.from_numpy(filtered[:, :32])).numpy()
    assert same(found, expected)
    with pytest.raises(BandError, match=r"an int in \[1, 128\], got 129"):
        st_embfilter.filter_vectors(raw, saved_demo, dims=129)


def test_unit_vectors_are_exact_up_to_their_scale(
    saved_demo: Path, raw: np.ndarray, filtered: np.ndarray
) -> None:
    length = np.linalg.norm(raw, axis=1, keepdims=True)
    found = st_embfilter.filter_vectors(raw / length, saved_demo)
    assert same(found * length, filtered)
    unit = normalize_embeddings(torch.from_numpy(filtered)).numpy()
    assert same(st_embfilter.filter_vectors(raw / length, saved_demo, normalize=True), unit)


def test_memory_mapped_files_in_and_out(
    saved_demo: Path, raw: np.ndarray, filtered: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "raw.npy", raw)
    source = np.load(tmp_path / "raw.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(
        tmp_path / "out.npy", mode="w+", dtype=np.float16, shape=filtered.shape
    )
    assert st_embfilter.filter_vectors(source, saved_demo, out=out) is out
    out.flush()
    assert np.array_equal(
        np.load(tmp_path / "out.npy"),
        st_embfilter.filter_vectors(raw, saved_demo).astype(np.float16),
    )
    with pytest.raises(ShapeError, match=r"shape of the result, \(24, 128\), got \(24, 64\)"):
        st_embfilter.filter_vectors(source, saved_demo, out=np.empty((24, 64), np.float32))


@pytest.mark.parametrize("shape", [(4, 128), (4, 4, 256), ()])
def test_another_width_is_refused(saved_demo: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="takes vectors of width 256"):
        st_embfilter.filter_vectors(np.ones(shape, np.float32), saved_demo)


def test_a_calibrated_filter_wants_the_lengths(raw: np.ndarray, tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(
        DEMO_LM, calibrate=LINES, device="cpu", show_progress_bar=False
    )
    layer = filter_of(model)
    assert same(st_embfilter.filter_vectors(raw, layer), model.encode(LINES), 1e-4)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    for vectors in (unit, unit.astype(np.float16), torch.from_numpy(unit).bfloat16()):
        with pytest.raises(CalibrationError, match="vectors of unit length"):
            st_embfilter.filter_vectors(vectors, layer)
    np.save(tmp_path / "unit.npy", unit)
    with pytest.raises(CalibrationError):
        st_embfilter.apply_filter(layer, tmp_path / "unit.npy", tmp_path / "out.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["unit.npy"]


def test_apply_to_an_array_file(
    saved_demo: Path, raw: np.ndarray, filtered: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "raw.npy", raw.astype(np.float64))
    command = ("apply", saved_demo, tmp_path / "raw.npy", "-o", tmp_path / "out.npy")
    done = cli(*command)
    assert done.exit_code == 0, done.output
    assert "24 vectors of 128 numbers" in text(done)
    assert same(np.load(tmp_path / "out.npy"), filtered)
    again = cli(*command)
    assert again.exit_code == 1
    assert "not there yet" in text(again)
    quarter = cli(*command, "--dims", "1/4", "--normalize", "--overwrite")
    assert quarter.exit_code == 0, quarter.output
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (24, 32)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=FLOAT32)


@pytest.mark.parametrize("kind", ["list", "large", "fixed", "half", "empty"])
def test_apply_to_parquet_keeps_the_other_columns(
    saved_demo: Path, raw: np.ndarray, filtered: np.ndarray, tmp_path: Path, kind: str
) -> None:
    rows = raw[:0] if kind == "empty" else raw
    number = pa.float16() if kind == "half" else pa.float32()
    types = {"large": pa.large_list(number), "fixed": pa.list_(number, 256)}
    column = pa.array(list(rows.astype(np.float16) if kind == "half" else rows),
                      types.get(kind, pa.list_(number)))  # fmt: skip
    table = pa.table({"id": pa.array(range(len(rows))), "vector": column, "t": LINES[: len(rows)]})
    table = table.replace_schema_metadata({"huggingface": "old", "mine": "kept"})
    pq.write_table(table, tmp_path / "raw.parquet", row_group_size=7)
    source, target = tmp_path / "raw.parquet", tmp_path / "out.parquet"
    counted = st_embfilter.apply_filter(saved_demo, source, target, column="vector")
    assert counted == (len(rows), 128)
    found = pq.read_table(target)
    assert found.schema.metadata == {b"mine": b"kept"}
    assert found.column_names == ["id", "vector", "t"]
    assert found.drop(["vector"]).equals(table.drop(["vector"]))
    assert found.schema.field("vector").type == pa.list_(pa.float32(), 128)
    if len(rows):
        tolerance = FLOAT32 if kind != "half" else 2**-10  # float16 has 11 bits
        assert same(np.stack(found["vector"].to_numpy()), filtered, tolerance)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([[1.0] * 256, [1.0] * 255], ShapeError, "got 255 numbers in row 1"),
        ([[1.0] * 256, None], ShapeError, "got 0 numbers in row 1"),
        ([[1.0] * 255 + [None]], CorpusError, "a null behind row 0"),
        (
            ["a", "b"],
            CorpusError,
            r"column 'embedding' of lists of numbers, got embedding \(string",
        ),
        ([["a"] * 256], CorpusError, "must hold numbers"),
    ],
)
def test_columns_that_hold_no_vectors(
    saved_demo: Path, tmp_path: Path, content: list[object], error: type[Exception], message: str
) -> None:
    pq.write_table(pa.table({"embedding": content}), tmp_path / "raw.parquet")
    with pytest.raises(error, match=message):
        st_embfilter.apply_filter(saved_demo, tmp_path / "raw.parquet", tmp_path / "o.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["raw.parquet"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_vectors_that_are_not_finite(saved_demo: Path, tmp_path: Path, value: float) -> None:
    vectors = np.ones((5, 256))
    vectors[3, 7] = value
    with np.errstate(over="ignore"), pytest.raises(CorpusError, match=r"in 1 of a block of 5"):
        st_embfilter.filter_vectors(vectors, saved_demo)
    np.save(tmp_path / "raw.npy", vectors)
    with np.errstate(over="ignore"), pytest.raises(CorpusError, match="must be finite"):
        st_embfilter.apply_filter(saved_demo, tmp_path / "raw.npy", tmp_path / "out.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["raw.npy"]


def test_files_that_are_none(saved_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"no array")
    np.save(tmp_path / "b.npy", np.zeros((2, 256), np.int8))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name, message in {
        "a.npy": "must be an array of numpy",
        "b.npy": "of floating numbers",
        "a.parquet": "must be a Parquet file",
        "none.npy": "must be an array of numpy",
        "a.csv": "one kind of file",
    }.items():
        target = tmp_path / f"out{Path(name).suffix}"
        with pytest.raises(CorpusError, match=message):
            st_embfilter.apply_filter(saved_demo, tmp_path / name, target)
    with pytest.raises(CorpusError, match=r"got b\.npy and b\.parquet"):
        st_embfilter.apply_filter(saved_demo, tmp_path / "b.npy", tmp_path / "b.parquet")
    with pytest.raises(OutputError, match="must be a file"):
        st_embfilter.apply_filter(saved_demo, tmp_path / "b.npy", tmp_path / "b.npy")
    assert len(list(tmp_path.iterdir())) == 3


MEMORY = """
import resource, sys
import numpy as np
import st_embfilter

layer = st_embfilter.EmbedFilterLayer.from_pretrained(sys.argv[1])
np.save(sys.argv[3], np.zeros((8, 256), np.float32))
st_embfilter.apply_filter(layer, sys.argv[3], sys.argv[3], overwrite=True)  # loads what it needs
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
limit = data + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
st_embfilter.apply_filter(layer, sys.argv[2], sys.argv[3], overwrite=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(("share", "fits"), [(6, True), (0.5, False)])
def test_memory_holds_a_few_blocks(
    saved_demo: Path, tmp_path: Path, share: float, fits: bool
) -> None:
    np.lib.format.open_memmap(
        tmp_path / "raw.npy", mode="w+", dtype=np.float32, shape=(400_000, 256)
    ).flush()
    block = 16 << 20
    command = [sys.executable, "-c", MEMORY, str(saved_demo), str(tmp_path / "raw.npy"),
               str(tmp_path / "out.npy"), str(int(share * block))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr
