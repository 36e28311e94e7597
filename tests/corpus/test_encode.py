"""A corpus: the same vectors as `encode`, the same bytes however often it was interrupted."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

import st_embfilter
from st_embfilter.cli.encode import _workers
from st_embfilter.corpus import encode, work
from st_embfilter.corpus.encoder import Encoder, longest_text
from st_embfilter.corpus.shard import ShardWriter
from st_embfilter.errors import (
    BackboneError,
    BandError,
    CorpusError,
    EmbedFilterError,
    OutputError,
    WorkerError,
)
from tests.cli.test_cli import cli, text
from tests.conftest import FLOAT32, TEXTS, MakeLM, contents, same

ROWS = [f"{TEXTS[i % len(TEXTS)]} w{i} w{i * i % 190}" for i in range(53)]

Encode = Callable[..., st_embfilter.corpus.encode.EncodedCorpus]


@pytest.fixture
def model(make_lm: MakeLM) -> SentenceTransformer:
    folder, _ = make_lm()
    return st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of texts and two bad rows, of which one is the last."""
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": line, "id": f"k{i}"}) for i, line in enumerate(ROWS)]
    path.write_text("\n".join([*lines[:30], '{"text": null}', *lines[30:], "broken"]) + "\n")
    return path


@pytest.fixture
def run(model: SentenceTransformer, source: Path, tmp_path: Path) -> Encode:
    """Encodes the file into a folder, 10 rows a shard."""

    def call(name: str = "out", **options: Any) -> encode.EncodedCorpus:
        options = {"shard_rows": 10, "batch_size": 4, "show_progress_bar": False, **options}
        given = options.pop("model", model)
        return st_embfilter.encode_corpus(given, [source], tmp_path / name, **options)

    return call


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "WINDOW", 7)


def vectors(folder: Path, column: str = "embedding") -> NDArray[Any]:
    """Of all shards, as a reader of Parquet folders finds them."""
    table = pa.dataset.dataset(folder, format="parquet").to_table()
    return np.stack(table[column].to_numpy())


def test_vectors_ids_and_bad_rows(run: Encode, model: SentenceTransformer) -> None:
    done = run(id="id", npy=True)
    assert (done.rows, done.bad) == (53, 2)
    assert same(vectors(done.path), model.encode(ROWS))
    table = pa.dataset.dataset(done.path, format="parquet").to_table()
    assert table["id"].to_pylist() == [f"k{i}" for i in range(53)]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    arrays = [np.load(path) for path in sorted((done.path / "_npy").iterdir())]
    assert [len(array) for array in arrays] == [10, 10, 10, 9, 10, 4]
    assert (np.concatenate(arrays) == vectors(done.path)).all()
    bad = [json.loads(path.read_text()) for path in sorted(done.path.glob("_bad-*"))]
    assert [(row["row"], row["input_row"], row["reason"]) for row in bad] == [
        (30, 30, "null"),
        (54, 54, "no JSON"),
    ]
    manifest = json.loads((done.path / "_manifest.json").read_text())
    files = {name for shard in manifest["shards"] for name in shard["files"]}
    assert files | {"_manifest.json"} == set(contents(done.path))
    assert [shard["first_row"] for shard in manifest["shards"]] == [0, 10, 20, 30, 40, 50]


def test_rows_are_numbered_without_ids(run: Encode) -> None:
    ids = pq.read_table(run().path)["id"]
    assert ids.type == pa.int64()
    assert ids.to_pylist() == [i for i in range(54) if i != 30]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("normalize", [False, True])
def test_widths_and_precisions(
    run: Encode, model: SentenceTransformer, precision: str, normalize: bool
) -> None:
    folder = run(dims=[1.0, 0.5, 3], precision=precision, normalize=normalize).path
    for width in (16, 8, 3):
        expected = model.encode(ROWS, truncate_dim=width, normalize_embeddings=normalize)
        if precision == "int8":
            # The ranges are those of the first window, which ends with the seventh text.
            expected = quantize_embeddings(expected, "int8", calibration_embeddings=expected[:7])
        elif precision == "float16":
            expected = expected.astype(np.float16)
        else:
            expected = quantize_embeddings(expected, precision)  # type: ignore[arg-type]
        found = vectors(folder, f"embedding_{width}")
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        # Other batches: the last bits of float32, hence the last bit of float16, or one step.
        length = max(1.0, float(np.abs(expected.astype(float)).max()))
        step = {"float32": FLOAT32, "float16": 2.0**-10, "int8": 1 / length, "binary": 0}[precision]
        assert np.abs(found.astype(float) - expected.astype(float)).max() <= step * length


