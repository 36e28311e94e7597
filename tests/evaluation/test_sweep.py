"""Sweeps: one encoding, honest baselines, the scores of saved models, resumable, searchable."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import st_embfilter
from st_embfilter.cli.evaluate import configurations
from st_embfilter.errors import BandError, DataError, EmbedFilterError
from st_embfilter.evaluation import vectors
from st_embfilter.evaluation.baselines import Configuration, Transform, baseline_names, grid
from st_embfilter.evaluation.bootstrap import Outcome, mean_statistic
from st_embfilter.evaluation.demo import DEMO_TEXTS, Paraphrases
from st_embfilter.evaluation.search import search_window, windows
from st_embfilter.evaluation.sweep import (
    Filtered,
    RawModel,
    default_configurations,
    raw_model,
    sweep,
    without_filter,
)
from st_embfilter.evaluation.tasks import RetrievalTask, STSTask, TaskInfo
from st_embfilter.evaluation.vectors import Encoder, VectorStore, fingerprint
from st_embfilter.saved.results import Result, read_results, results_frame, write_results
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.spectrum import Spectrum
from tests.conftest import DEMO_LM, FLOAT32, FLOAT64, MakeLM, same

DATA = Paraphrases.read(DEMO_TEXTS)
D = 32


class Stub(torch.nn.Module):
    """Stands for a SentenceTransformer whose vectors are planted; counts what it encodes."""

    max_seq_length = 512
    prompts = None
    default_prompt_name = None
    truncate_dim = None
    tokenizer = "none"

    def __init__(self, table: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.table = table
        self.encoded: list[str] = []
        self.fail_after = math.inf

    def get_embedding_dimension(self) -> int:
        return D

    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        if len(self.encoded) + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.encoded += texts
        return np.stack([self.table[text] for text in texts]).astype(np.float32)

    encode_query = encode_document = encode


def planted(seed: int = 0, pairs: int = 300) -> tuple[RawModel, list[tuple[str, str, float]]]:
    """Similarity lives in singular directions 8 to 15 of 32; the others are louder noise."""
    rng = np.random.default_rng(seed)
    directions = torch.linalg.qr(torch.from_numpy(rng.standard_normal((D, D))))[0]
    loudness = np.where((np.arange(D) >= 8) & (np.arange(D) < 16), 1.0, 1.2)
    table: dict[str, np.ndarray] = {}
    rows = []
    for i in range(pairs):
        score = rng.random()
        first = rng.standard_normal(D)
        second = rng.standard_normal(D)
        second[8:16] = score * first[8:16] + (1 - score) * second[8:16]
        for name, value in ((f"a{i}", first), (f"b{i}", second)):
            table[name] = (value * loudness) @ directions.numpy()
        rows.append((f"a{i}", f"b{i}", score))
    spectrum = Spectrum(torch.linspace(2, 1, D, dtype=torch.float64), directions)
    return RawModel(Stub(table), spectrum, "planted"), rows  # type: ignore[arg-type]


def sts(rows: list[tuple[str, str, float]], name: str = "sts", split: str = "test") -> STSTask:
    return STSTask(TaskInfo(name, "STS", name, split, "cosine_spearman"), rows)


def run(raw: RawModel, tasks: Sequence[Any], *args: Any, **options: Any) -> list[Result]:
    return list(sweep(raw, tasks, *args, show_progress_bar=False, **options))


def score_by_ranks(task: STSTask, encoder: Any) -> float:
    """A score, after a look at what it hangs on: vectors that differ by rounding swap no ranks.

    Two vectors that move by FLOAT32 of their length move their cosine by twice that, and the
    distance of two cosines by four times.
    """
    left, right = (np.asarray(encoder.encode([row[i] for row in task.pairs])) for i in (0, 1))
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = np.sort(np.einsum("ij,ij->i", left, right, dtype=np.float64) / lengths)
    assert np.diff(cosines).min() > 4 * FLOAT32
    return task.run(encoder).score


# Scores ------------------------------------------------------------------------------------------


def test_scores_are_those_of_saved_models(saved_demo: Path, tmp_path: Path) -> None:
    texts = DATA.texts[:80:2]
    rng = np.random.default_rng(0)
    task = sts([(a, b, rng.random()) for a, b in zip(texts[::2], texts[1::2], strict=True)])
    kept = [Configuration("bulk", 1 / 2), Configuration("bulk", 1 / 4), Configuration("edges", 50)]
    raw = raw_model(DEMO_LM, device="cpu", show_progress_bar=False)
    rows = run(raw, [task], kept, resamples=10)
    st_embfilter.save_pretrained(
        st_embfilter.from_causal_lm(
            DEMO_LM, keep=50, band="edges", device="cpu", show_progress_bar=False
        ),
        tmp_path / "edges",
    )

    class Plain:
        """The ordinary way: a model that plain sentence-transformers loads."""

        def __init__(self, folder: Path, dims: int | None = None) -> None:
            self.model = SentenceTransformer(str(folder), truncate_dim=dims, device="cpu")

        def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
            return self.model.encode(list(texts), show_progress_bar=False)

    plain = [Plain(saved_demo), Plain(saved_demo, 64), Plain(tmp_path / "edges")]
    for row, encoder in zip(rows[1:], plain, strict=True):
        assert row.score == pytest.approx(score_by_ranks(task, encoder), abs=FLOAT64)
    assert [(row.configuration, row.dims, row.start) for row in rows] == [
        ("raw", 256, None),
        ("bulk", 128, 64),
        ("bulk", 64, 96),
        ("edges", 50, None),
    ]
    assert {(row.model, row.pooling, row.max_seq_length) for row in rows} == {
        ("openstax-lm", "mean", 512)
    }


def test_the_folder_of_a_filtered_model_brings_its_settings(saved_demo: Path) -> None:
    of_lm = raw_model(DEMO_LM, device="cpu", show_progress_bar=False)
    of_folder = raw_model(saved_demo, device="cpu", show_progress_bar=False)
    assert of_folder.layer is not None
    assert (of_folder.layer.metadata.band, of_lm.layer) == (Band("bulk", 0.5), None)
    assert torch.equal(of_folder.spectrum.directions, of_lm.spectrum.directions)
    assert fingerprint(of_folder.model) == fingerprint(of_lm.model)
    unit = st_embfilter.from_causal_lm(
        DEMO_LM, normalize=True, device="cpu", show_progress_bar=False
    )
    assert len(list(without_filter(unit).children())) == 2


def test_bands_of_a_folded_norm_are_those_of_saved_models(tmp_path: Path) -> None:
    texts = DATA.texts[:80:2]
    rng = np.random.default_rng(0)
    task = sts([(a, b, rng.random()) for a, b in zip(texts[::2], texts[1::2], strict=True)])
    model = st_embfilter.from_causal_lm(
        DEMO_LM, keep=0.5, norm="folded", device="cpu", show_progress_bar=False
    )
    folder = st_embfilter.save_pretrained(model, tmp_path / "folded")
    kept = [Configuration("folded", 1 / 2), Configuration("bulk", 1 / 2)]
    for raw in (
        raw_model(DEMO_LM, folded=True, device="cpu", show_progress_bar=False),
        raw_model(folder, device="cpu", show_progress_bar=False),
    ):
        _, folded, bulk = run(raw, [task], kept, resamples=0)
        assert (folded.configuration, folded.start) == ("folded", 64)
        assert folded.score == pytest.approx(score_by_ranks(task, model), abs=FLOAT64)
        assert abs(folded.score - bulk.score) > 1e-3
    assert [c.name for c in configurations(raw, None, [], False)] == ["folded"] * 3
    assert Configuration("folded:offset:7", 4).bands() == [Band("offset", 4, offset=7)]
    plain = raw_model(DEMO_LM, device="cpu", show_progress_bar=False)
    with pytest.raises(BandError, match="'folded' needs the spectrum of a folded norm"):
        run(plain, [task], kept)


def test_raw_is_measured_once_and_first_and_differences_are_to_it() -> None:
    raw, rows = planted()
    found = run(raw, [sts(rows)], [Configuration("bulk", 8), Configuration("raw")])
    assert [row.configuration for row in found] == ["raw", "bulk"]
    assert (found[0].delta, found[0].delta_low, found[0].delta_high) == (0.0, 0.0, 0.0)
    assert found[1].delta == found[1].score - found[0].score
    for row in found:
        assert row.low is not None
        assert row.high is not None
        assert row.low < row.score < row.high


def test_a_verdict_needs_an_interval() -> None:
    raw, rows = planted()
    inside = Configuration("offset:8", 8)
    outside = Configuration("secondary", 8)
    found = {r.configuration: r for r in run(raw, [sts(rows)], [inside, outside])}
    assert found["offset:8"].verdict == "+"
    assert found["secondary"].verdict == "-"
    assert found["raw"].verdict == "="
    bare = run(raw, [sts(rows)], [inside], resamples=0)
    assert {row.verdict for row in bare} == {"?"}


def test_random_is_a_mean_over_seeds() -> None:
    raw, rows = planted()
    singles = [Configuration(f"random:{seed}", 8) for seed in range(3)]
    *rest, mean = run(raw, [sts(rows)], [*singles, Configuration("random", 8, seeds=(0, 1, 2))])
    scores = [row.score for row in rest[1:]]
    assert mean.score == pytest.approx(np.mean(scores))
    assert mean.std == pytest.approx(np.std(scores, ddof=1))
    assert rest[1].std is None


def test_retrieval_by_hand() -> None:
    task = RetrievalTask(
        TaskInfo("r", "Retrieval", "r", "test", "ndcg_at_10"),
        {"d1": "x", "d2": "y", "d10": "z"},
        {"q1": "u", "q2": "v"},
        {"q1": {"d1": 2, "d2": 1}, "q2": {"d2": 1}},
    )
    table = {"x": [1, 0], "y": [1, 0], "z": [0, 1], "u": [2, 0], "v": [0, 3]}
    stub = Stub({text: np.array(value, dtype=float) for text, value in table.items()})
    encoder = Filtered(VectorStore(stub, show_progress_bar=False), Transform())  # type: ignore[arg-type]
    # q1 ranks the tied d1 and d2 by descending id: d2, d1. q2 finds d10, then d2, d1.
    first = (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3))
    second = 1 / math.log2(3)
    assert task.run(encoder).score == pytest.approx((first + second) / 2)


def test_a_calibrated_model_is_measured_as_it_is(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    texts = [f"w{20 + i} w{170 - i}" for i in range(60)]
    model = st_embfilter.from_causal_lm(
        folder, keep=8, calibrate=texts, device="cpu", show_progress_bar=False
    )
    saved = st_embfilter.save_pretrained(model, folder.with_name("calibrated"))
    raw = raw_model(saved, device="cpu", show_progress_bar=False)
    store = VectorStore(raw.model, show_progress_bar=False)
    for k in (8, 4):
        (transform,) = Configuration("calibrated", k).transforms(raw.spectrum, layer=raw.layer)
        plain = SentenceTransformer(str(saved), truncate_dim=k, device="cpu")
        assert same(Filtered(store, transform).encode(texts), plain.encode(texts))
    with pytest.raises(BandError, match="'calibrated' at 9 dimensions must be"):
        Configuration("calibrated", 9).transforms(raw.spectrum, layer=raw.layer)


# Baselines ---------------------------------------------------------------------------------------


def fitted(name: str, keep: float | int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A sample and what a fitted baseline makes of it."""
    raw, _ = planted()
    rng = np.random.default_rng(1)
    mixing = rng.standard_normal((D, D)) * np.linspace(3, 0.2, D)
    sample = (rng.standard_normal((400, D)) @ mixing + 5).astype(np.float32)
    (transform,) = Configuration(name, keep).transforms(raw.spectrum, sample)
    return sample, transform(sample)


