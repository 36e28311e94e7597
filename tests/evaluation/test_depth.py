"""Depths from one encoding: the vectors of cut models, and one pass for all of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import st_embfilter
from st_embfilter.errors import DepthError
from st_embfilter.evaluation.baselines import Configuration
from st_embfilter.evaluation.depth import DepthStore
from st_embfilter.evaluation.search import search_window
from st_embfilter.evaluation.sweep import raw_model, sweep, without_filter
from st_embfilter.evaluation.tasks import STSTask, TaskInfo
from tests.conftest import DEMO_LM, TEXTS, MakeLM, same

PAIRS = [("the tea", "the cup", 1.0), ("light", "sugar rates", 0.5), ("tea", "tea .", 2.0)] * 3


@pytest.mark.parametrize("recipe", [None, "prompteol", "echo"])
def test_every_depth_is_that_of_the_cut_model(recipe: str | None) -> None:
    options: dict[str, Any] = {"prompt": recipe, "device": "cpu", "show_progress_bar": False}
    whole = without_filter(st_embfilter.from_causal_lm(DEMO_LM, **options))
    store = DepthStore(whole, [1, 4, 6], show_progress_bar=False)
    assert store.layers == [6, 4, 1]
    for layers in store.layers:
        cut = without_filter(st_embfilter.from_causal_lm(DEMO_LM, layers=layers, **options))
        expected = cut.encode(TEXTS)
        found = store.at(layers).encode(TEXTS)
        assert same(found, expected)
    if recipe is None:
        last = without_filter(
            st_embfilter.from_causal_lm(DEMO_LM, layers=4, pooling="lasttoken", **options)
        ).encode(TEXTS)
        found = store.at(4, "lasttoken").encode(TEXTS)
        assert same(found, last)


def test_one_pass_for_all_depths_and_none_for_what_is_cached(tmp_path: Path) -> None:
    model = without_filter(
        st_embfilter.from_causal_lm(DEMO_LM, device="cpu", show_progress_bar=False)
    )
    passes = []
    backbone: Any = model[0].auto_model
    hook = backbone.layers[0].register_forward_hook(lambda *_: passes.append(1))
    store = DepthStore(model, range(7), cache=tmp_path, show_progress_bar=False)
    passes.clear()
    for layers in store.layers:
        store.at(layers).encode(TEXTS)
    assert len(passes) == 1
    again = DepthStore(model, [0, 3], cache=tmp_path, show_progress_bar=False)
    passes.clear()
    again.at(3).encode(TEXTS)
    assert not passes
    hook.remove()


def test_rows_carry_their_depth(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    raw = raw_model(folder, device="cpu", show_progress_bar=False)
    info = TaskInfo("pairs", "STS", "pairs", "test", "cosine_spearman")
    rows = list(
        sweep(
            raw,
            [STSTask(info, PAIRS)],
            [Configuration("bulk", 0.5)],
            layers="all",
            resamples=0,
            show_progress_bar=False,
        )
    )
    assert [(row.configuration, row.layers) for row in rows] == [
        (name, layers) for layers in (2, 1, 0) for name in ("raw", "bulk")
    ]
    assert rows[0].delta == 0


def test_search_finds_the_planted_depth_and_window(make_lm: MakeLM) -> None:
    folder, _ = make_lm(num_hidden_layers=3)
    model = st_embfilter.from_causal_lm(
        folder, layers=1, keep=8, band="offset:8", device="cpu", show_progress_bar=False
    )
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(14, 180, size=4)) for _ in range(160)]
    unit = model.encode(texts, normalize_embeddings=True)
    scores = (unit[::2] * unit[1::2]).sum(axis=1)
    pairs = list(zip(texts[::2], texts[1::2], map(float, scores), strict=True))
    task = STSTask(TaskInfo("pairs", "STS", "pairs", "test", "cosine_spearman"), pairs)
    sides = [[half] for half in task.halves()]
    raw = raw_model(folder, device="cpu", show_progress_bar=False)
    options: dict[str, Any] = {"offsets": [0, 8, 16], "widths": [8, 16], "show_progress_bar": False}
    found = search_window(raw, *sides, layers="all", **options)
    assert (found.layers, str(found.band), found.band.keep) == (1, "offset:8", 8)
    assert (found.windows, found.depths) == (6, 4)
    assert {row.split for row in found.held_out} == {"test (half 2)"}
    assert [(row.configuration, row.layers) for row in found.held_out] == [
        (name, layers) for layers in (3, 1) for name in ("raw", "bulk", "offset:8")
    ]
    chosen = found.held_out[-1]
    assert chosen.score > 1 - 1e-6
    assert f"Trust the held-out figure: {100 * chosen.delta:+.2f}" in found.warning
    assert f"{100 * found.held_out[1].delta:+.2f} after all blocks" in found.warning
    # The whole model is measured, but was no choice.
    other = search_window(raw, *sides, layers=[2], **options)
    assert other.layers == 2


def test_depths_that_a_search_cannot_choose(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    tasks = [
        STSTask(TaskInfo("pairs", "STS", "pairs", split, "cosine_spearman"), PAIRS)
        for split in ("dev", "test")
    ]
    options: dict[str, Any] = {"widths": [16], "show_progress_bar": False}
    raw = raw_model(folder, prompt="prompteol", device="cpu", show_progress_bar=False)
    with pytest.raises(DepthError, match=r"needs depths from 1 to 2, got \[0, 1\]; without blocks"):
        search_window(raw, [tasks[0]], [tasks[1]], layers=[0, 1], **options)
    found = search_window(raw, [tasks[0]], [tasks[1]], layers="all", **options)
    assert {row.layers for row in found.scan} == {1, 2}


def test_a_recipe_of_several_passes_and_depths_that_are_not_there(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    options: dict[str, Any] = {"device": "cpu", "show_progress_bar": False}
    several: SentenceTransformer = without_filter(
        st_embfilter.from_causal_lm(folder, prompt="metaeol", **options)
    )
    with pytest.raises(DepthError, match="in one pass of the model"):
        DepthStore(several, [1], show_progress_bar=False).at(1).encode(["tea"])
    plain = without_filter(st_embfilter.from_causal_lm(folder, **options))
    with pytest.raises(DepthError, match=r"layers must be from 0 to 2, got \[3\]"):
        DepthStore(plain, [3])
