"""A filtered model is used as any other: threads, processes, compilers, dtypes, training."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

import st_embfilter
from st_embfilter.model.layer import FEATURE, filter_of
from tests import conftest
from tests.conftest import FLOAT32, ROOT, same, tiny_lm

# The tiny tokenizer makes no tokens of an empty text, which no backbone takes alone.
TEXTS = [text for text in conftest.TEXTS if text]

WORDS = ["glacier", "tea", "cup", "rates", "light", "sugar", "the", "of", "in", "is"]
PAIRS = Dataset.from_dict(
    {
        "anchor": [f"the {a} of {b}" for a, b in pairwise(WORDS)],
        "positive": [f"{b} is in {a}" for a, b in pairwise(WORDS)],
    }
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("use") / "lm"
    tiny_lm(folder)
    return folder


def build(lm: Path, *, bias: bool = False) -> SentenceTransformer:
    model = st_embfilter.from_causal_lm(lm, normalize=True, device="cpu", show_progress_bar=False)
    layer = filter_of(model)
    if bias:
        torch.manual_seed(0)
        layer.linear.bias = torch.randn(layer.out_features)
    return model


@pytest.fixture(scope="module")
def shared(lm: Path) -> SentenceTransformer:
    """Changed by no test."""
    return build(lm)


@pytest.fixture(scope="module")
def expected(shared: SentenceTransformer) -> np.ndarray:
    return shared.encode(TEXTS)


@pytest.fixture
def model(shared: SentenceTransformer) -> SentenceTransformer:
    return copy.deepcopy(shared)


def features_of(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return dict(model.preprocess(TEXTS))


def by_hand(model: SentenceTransformer, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """What backbone and pooling give, filtered in float32 and scaled."""
    layer = filter_of(model)
    pooled = model[1](model[0](dict(features)))[FEATURE]
    with torch.autocast("cpu", enabled=False):
        bias = layer.linear.bias
        y = pooled.float() @ layer.projection.T + (0 if bias is None else bias)
        return torch.nn.functional.normalize(y, dim=1)


# Threads and processes ---------------------------------------------------------------------------


def test_eight_threads_give_the_vectors_of_one(
    shared: SentenceTransformer, expected: np.ndarray
) -> None:
    def encode(i: int) -> float:
        text = i % len(TEXTS)
        return float(np.abs(shared.encode(TEXTS[text : text + 1])[0] - expected[text]).max())

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(encode, range(160))) <= FLOAT32


def test_a_pool_of_processes_gives_the_vectors_of_one(
    model: SentenceTransformer, expected: np.ndarray
) -> None:
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        assert same(model.encode(TEXTS, pool=pool, chunk_size=3), expected)
        cut = model.encode(TEXTS, pool=pool, truncate_dim=4, convert_to_tensor=True)
        assert same(cut.numpy(), expected[:, :4])
        with pytest.warns(DeprecationWarning, match="integrated into `encode`"):
            found = model.encode_multi_process(TEXTS, pool)
        assert same(found, expected)
    finally:
        model.stop_multi_process_pool(pool)
    assert same(model.encode(TEXTS), expected)


def test_a_list_of_devices_gives_the_vectors_of_one(
    model: SentenceTransformer, expected: np.ndarray
) -> None:
    assert same(model.encode(TEXTS, device=["cpu"]), expected)


FORK_AND_SPAWN = """
import multiprocessing, sys
import numpy as np
import torch
import st_embfilter

def answer(model, texts, queue):
    weight = torch.arange(600.0).sin().view(100, 6)
    layer = st_embfilter.build_filter(weight)  # numpy, scipy and threads after the fork
    queue.put((model.encode(texts), layer.projection.numpy()))

def load(folder, texts, queue):
    answer(st_embfilter.load(folder, device="cpu"), texts, queue)

def ask(method, target, *arguments):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=target, args=(*arguments, queue), daemon=True)
    process.start()
    result = queue.get(timeout=1800)  # guards against a hang, however slow the machine
    process.join()
    assert process.exitcode == 0
    return result