def test_whitened_texts_have_unit_covariance() -> None:
    _, white = fitted("whiten", 12)
    # Of vectors in float32, through a map with a condition number of about 10.
    np.testing.assert_allclose(np.cov(white.T), np.eye(12), atol=10 * FLOAT32)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=10 * FLOAT32)


def test_pca_keeps_the_most_variance_that_a_width_can() -> None:
    sample, reduced = fitted("pca", 12)
    best = np.linalg.eigvalsh(np.cov(sample.T))[::-1][:12]
    length = np.square(sample, dtype=np.float64).sum(axis=1).mean()
    np.testing.assert_allclose(np.cov(reduced.T), np.diag(best), rtol=0, atol=FLOAT32 * length)


def test_centring_and_all_but_the_top() -> None:
    sample, centred = fitted("centre")
    assert same(centred, sample - sample.mean(axis=0))
    _, rest = fitted("all-but-the-top")
    before, after = (np.linalg.eigvalsh(np.cov(x.T))[::-1] for x in (sample, rest))
    length = np.square(sample, dtype=np.float64).sum(axis=1).mean()
    np.testing.assert_allclose(after, [*before[1:], 0], rtol=0, atol=FLOAT32 * length)


def test_baselines_that_need_data_say_so_and_need_enough() -> None:
    raw, rows = planted(pairs=5)
    found = run(raw, [sts(rows)], grid(["whiten", "pca", "bulk"], [4, 16]), resamples=10)
    assert [(row.configuration, row.dims, row.needs_data) for row in found] == [
        ("raw", D, False),
        ("whiten", 4, True),  # 10 texts do not suffice for 16 dimensions
        ("pca", 4, True),
        ("bulk", 4, False),
        ("bulk", 16, False),
    ]
    assert {row.fitted_on for row in found} == {None, "the task's own texts"}
    with pytest.raises(DataError, match="whiten to 16 dimensions must be fitted on at least 17"):
        Configuration("whiten", 16).transforms(raw.spectrum, np.zeros((16, D), dtype=np.float32))