class Stop(BaseException):
    """Ends a run where a kill might."""


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_interrupted_anywhere_the_bytes_are_the_same(
    run: Encode, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    options = {"precision": precision, "npy": True, "id": "id"}
    whole = contents(run("whole", **options).path)
    replace, calls = os.replace, 0

    def stops(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise Stop
        replace(*arguments)

    monkeypatch.setattr(os, "replace", stops)
    for _ in range(50):
        try:
            folder = run("parts", **options).path
        except Stop:
            continue
        break
    assert calls > 10
    assert contents(folder) == whole
    run("parts", **options)  # complete: nothing to do
    assert contents(folder) == whole


def test_a_torn_journal_and_a_lost_shard(run: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(run("whole").path)

    def full(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("st_embfilter.corpus.folder.Folder.finish", full)
        with pytest.raises(Stop):
            run("parts")
    folder = Path(run("whole").path).with_name("parts")
    journal = folder / "_journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    (folder / "shard-000001.parquet").unlink()
    (folder / ".shard-000001.abc.tmp").write_bytes(b"left by a killed process")
    assert contents(run("parts").path) == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 5}, "batch_size was 4, is 5"),
        ({"text": "id"}, 'text was "text", is "id"'),
        ({"dims": [4]}, r"dims was \[16\], is \[4\]"),
    ],
)
def test_other_settings_in_the_same_folder(
    run: Encode, changed: dict[str, Any], message: str
) -> None:
    before = contents(run().path)
    with pytest.raises(OutputError, match=message):
        run(**changed)
    assert contents(run().path) == before


def test_another_model_or_input_in_the_same_folder(
    run: Encode, model: SentenceTransformer, source: Path
) -> None:
    run()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    with pytest.raises(OutputError, match="model was"):
        run()
    run("new")
    source.write_text(source.read_text() + '{"text": "more"}\n')
    with pytest.raises(OutputError, match="inputs was"):
        run("new")