if __name__ == "__main__":
    lm, folder, output, *texts = sys.argv[1:]
    torch.set_num_threads(1)
    options = {"normalize": True, "device": "cpu", "show_progress_bar": False}
    model = st_embfilter.from_causal_lm(lm, **options)
    st_embfilter.save_pretrained(model, folder)
    model.encode(texts)  # whatever that starts, the fork has it without its threads
    forked = ask("fork", answer, model, texts)
    spawned = ask("spawn", load, folder, texts)
    np.savez(output, forked=forked[0], spawned=spawned[0], one=forked[1], two=spawned[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_and_spawned_processes_give_the_same_vectors(
    lm: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """In a process of its own: threads that other tests started do not survive a fork."""
    script, output = tmp_path / "script.py", tmp_path / "embeddings.npz"
    script.write_text(FORK_AND_SPAWN)
    subprocess.run(
        [sys.executable, script, lm, tmp_path / "saved", output, *TEXTS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    with np.load(output) as found:
        assert same(found["forked"], expected)
        assert same(found["spawned"], expected)
        assert np.array_equal(found["one"], found["two"])


def test_shared_memory_holds_the_filter_too(
    model: SentenceTransformer, expected: np.ndarray
) -> None:
    model.share_memory()
    assert filter_of(model).projection.is_shared()
    assert all(tensor.is_shared() for tensor in model.state_dict().values())
    assert same(model.encode(TEXTS), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_copies_and_pickles_of_a_whole_model(lm: Path, bias: bool) -> None:
    model = build(lm, bias=bias)
    ours = model.encode(TEXTS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(twin.encode(TEXTS), ours)
        layer = filter_of(twin)
        assert layer.metadata == filter_of(model).metadata
        assert torch.equal(layer.singular_values, filter_of(model).singular_values)
        layer.projection.zero_()
        assert same(model.encode(TEXTS), ours)


# Compilers and modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_compiles_to_one_graph(lm: Path, backend: str, bias: bool) -> None:
    torch.compiler.reset()
    layer = filter_of(build(lm, bias=bias))
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (2, 5):
            x = torch.randn(rows, layer.in_features).to(dtype).requires_grad_()
            y = compiled({FEATURE: x})[FEATURE]
            assert y.dtype == torch.float32
            assert same(y.detach(), layer({FEATURE: x})[FEATURE].detach())
            y.sum().backward()
            assert x.grad is not None
    torch.compiler.reset()


def test_a_compiled_model_gives_the_same_vectors(
    model: SentenceTransformer, expected: np.ndarray
) -> None:
    torch.compiler.reset()
    features = features_of(model)
    forward = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        found = forward(dict(features))[FEATURE].numpy()
    assert same(found, expected)
    model.compile(backend="eager")
    assert same(model.encode(TEXTS), expected)
    torch.compiler.reset()


def test_inference_mode_leaves_nothing_behind(lm: Path, expected: np.ndarray) -> None:
    model = build(lm)
    features = features_of(model)
    with torch.inference_mode():
        assert same(model.encode(TEXTS), expected)
        assert model(dict(features))[FEATURE].is_inference()
    found = model(dict(features))[FEATURE]
    found.square().sum(1)[0].backward()
    assert same(found.detach().numpy(), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_reaches_the_backbone_alone(lm: Path, bias: bool) -> None:
    model = build(lm, bias=bias)
    features = features_of(model)
    with torch.no_grad():
        plain = model(dict(features))[FEATURE]
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(dict(features))[FEATURE]
            filtered_by_hand = by_hand(model, features)
    assert cast.dtype == torch.float32
    assert same(cast, filtered_by_hand)
    assert (cast - plain).abs().max() > FLOAT32  # of 8 bits, far more than of 24


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to("cpu", torch.bfloat16),
        lambda model: model.to(torch.float16).to(torch.float32),
    ],
    ids=["half", "bfloat16", "double", "to", "there and back"],
)
def test_a_cast_model_still_filters_in_float32(
    lm: Path, cast: Callable[[SentenceTransformer], SentenceTransformer], bias: bool
) -> None:
    model = build(lm, bias=bias)
    before = filter_of(model).weights()
    dtype = next(cast(model)[0].parameters()).dtype
    after = filter_of(model).weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(value.dtype == torch.float32 for value in after.values())
    features = features_of(model)
    with torch.no_grad():
        hidden = model[0](dict(features))["token_embeddings"]
        found = model(dict(features))[FEATURE]
        assert hidden.dtype == dtype
        assert found.dtype == torch.float32
        assert same(found, by_hand(model, features))


# Training ----------------------------------------------------------------------------------------


def train(model: SentenceTransformer, folder: Path) -> SentenceTransformerTrainer:
    width = filter_of(model).out_features
    loss = MatryoshkaLoss(
        model, MultipleNegativesRankingLoss(model), [width, width // 2, width // 4]
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=PAIRS,
        loss=loss,
    )
    trainer.train()
    return trainer


def test_training_moves_the_backbone_and_never_the_filter(
    model: SentenceTransformer, expected: np.ndarray, tmp_path: Path
) -> None:
    layer = filter_of(model)
    weights = layer.weights()["linear.weight"].clone()
    before = {name: value.clone() for name, value in model[0].named_parameters()}
    trainer = train(model, tmp_path / "run")
    assert filter_of(model) is layer
    assert torch.equal(layer.projection, weights)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model[0].parameters()}
    for name, value in model[0].named_parameters():
        assert not torch.equal(value, before[name]), name
    assert not same(model.encode(TEXTS), expected, 1e-2)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    for again in (
        SentenceTransformer(str(saved), device="cpu"),
        st_embfilter.load(saved, device="cpu"),
    ):
        assert same(again.encode(TEXTS), model.encode(TEXTS))


def test_matryoshka_sees_the_smaller_filters(lm: Path, model: SentenceTransformer) -> None:
    """Its loss is the sum of the losses of separately built filters of these widths."""
    inner = MultipleNegativesRankingLoss(model)
    batch = [dict(model.preprocess(list(PAIRS[name]))) for name in ("anchor", "positive")]
    labels = torch.arange(len(PAIRS))
    with torch.no_grad():
        total = MatryoshkaLoss(model, inner, [16, 8, 4])(copy.deepcopy(batch), labels)
        parts = []
        for width in (16, 8, 4):
            small = st_embfilter.from_causal_lm(lm, keep=width, normalize=True, device="cpu")
            alone = MultipleNegativesRankingLoss(small)
            parts.append(float(alone(copy.deepcopy(batch), labels)))
    assert len({round(part, 3) for part in parts}) == 3
    assert float(total) == pytest.approx(sum(parts), rel=FLOAT32, abs=FLOAT32)


def test_a_backbone_that_was_trained_in_part_is_saved_as_it_is(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    """Only some rows of one matrix move, none of them the first."""
    before = model.encode(TEXTS)
    with torch.no_grad():
        model[0].auto_model.embed_tokens.weight[9:] += 0.5
    assert not same(model.encode(TEXTS), before, 1e-3)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert same(SentenceTransformer(str(saved), device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_a_larger_vocabulary_is_saved_with_the_backbone(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    model.tokenizer.add_tokens(["moraine"])
    model[0].auto_model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    texts = ["the moraine of the glacier", *TEXTS]
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert same(SentenceTransformer(str(saved), device="cpu").encode(texts), model.encode(texts))