def test_a_measured_order_is_a_configuration() -> None:
    raw, rows = planted()
    order = (*range(8, 16), *range(8), *range(16, D))
    found = run(
        raw, [sts(rows)], [Configuration("optimal", 8, order=order), Configuration("offset:8", 8)]
    )
    assert found[1].score == found[2].score
    assert (found[1].needs_data, found[1].fitted_on) == (True, "token counts")
    with pytest.raises(BandError, match="is measured on a model"):
        Configuration("optimal", 8)


def test_what_is_fitted_on_a_task_is_fitted_on_that_task_alone() -> None:
    raw, rows = planted()
    tasks = [sts(rows[:150], "first"), sts(rows[150:], "second")]
    together = run(raw, tasks, [Configuration("centre")])
    apart = [row for task in tasks for row in run(raw, [task], [Configuration("centre")])]
    assert together == apart


def test_truncation_keeps_the_first_coordinates() -> None:
    raw, _ = planted()
    x = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32)
    (transform,) = Configuration("truncate", 8).transforms(raw.spectrum)
    np.testing.assert_array_equal(transform(x), x[:, :8])


def test_given_texts_are_what_is_fitted_on() -> None:
    raw, rows = planted()
    others = [first for first, _, _ in rows[:100]]
    row = run(raw, [sts(rows[100:])], [Configuration("centre")], fit_texts=others)[1]
    assert row.fitted_on == "100 given texts"
    store = VectorStore(raw.model, show_progress_bar=False)
    (transform,) = Configuration("centre").transforms(raw.spectrum, store.encode(others))
    assert row.score == sts(rows[100:]).run(Filtered(store, transform)).score


