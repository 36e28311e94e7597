"""Figures, the storage table, and the commands `eval` and `bench`."""

import gzip
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import quantize_embeddings
from typer.testing import CliRunner, Result

import st_embfilter
from st_embfilter.cli.app import app
from st_embfilter.errors import DataError
from st_embfilter.evaluation.indexes import Collection, storage_table
from st_embfilter.saved.results import Result as Row
from st_embfilter.saved.results import read_results
from st_embfilter.spectrum.unit import unit_rows
from tests.conftest import tiny_lm

HAS_MTEB = pytest.importorskip("importlib.util").find_spec("mteb") is not None


def row(task: str, configuration: str, dims: int, score: float, **changes: object) -> Row:
    values: dict[str, object] = {
        "task": task, "task_type": "STS", "dataset": task, "revision": None, "split": "test",
        "metric": "cosine_spearman", "configuration": configuration, "dims": dims, "full_dims": 64,
        "start": None, "needs_data": configuration == "whiten", "fitted_on": None, "score": score,
        "low": score - 0.1, "high": score + 0.1, "delta": score - 0.3, "delta_low": score - 0.35,
        "delta_high": score - 0.25, "std": None, "level": 0.95, "resamples": 10, "units": 5,
        "model": "m", "prompt": None, "pooling": "mean", "normalize": False,
        "max_seq_length": 512, "measured_by": "test",
    }  # fmt: skip
    return Row(**(values | changes))  # type: ignore[arg-type]


# Figures -----------------------------------------------------------------------------------------


def test_score_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from st_embfilter.evaluation.figures import score_figure
    from st_embfilter.lens.figures import save_figure

    rows = [row("a", "raw", 64, 0.3), row("b", "raw", 64, 0.3)]
    rows += [row(t, n, k, 0.3 + k / 99) for t in "ab" for n in ("bulk", "whiten") for k in (32, 8)]
    figure = score_figure(rows)
    assert [axes.get_title() for axes in figure.axes] == ["a (test)", "b (test)"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["raw", "bulk", "whiten *"]
    bulk = next(line for line in figure.axes[0].lines if line.get_label() == "bulk")
    np.testing.assert_allclose(bulk.get_xydata(), [[8, 30 + 800 / 99], [32, 30 + 3200 / 99]])
    files = [tmp_path / name for name in ("1.png", "1.svg", "2.svg")]
    for file in files:
        save_figure(figure, file)
    assert files[0].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="a figure needs result rows, got none"):
        score_figure([])


def test_nothing_of_a_figure_is_cut_off() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from st_embfilter.evaluation.baselines import baseline_names
    from st_embfilter.evaluation.figures import score_figure

    names = ["bulk", *baseline_names()]
    for tasks in ("a", "abc"):
        rows = [row(t, n, k, 0.4) for t in tasks for n in names for k in (8, 32)]
        figure = score_figure(rows)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_window_figure() -> None:
    pytest.importorskip("matplotlib")
    from st_embfilter.evaluation.figures import window_figure

    rows = [row("a", "raw", 64, 0.3)]
    rows += [row("a", f"offset:{o}", k, 0.3 + (o == 8) / 9) for o in (0, 8, 16) for k in (16, 32)]
    figure = window_figure(rows)
    axes = figure.axes[0]
    star = next(line for line in axes.lines if line.get_label() == "best")
    assert axes.get_xticklabels()[int(star.get_xdata()[0])].get_text() == "8"
    with pytest.raises(DataError, match="needs rows of windows"):
        window_figure(rows[:1])


def test_depth_figure() -> None:
    pytest.importorskip("matplotlib")
    from st_embfilter.evaluation.figures import depth_figure

    rows = [
        row(task, name, dims, score + (dims == 32 and depth == 1) / 3, layers=depth, model=model)
        for model in "mn"
        for task, score in (("a", 0.2), ("b", 0.4))
        for depth in (4, 1, 0)
        for name, dims in (("raw", 64), ("bulk", 32), ("bulk", 8), ("whiten", 8))
        if (depth, name) != (0, "raw")  # as a prompt's last token, which has no score there
    ]
    figure = depth_figure(rows)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["m\na", "m\nb", "n\na", "n\nb"]
    for axes in panels:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["raw", "32", "8"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "4"]
        (star,) = axes.lines
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (1, 1)
        assert axes.images[0].get_array().mask[0, 0]
    with pytest.raises(DataError, match="a depth figure needs rows of several depths, got none"):
        depth_figure([row("a", "raw", 64, 0.3)])


