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
from st_embfilter.evaluation.sweep import raw_model, sweep, without_filter
from st_embfilter.evaluation.tasks import STSTask, TaskInfo
from tests.conftest import DEMO_LM, TEXTS, MakeLM

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
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    if recipe is None:
        last = without_filter(
            st_embfilter.from_causal_lm(DEMO_LM, layers=4, pooling="lasttoken", **options)
        ).encode(TEXTS)
        found = store.at(4, "lasttoken").encode(TEXTS)
        assert np.abs(found - last).max() <= 1e-5 * np.abs(last).max()


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