def test_unit_length_comes_last() -> None:
    raw, _ = planted()
    x = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32)
    for name in ("raw", "truncate", "bulk"):
        keep = None if name == "raw" else 8
        (transform,) = Configuration(name, keep).transforms(raw.spectrum, normalize=True)
        np.testing.assert_allclose(np.linalg.norm(transform(x), axis=1), 1, atol=FLOAT32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("middle", 0.5), "a configuration must be one of raw, truncate, centre"),
        (("bulk",), "keep= belongs to the methods that reduce the width, got None for 'bulk'"),
        (("raw", 0.5), "keep= belongs to the methods that reduce the width, got 0.5 for 'raw'"),
        (("pca", 1.5), "keep must be a ratio in (0, 1] or an int >= 1, got 1.5"),
        (("offset:x", 0.5), "band must look like 'bulk', 'offset:128' or 'random:7'"),
    ],
)
def test_bad_configurations(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BandError) as caught:
        Configuration(*arguments)
    assert message in str(caught.value)


def test_one_that_does_not_fit_fails_before_any_encoding() -> None:
    raw, rows = planted()
    with pytest.raises(BandError, match="offset \\+ k must be at most 32"):
        run(raw, [sts(rows)], [Configuration("offset:30", 8)])
    assert raw.model.encoded == []


# One encoding ------------------------------------------------------------------------------------