# Storage -----------------------------------------------------------------------------------------


def test_storage_table() -> None:
    faiss = pytest.importorskip("faiss")
    from st_embfilter.evaluation.indexes import _Index

    rng = np.random.default_rng(0)
    documents = rng.standard_normal((600, 64)).astype(np.float32)
    queries = documents[:20] + 0.3 * rng.standard_normal((20, 64)).astype(np.float32)
    rows = storage_table(documents, queries, gains=[{i: 1.0} for i in range(20)], repetitions=1)
    by_key = {(r.dims, r.precision, r.kind): r for r in rows}
    assert len(by_key) == 4 * 3 * 2
    whole = by_key[64, "float32", "flat"]
    assert (whole.recall, whole.ndcg) == (1.0, 1.0)
    assert by_key[64, "int8", "flat"].recall > 0.95
    payload = 600 * 64
    for precision, size in (("float32", 4), ("int8", 1), ("binary", 1 / 8)):
        assert 0 <= by_key[64, precision, "flat"].index_bytes - payload * size < 2000
        assert by_key[32, precision, "flat"].index_bytes < 0.6 * payload * size + 1000
    assert by_key[16, "float32", "flat"].recall < by_key[32, "float32", "flat"].recall < 1
    unit = unit_rows(documents)
    index = _Index(faiss, "int8", "flat", unit)
    codes = faiss.vector_to_array(index.index.codes)
    ranges = np.stack([unit.min(axis=0), unit.max(axis=0)])
    expected = np.asarray(quantize_embeddings(unit, "int8", ranges=ranges)).astype(int) + 128
    np.testing.assert_array_equal(codes.reshape(600, 64), expected)


def test_storage_errors() -> None:
    pytest.importorskip("faiss")
    x = np.ones((12, 10), dtype=np.float32)
    with pytest.raises(DataError, match="needs 10 documents and a query at least, got 5 and 12"):
        storage_table(x[:5], x)
    with pytest.raises(DataError, match=r"widths must be in \[1, 10\], got \[11\]"):
        storage_table(x, x, dims=[11])
    rows = storage_table(x + np.eye(12, 10, dtype=np.float32), x, kinds=["flat"], repetitions=1)
    assert "binary" not in {r.precision for r in rows}  # no width fills bytes


def test_collection_of_texts(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"text {i}" for i in range(101)))
    collection = Collection.of_texts(file)
    assert collection.queries == ["text 0", "text 50", "text 100"]
    assert len(collection.documents) == 98
    assert not set(collection.queries) & set(collection.documents)


# Commands ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LM, a filtered model of it, and a little data."""
    place = tmp_path_factory.mktemp("place")
    tiny_lm(place / "lm")
    st_embfilter.save_pretrained(
        st_embfilter.from_causal_lm(place / "lm", keep=16, device="cpu", show_progress_bar=False),
        place / "filtered",
    )
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(14, 190, size=5)) for _ in range(120)]
    pairs = [f"{a},{b},{rng.random():.2f}" for a, b in zip(texts[::2], texts[1::2], strict=True)]
    (place / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(pairs))
    (place / "dev.csv").write_text("\n".join(pairs[::-1]))
    (place / "texts.txt").write_text("\n".join(texts))
    (place / "classes").mkdir()
    for name, part in (("train", texts[:80]), ("test", texts[80:])):
        lines = [f"{text},{'ab'[i % 2]}" for i, text in enumerate(part)]
        (place / "classes" / f"{name}.csv").write_text("text,label\n" + "\n".join(lines))
    return place


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(result: Result) -> str:
    return re.sub(r"[\s│]+", " ", result.output)