def test_a_folder_of_something_else(run: Encode, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.docx").write_text("")
    with pytest.raises(OutputError, match=r"got .* with thesis\.docx in it"):
        run()
    with pytest.raises(OutputError, match="cannot write"):
        run("out/thesis.docx")


def test_one_process_at_a_time(run: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(*_: Any, **__: Any) -> None:
        with pytest.raises(OutputError, match="one process at a time"):
            run()
        raise Stop

    monkeypatch.setattr(encode, "encode_shard", second)
    with pytest.raises(Stop):
        run()


def test_strict_and_hopeless(run: Encode, tmp_path: Path, model: SentenceTransformer) -> None:
    with pytest.raises(CorpusError, match=r"row 30 of .*in\.jsonl: null.* 3 finished shards stay"):
        run(strict=True)
    (tmp_path / "none.jsonl").write_text('{"body": "x"}\n' * 1001)
    with pytest.raises(CorpusError, match="hold no text in 'text': null; is that the column"):
        st_embfilter.encode_corpus(
            model, [tmp_path / "none.jsonl"], tmp_path / "none", show_progress_bar=False
        )


def test_an_empty_file_gives_an_empty_shard(model: SentenceTransformer, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = st_embfilter.encode_corpus(
        model, [tmp_path / "empty.txt"], tmp_path / "out", npy=True, show_progress_bar=False
    )
    assert pq.read_table(done.path).num_rows == done.rows == 0
    assert np.load(done.path / "_npy" / "shard-000000.npy").shape == (0, 16)


def test_a_full_multiple_ends_without_an_empty_shard(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n" * 2)
    done = st_embfilter.encode_corpus(
        model, [tmp_path / "a.txt"], tmp_path / "out", shard_rows=2, show_progress_bar=False
    )
    assert len(list(done.path.glob("shard-*"))) == 2


def test_a_vector_that_is_not_finite_is_a_bad_row(
    run: Encode, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = model.encode_document

    def odd(texts: list[str], **options: Any) -> NDArray[np.float32]:
        found: NDArray[np.float32] = real(texts, **options)
        found[[t.startswith("The glacier") for t in texts]] = np.nan
        return found

    monkeypatch.setattr(model, "encode_document", odd)
    done = run()
    count = sum(line.startswith("The glacier") for line in ROWS)
    assert (done.rows, done.bad) == (53 - count, 2 + count)
    assert np.isfinite(vectors(done.path)).all()


def test_long_texts_are_cut_where_the_model_stops_reading(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    limit = longest_text(model)
    assert limit == 64 * 7  # tokens, and characters of the longest word
    long = "glacier tea cup " * 1000
    pq.write_table(pa.table({"text": [long, "short"]}), tmp_path / "a.parquet")
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = model.encode_document

        def spy(texts: list[str], **options: Any) -> Any:
            seen.extend(map(len, texts))
            return real(texts, **options)

        patch.setattr(model, "encode_document", spy)
        done = st_embfilter.encode_corpus(
            model, [tmp_path / "a.parquet"], tmp_path / "out", show_progress_bar=False
        )
    assert max(seen) == limit
    assert same(vectors(done.path), model.encode([long, "short"]))


def test_a_disk_that_fills_up_keeps_the_shards(
    run: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(run("whole").path)
    write = ShardWriter.write

    def full(self: ShardWriter, *arguments: Any) -> None:
        if self.number == 2:
            raise OSError(28, "No space left on device")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(OutputError, match="No space left on device; 2 finished shards stay in"):
            run()
    assert contents(run().path) == whole


def test_an_input_that_vanishes_keeps_the_shards(
    model: SentenceTransformer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second.jsonl"
    second.write_bytes(source.read_bytes())
    content, close = second.read_bytes(), ShardWriter.close

    def run(name: str) -> encode.EncodedCorpus:
        return st_embfilter.encode_corpus(
            model, [source, second], tmp_path / name, shard_rows=10, show_progress_bar=False
        )

    whole = contents(run("whole").path)

    def vanishing(self: ShardWriter, *arguments: Any) -> Any:
        if self.number == 2:
            second.unlink()
        return close(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", vanishing)
        with pytest.raises(CorpusError, match=r"second\.jsonl can no longer be read.* 5 finished"):
            run("parts")
    assert len(list((tmp_path / "parts").glob("shard-*"))) == 5
    second.write_bytes(content)
    assert contents(run("parts").path) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_a_file_that_cannot_grow_keeps_the_shards(
    run: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses the bytes in the middle of the third shard."""
    import resource

    whole = contents(run("whole").path)
    write, (soft, hard) = ShardWriter.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: ShardWriter, *arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if self.number == 2 else soft, hard))
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", limited)
        try:
            with pytest.raises(OutputError, match="File too large; 2 finished shards stay in"):
                run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(run().path) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_model_that_runs_out_of_memory_keeps_the_shards(
    model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard's one batch wants tensors larger than what the C library keeps in hand."""
    import resource

    monkeypatch.setattr(work, "WINDOW", 8192)
    few, many = ["the tea\n"] * 4096, ["the glacier " * 40 + "\n"] * 4096
    (tmp_path / "a.txt").write_text("".join(few + many))
    options = {"shard_rows": 4096, "batch_size": 4096, "show_progress_bar": False}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    forward = model[0].forward

    def limited(features: dict[str, Any], **more: Any) -> Any:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if features["input_ids"].shape[1] > 10:
            resource.setrlimit(resource.RLIMIT_AS, (used, hard))
        try:
            return forward(features, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(model[0], "forward", limited)
        with pytest.raises(
            WorkerError, match=r"allocate memory.*batch size helps; 1 finished shard stays"
        ):
            st_embfilter.encode_corpus(model, [tmp_path / "a.txt"], tmp_path / "out", **options)
    assert len(list((tmp_path / "out").glob("shard-*"))) == 1


def test_two_processes_share_the_work(
    run: Encode, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(devices=["cpu", "cpu"])
    assert same(vectors(done.path), model.encode(ROWS))

    def doomed(self: Encoder) -> Any:
        pool = self.model.start_multi_process_pool(["cpu", "cpu"])
        for process in pool["processes"]:
            os.kill(process.pid, signal.SIGKILL)
        return pool

    monkeypatch.setattr(Encoder, "_start", doomed)
    with pytest.raises(WorkerError, match=r"died unexpectedly.*0 finished shards stay"):
        run("killed", devices=["cpu", "cpu"])


def test_bad_arguments(run: Encode, tmp_path: Path, make_lm: MakeLM) -> None:
    cases: list[tuple[dict[str, Any], type[EmbedFilterError], str]] = [
        ({"precision": "int4"}, CorpusError, "precision must be one of"),
        ({"engine": "spark"}, CorpusError, "engine must be 'local' or 'ray'"),
        ({"shard_rows": 0}, CorpusError, "shard_rows must be at least 1"),
        ({"dims": [17]}, BandError, r"int in \[1, 16\], got 17"),
        ({"model": make_lm(name="bare")[0]}, BackboneError, "make one of a language model"),
        ({"engine": "ray"}, CorpusError, "needs a model's folder or Hub id"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            run(**options)
    assert not (tmp_path / "out").exists()


def test_command_line(model: SentenceTransformer, source: Path, tmp_path: Path) -> None:
    saved = st_embfilter.save_pretrained(model, tmp_path / "model")
    command = ["encode", saved, source, "--output", tmp_path / "out", "--id", "id", "-q"]
    done = cli(*command, "--dims", "1/4")
    assert done.exit_code == 0, done.output
    assert "53 vectors in" in text(done)
    assert "2 bad rows in _bad-*.jsonl" in text(done)
    assert same(vectors(tmp_path / "out"), model.encode(ROWS, truncate_dim=4))
    assert "dims was [4], is [16]" in text(cli(*command))
    assert _workers("3") == (3, 3)
    assert _workers("1-8") == (1, 8)
    assert "workers must be a number" in text(cli(*command, "--workers", "8-1"))


def test_static_models_get_large_batches_with_the_same_vectors(
    make_lm: MakeLM, tmp_path: Path
) -> None:
    folder, _ = make_lm()
    static = st_embfilter.from_causal_lm(folder, layers=0, device="cpu", show_progress_bar=False)
    (tmp_path / "a.txt").write_text("\n".join(ROWS) + "\n")
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = static.encode_document

        def spy(texts: list[str], **options: Any) -> Any:
            seen.append(options["batch_size"])
            return real(texts, **options)

        patch.setattr(static, "encode_document", spy)
        done = st_embfilter.encode_corpus(
            static, [tmp_path / "a.txt"], tmp_path / "out", batch_size=2, show_progress_bar=False
        )
    assert min(seen) > len(ROWS)
    assert (vectors(done.path) == static.encode(ROWS, batch_size=2)).all()