def test_a_sweep_encodes_every_text_once() -> None:
    raw, rows = planted()
    chosen = default_configurations()
    assert len(chosen) > 20
    assert {c.name for c in chosen} == {"bulk", *baseline_names()}
    run(raw, [sts(rows)], chosen, resamples=5)
    stub: Any = raw.model
    assert sorted(stub.encoded) == sorted({text for a, b, _ in rows for text in (a, b)})


def test_the_cache_serves_a_second_run(tmp_path: Path) -> None:
    raw, rows = planted()
    stub: Any = raw.model
    first = run(raw, [sts(rows)], [Configuration("bulk", 8)], cache=tmp_path)
    count = len(stub.encoded)
    assert run(raw, [sts(rows)], [Configuration("bulk", 8)], cache=tmp_path) == first
    assert len(stub.encoded) == count


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "CHUNK", 50)
    raw, rows = planted()
    stub: Any = raw.model
    stub.fail_after = 220
    with pytest.raises(KeyboardInterrupt):
        run(raw, [sts(rows)], [Configuration("bulk", 8)], cache=tmp_path)
    assert len(stub.encoded) == 200
    stub.fail_after = math.inf
    run(raw, [sts(rows)], [Configuration("bulk", 8)], cache=tmp_path)
    assert len(stub.encoded) == len(set(stub.encoded)) == 600


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def nan(good: np.ndarray) -> np.ndarray:
    good[3, 5] = np.nan
    return good


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "nonsense": lambda data: b"\x93NUMPY nonsense",
    "cut off": lambda data: data[:-100],
    "header": lambda data: data.replace(b"'shape'", b"'sh\0pe'"),
    "deep header": lambda data: data[:10] + b"(" * (len(data) - 10),
    "NaN": lambda data: npy(nan(np.load(io.BytesIO(data)))),
    "infinity": lambda data: npy(np.full_like(np.load(io.BytesIO(data)), np.inf)),
    "fewer rows": lambda data: npy(np.load(io.BytesIO(data))[:-1]),
    "another width": lambda data: npy(np.load(io.BytesIO(data))[:, :-1]),
    "one axis": lambda data: npy(np.load(io.BytesIO(data))[:, 0]),
    "a number": lambda data: npy(np.float32(3)),
    "another dtype": lambda data: npy(np.load(io.BytesIO(data)).astype(np.float64) + 1),
    "integers": lambda data: npy(np.load(io.BytesIO(data)).astype(np.int64)),
    "text": lambda data: npy(np.load(io.BytesIO(data)).astype(str)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_file_is_made_anew(tmp_path: Path, kind: str) -> None:
    raw, rows = planted()
    first = run(raw, [sts(rows)], [Configuration("bulk", 8)], cache=tmp_path)
    files = sorted(tmp_path.rglob("*.npy"))
    for file in files:
        file.write_bytes(DAMAGES[kind](file.read_bytes()))
    assert run(raw, [sts(rows)], [Configuration("bulk", 8)], cache=tmp_path) == first
    assert np.isfinite(np.load(files[0])).all()  # and written anew


def test_the_cache_knows_models_apart(make_lm: MakeLM) -> None:
    folder, _ = make_lm()

    def of(**options: Any) -> SentenceTransformer:
        return raw_model(folder, device="cpu", show_progress_bar=False, **options).model

    model = of()
    hashes = [fingerprint(of()), fingerprint(of(pooling="lasttoken"))]
    hashes.append(fingerprint(of(max_seq_length=8)))
    model.encode(["a text"])  # leaves truncation behind in the tokenizer
    assert fingerprint(model) == hashes[0]
    model.prompts = {"query": "q: "}
    hashes.append(fingerprint(model))
    changed = of()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    hashes.append(fingerprint(changed))
    padded = of()
    padded.tokenizer.padding_side = "left"
    hashes.append(fingerprint(padded))
    assert len(set(hashes)) == len(hashes)


def test_vectors_must_be_finite() -> None:
    stub: Any = Stub({"fine": np.ones(D), "bad": np.full(D, np.nan)})
    store = VectorStore(stub, show_progress_bar=False)
    with pytest.raises(EmbedFilterError, match="must be finite, got NaN or Inf for the text 'bad'"):
        store.encode(["fine", "bad"])


def test_order_repetitions_and_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "CHUNK", 2)
    table = {text: np.full(D, i, dtype=float) for i, text in enumerate(("bb", "a", "ccc"))}
    stub: Any = Stub(table)
    store = VectorStore(stub, show_progress_bar=False)
    assert store.encode(["a", "ccc", "a", "bb"])[:, 0].tolist() == [1, 2, 1, 0]
    assert stub.encoded == ["ccc", "bb", "a"]
    store.encode(["a", "ccc", "a", "bb"])
    assert len(stub.encoded) == 3
    store.encode(["a"], method="encode_query")
    store.encode(["a"], prompt="x: ")
    assert len(stub.encoded) == 5