@pytest.mark.filterwarnings("ignore:'repr' attribute:Warning")
def test_eval(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["st-embfilter", "eval", "as asked"])
    files = [tmp_path / name for name in ("rows.jsonl", "rows.csv", "figure.png")]
    result = cli(
        "eval", place / "lm", "--sts", place / "pairs.csv", "--classification", place / "classes",
        "--keep", "1/2", "--keep", "4", "--cache", tmp_path / "cache",
        "--output", files[0], "--figure", files[2],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    for fact in ("pairs (all): cosine_spearman x 100, 60 units", "classes (test): accuracy x 100"):
        assert fact in text(result)
    assert "* needs data, fitted on the task's own texts" in text(result)
    rows = read_results(files[0])
    assert {(r.configuration, r.dims) for r in rows} >= {("raw", 32), ("bulk", 16), ("whiten", 4)}
    assert {r.command for r in rows} == {"st-embfilter eval 'as asked'"}
    assert list((tmp_path / "cache").rglob("*.npy"))
    assert files[2].stat().st_size > 10_000
    again = cli(
        "eval", place / "lm", "--sts", place / "pairs.csv", "--band", "offset:2", "--keep", "4",
        "--no-baselines", "--no-cache", "-q", "-o", files[1],
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert len(files[1].read_text().splitlines()) == 3


def test_results_that_are_no_text(tmp_path: Path) -> None:
    for content in (b"\xff\xfe{}", b'{"task": "\xff"}', b"\0\0", gzip.compress(b"{}")):
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl"):
            read_results(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="must be readable"):
        read_results(tmp_path)
    huge = {"task": "a", "dataset": "a", "split": "a", "metric": "a", "configuration": "a"}
    for key, value in (("dims", 10**30), ("units", 10**30), ("score", 10**400), ("score", -7)):
        row = {**huge, "dims": 4, "score": 0.5, key: value}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=f"line 1: .*{key}"):
            read_results(tmp_path / "rows.jsonl")


def test_eval_of_a_filtered_folder_leaves_results_for_its_card(place: Path) -> None:
    result = cli(
        "eval", place / "filtered", "--sts", place / "pairs.csv", "--no-baselines", "--no-cache"
    )
    assert result.exit_code == 0, result.output
    assert "results.jsonl" in text(result)
    rows = [json.loads(s) for s in (place / "filtered" / "results.jsonl").read_text().splitlines()]
    assert [(r["configuration"], r["dims"]) for r in rows] == [
        ("raw", 32),
        ("bulk", 16),
        ("bulk", 8),
        ("bulk", 4),
    ]


def test_an_interrupted_eval_keeps_older_results_and_what_was_measured(tmp_path: Path) -> None:
    from st_embfilter.cli.evaluate import save

    def interrupted() -> Iterator[Row]:
        yield row("new", "raw", 64, 0.3)
        raise KeyboardInterrupt

    older = save([row("old", "raw", 64, 0.3)], tmp_path / "rows.jsonl")
    with pytest.raises(KeyboardInterrupt):
        save(interrupted(), tmp_path / "rows.jsonl")
    assert read_results(tmp_path / "rows.jsonl") == older
    assert [r.task for r in read_results(tmp_path / "rows.partial.jsonl")] == ["new"]


def test_eval_search(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "windows.svg"
    result = cli(
        "eval", place / "lm", "--sts", place / "pairs.csv", "--dev", place / "dev.csv", "--search",
        "--no-cache", "--figure", figure, "--prompt", "{text} in a word", "--normalize",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Trust the held-out figure" in text(result)
    told = result.output.partition("Build it: ")[2].splitlines()[0]
    command = shlex.split(told.replace("FOLDER", shlex.quote(str(tmp_path / "m"))))
    built = cli(*command[1:])
    assert built.exit_code == 0, built.output
    model = st_embfilter.load(tmp_path / "m", device="cpu")
    layer = next(module for module in model if isinstance(module, st_embfilter.EmbedFilterLayer))
    assert layer.metadata.prompt is not None
    assert type(model[-1]).__name__ == "Normalize"
    assert figure.stat().st_size > 5000
    halves = cli("eval", place / "lm", "--sts", place / "pairs.csv", "--search", "--no-cache", "-q")
    assert halves.exit_code == 0, halves.output
    assert "pairs (all (half 2))" in text(halves)


def test_eval_at_several_depths(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure, output = tmp_path / "depths.svg", tmp_path / "rows.jsonl"
    result = cli(
        "eval", place / "lm", "--sts", place / "pairs.csv", "--layers", "all", "--keep", "1/2",
        "--no-baselines", "--no-cache", "--figure", figure, "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [(r.configuration, r.layers) for r in read_results(output)] == [
        (name, layers) for layers in (2, 1, 0) for name in ("raw", "bulk")
    ]
    assert "bulk, 1 blocks" in text(result)
    assert "blocks" in figure.read_text()


def test_eval_search_over_depth(place: Path, tmp_path: Path) -> None:
    figure = tmp_path / "windows.svg"
    result = cli(
        "eval", place / "lm", "--sts", place / "pairs.csv", "--dev", place / "dev.csv", "--search",
        "--layers", "0,1", "--no-cache", "-q", "--figure", figure,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "windows at 2 depths was chosen" in text(result)
    found = re.search(r"--band (offset:\d+) --keep (\d+) --layers ([01]) ", text(result))
    assert found
    built = cli(
        "build", place / "lm", "--band", found[1], "--keep", found[2], "--layers", found[3],
        "-o", tmp_path / "m",
    )  # fmt: skip
    assert built.exit_code == 0, built.output
    assert f"{found[3]} of 2 blocks" in text(built)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give data to measure on: --task or --preset"),
        (["--sts", "{place}/none.csv"], "the file must exist, got"),
        (["--sts", "{place}/texts.txt"], "a table must be a .csv or .tsv file"),
        (["--sts", "{place}/pairs.csv", "--dev", "{place}/dev.csv"], "--dev belongs to --search"),
        (["--sts", "{place}/pairs.csv", "--keep", "2.0"], "keep must be a ratio in (0, 1]"),
        (["--sts", "{place}/pairs.csv", "--band", "middle"], "a configuration must be one of raw"),
        (["--sts", "{place}/pairs.csv", "--prompt", "nonsense"], "prompt must be None"),
        (["--sts", "{place}/pairs.csv", "--layers", "0-6"], "--layers takes all, or numbers of"),
        (["--sts", "{place}/pairs.csv", "--layers", "0,3"], "layers must be from 0 to 2, got"),
        (["--sts", "{place}/pairs.csv", "--layers", "-1"], "layers must be from 0 to 2, got"),
    ],
)
def test_eval_errors(place: Path, arguments: list[str], message: str) -> None:
    result = cli("eval", place / "lm", "--no-cache", *(a.format(place=place) for a in arguments))
    assert result.exit_code != 0
    assert message in text(result)
    assert "Traceback" not in result.output


@pytest.mark.skipif(not HAS_MTEB, reason="the extra `eval` is not installed")
@pytest.mark.filterwarnings("ignore")  # of mteb and its dependencies
def test_eval_of_an_unknown_task(place: Path) -> None:
    result = cli("eval", place / "lm", "--task", "NoSuchTask", "--no-cache")
    assert result.exit_code == 1
    assert "a task must be one of MTEB's or a preset" in text(result)


def test_bench(place: Path) -> None:
    pytest.importorskip("faiss")
    for model, widths in (("lm", {"32", "16", "8", "4"}), ("filtered", {"16", "8", "4", "2"})):
        result = cli("bench", place / model, "--texts", place / "texts.txt", "-q")
        assert result.exit_code == 0, result.output
        shown = [re.split(r"\s*│\s*", line)[1:5] for line in result.output.splitlines()]
        rows = [cells for cells in shown if len(cells) == 4]
        assert {cells[0] for cells in rows} == widths
        assert {(cells[1], cells[2]) for cells in rows} >= {("float32", "flat"), ("int8", "hnsw")}
        assert max(map(len, result.output.splitlines())) <= 80
    assert cli("bench", place / "lm").exit_code == 2