# Rows --------------------------------------------------------------------------------------------


def test_rows_survive_their_files(tmp_path: Path) -> None:
    raw, rows = planted()
    found = run(raw, [sts(rows)], [Configuration("bulk", 8), Configuration("centre")])
    write_results(found, tmp_path / "deep" / "results.jsonl")
    assert read_results(tmp_path / "deep" / "results.jsonl") == found
    lines = (tmp_path / "deep" / "results.jsonl").read_text().splitlines()
    keys = {"task", "dataset", "split", "metric", "dims", "score", "delta", "configuration"}
    assert keys <= set(json.loads(lines[0]))
    write_results(found, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as stream:
        assert [float(row["score"]) for row in csv.DictReader(stream)] == [r.score for r in found]
    pytest.importorskip("pandas")
    frame = results_frame(found)
    assert frame.set_index("configuration").loc["bulk", "delta"] == found[1].delta
    (tmp_path / "bad.jsonl").write_text(lines[0] + '\n{"task": "x"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl line 2: a result needs a valid 'dataset'"):
        read_results(tmp_path / "bad.jsonl")


# Window search -----------------------------------------------------------------------------------


def test_search_finds_the_planted_window() -> None:
    raw, rows = planted(pairs=600)
    first, second = sts(rows).halves()
    assert not {a for a, _, _ in first.pairs} & {a for a, _, _ in second.pairs}
    assert len(first.pairs) + len(second.pairs) == 600
    found = search_window(
        raw, [first], [second], offsets=range(0, 32, 4), widths=[8, 16], show_progress_bar=False
    )
    assert (found.band.family, found.band.offset, found.band.keep) == ("offset", 8, 8)
    assert found.windows == 8 - 1 + 5
    assert [row.configuration for row in found.held_out] == ["raw", "bulk", "offset:8"]
    assert {row.split for row in found.held_out} == {"test (half 2)"}
    assert found.held_out[2].verdict == "+"
    assert "Trust the held-out figure" in found.warning
    assert all(row.delta_low is None for row in found.scan)


def test_search_on_noise_does_not_keep_its_promise() -> None:
    """The best of many windows on pure noise gains where it was chosen, and not elsewhere."""
    raw, rows = planted(pairs=400)
    rng = np.random.default_rng(5)
    noise = sts(
        [(a, b, rng.random()) for (a, _, _), (_, b, _) in zip(rows, rows[::-1], strict=True)]
    )
    found = search_window(raw, *([half] for half in noise.halves()), show_progress_bar=False)
    chosen = max(row.delta for row in found.scan)
    assert chosen > 0.03
    assert found.held_out[2].delta < chosen
    assert found.held_out[2].verdict != "+"


def test_bad_searches() -> None:
    raw, rows = planted()
    task = sts(rows)
    with pytest.raises(DataError, match="needs development tasks and other, held-out tasks"):
        search_window(raw, [task], [task])
    with pytest.raises(DataError, match="needs development tasks"):
        search_window(raw, [], [task])
    with pytest.raises(BandError, match="offset \\+ width must be at most 32 for one window"):
        windows(D, [30], [8])
    with pytest.raises(DataError, match="at least 4 units to be cut into halves, got 3"):
        replace(task, pairs=rows[:3]).halves()


def test_any_object_with_run_is_a_task() -> None:
    class Mine:
        info = TaskInfo("mine", "Mine", "mine", "test", "norm")

        def run(self, encoder: Encoder) -> Outcome:
            return Outcome.of(((1,), mean_statistic([float(encoder.encode(["a0"]).shape[1])])))

    raw, _ = planted()
    assert [row.score for row in run(raw, [Mine()], [Configuration("bulk", 8)])] == [D, 8]
