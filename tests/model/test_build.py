"""Filtered models: built, stacked, loaded; the same for every batch and dtype."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)

import st_embfilter
from st_embfilter.errors import (
    BandError,
    FormatError,
    PlacementError,
    PromptError,
    ShapeError,
    UnembeddingError,
)
from st_embfilter.model import filter_files
from st_embfilter.model.backbone import TEXT_ONLY
from st_embfilter.model.layer import EmbedFilterLayer, filter_of
from st_embfilter.spectrum.band import Band
from tests.conftest import DEMO_LM, TEXTS, MakeLM, same


def plain(folder: Path, **kwargs: object) -> SentenceTransformer:
    """An unfiltered mean-pooled model, as a user of sentence-transformers would build it."""
    backbone = Transformer(
        str(folder), modality_config=TEXT_ONLY, module_output_name="token_embeddings"
    )
    backbone.tokenizer.pad_token = backbone.tokenizer.eos_token
    return SentenceTransformer(
        modules=[backbone, Pooling(backbone.get_embedding_dimension()), *kwargs.pop("after", ())],
        device="cpu",
        **kwargs,
    )


def cosines(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


def test_the_model_is_ordinary(demo_model: SentenceTransformer) -> None:
    assert [type(m) for m in demo_model.children()] == [Transformer, Pooling, EmbedFilterLayer]
    assert demo_model.encode(TEXTS).shape == (len(TEXTS), 256)
    assert demo_model.get_embedding_dimension() == 256
    assert demo_model[1].pooling_mode == "mean"


def test_cosines_equal_the_full_size_projector(demo_model: SentenceTransformer) -> None:
    layer = filter_of(demo_model)
    raw = plain(DEMO_LM).encode(TEXTS).astype(np.float64)
    whole = demo_model.encode(TEXTS)
    v = layer.projection.double().numpy()
    for k in (128, 64, 32, 7):
        projected = raw @ (v[:k].T @ v[:k])
        assert same(cosines(projected), cosines(whole[:, :k]))


def test_saved_prefixes_are_separately_built_filters(saved_demo: Path) -> None:
    """truncate_dim on one saved folder selects the filter strength."""
    for k in (128, 100, 64, 31, 1):
        truncated = SentenceTransformer(str(saved_demo), truncate_dim=k, device="cpu")
        built = st_embfilter.from_causal_lm(DEMO_LM, keep=k, device="cpu")
        assert truncated.encode(TEXTS).shape == (len(TEXTS), k)
        assert same(cosines(truncated.encode(TEXTS)), cosines(built.encode(TEXTS)))


@pytest.mark.parametrize("pooling", ["mean", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_batches_and_padding_change_nothing(make_lm: MakeLM, model_type: str, pooling: str) -> None:
    folder, _ = make_lm(model_type)
    model = st_embfilter.from_causal_lm(folder, pooling=pooling, device="cpu")
    texts = [text for text in TEXTS if text] + ["glacier"]
    alone = model.encode(texts, batch_size=1)
    together = model.encode(texts, batch_size=32)
    assert same(alone, together)
    if model_type == "llama":  # rotary positions are relative; GPT-2's absolute ones are not
        model.tokenizer.padding_side = "left"
        assert same(alone, model.encode(texts, batch_size=32))


def test_padding_is_on_the_right_whatever_the_checkpoint_says(
    make_lm: MakeLM, tmp_path: Path
) -> None:
    folder, _ = make_lm("gpt2")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    assert model.tokenizer.padding_side == "right"
    st_embfilter.save_pretrained(model, tmp_path / "saved")
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = ["glacier", "the light of the cup ."]
    assert same(again.encode(texts), model.encode(texts, batch_size=1))


@pytest.mark.parametrize("missing", ["pad", "pad and eos", "all"])
def test_a_tokenizer_without_padding_gets_an_existing_token(
    make_lm: MakeLM, tmp_path: Path, missing: str
) -> None:
    folder, _ = make_lm()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    dropped = {"pad": [], "pad and eos": ["eos_token"]}.get(
        missing, ["eos_token", "bos_token", "unk_token"]
    )
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in dropped}))
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    assert model.tokenizer.pad_token is not None
    assert len(model.tokenizer) == 200
    path = st_embfilter.save_pretrained(model, tmp_path / "saved")
    texts = ["glacier", "the light of the cup ."]
    again = SentenceTransformer(str(path), device="cpu")
    assert same(again.encode(texts), model.encode(texts))


def test_a_bfloat16_backbone_loses_nothing_in_the_filter(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    filtered = st_embfilter.from_causal_lm(folder, dtype=torch.bfloat16, device="cpu")
    assert filtered.encode(["the light"]).dtype == np.float32
    features = filtered.preprocess(["the light", "a cup"])
    with torch.inference_mode():
        pooled = filtered[1](filtered[0](features))["sentence_embedding"]
    assert pooled.dtype == torch.bfloat16
    exact = pooled.double() @ filter_of(filtered).projection.double().T
    out = filtered.encode(["the light", "a cup"], convert_to_tensor=True)
    assert same(out.double(), exact)


def test_text_is_never_wrapped_in_a_chat_template(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    bare = st_embfilter.from_causal_lm(folder, device="cpu").encode(["the light"])
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}of of of {{ m['content'] }}{% endfor %}"
    )
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    assert model.tokenizer.chat_template is not None
    assert same(model.encode(["the light"]), bare)
    path = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert same(SentenceTransformer(str(path), device="cpu").encode(["the light"]), bare)
    assert same(st_embfilter.load(path, device="cpu").encode(["the light"]), bare)


def test_longest_text(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    assert st_embfilter.from_causal_lm(folder, device="cpu").max_seq_length == 64
    assert st_embfilter.from_causal_lm(folder, max_seq_length=9, device="cpu").max_seq_length == 9
    assert (
        st_embfilter.from_causal_lm(folder, max_seq_length=None, device="cpu").max_seq_length == 64
    )


def test_normalize_stays_last(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, normalize=True, device="cpu")
    assert isinstance(model[3], Normalize)
    assert np.allclose(np.linalg.norm(model.encode(["the light"]), axis=1), 1)


# add_filter --------------------------------------------------------------------------------------


def test_add_filter_goes_between_pooling_and_normalize(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    model = plain(folder, after=[Normalize()], prompts={"query": "the "})
    assert st_embfilter.add_filter(model, keep=0.25) is model
    assert [type(m) for m in model.children()] == [
        Transformer,
        Pooling,
        EmbedFilterLayer,
        Normalize,
    ]
    assert model.prompts["query"] == "the "
    built = st_embfilter.from_causal_lm(folder, keep=0.25, normalize=True, device="cpu")
    assert same(model.encode(["the light"]), built.encode(["the light"]))
    with pytest.raises(PlacementError, match="got a model that has one"):
        st_embfilter.add_filter(model)


def test_add_filter_takes_any_source_of_w_u(make_lm: MakeLM) -> None:
    folder, lm = make_lm(tie_word_embeddings=False)
    expected = st_embfilter.add_filter(plain(folder)).encode(["the light"])
    for source in (lm, folder, lm.get_output_embeddings().weight):
        model = st_embfilter.add_filter(plain(folder), unembedding=source)
        assert same(model.encode(["the light"]), expected)


def test_add_filter_refuses_another_width(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    with pytest.raises(ShapeError, match="got 32 for the embedding and 24 for 'weight'"):
        st_embfilter.add_filter(plain(folder), unembedding=torch.randn(100, 24))


def test_add_filter_takes_a_ready_filter(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    built = st_embfilter.build_filter(folder, keep=0.25)
    path = built.save_pretrained(tmp_path / "filter")
    expected = st_embfilter.add_filter(plain(folder), keep=0.25).encode(["the light"])
    for ready in (built, path, str(path)):
        model = st_embfilter.add_filter(plain(folder), ready)
        assert same(model.encode(["the light"]), expected)
    for beside in ({"keep": 0.25}, {"band": "dominant"}):
        with pytest.raises(BandError, match="a ready filter has a band and a width of its own"):
            st_embfilter.add_filter(plain(folder), built, **beside)


def test_the_former_names_still_work(make_lm: MakeLM) -> None:
    folder, lm = make_lm(tie_word_embeddings=False)
    with pytest.warns(DeprecationWarning, match=r"is now build_filter\(weight\)"):
        layer = st_embfilter.filter_from_weight(lm.lm_head.weight)
    assert torch.equal(layer.projection, st_embfilter.build_filter(lm).projection)
    with pytest.warns(DeprecationWarning, match=r"is now add_filter\(model, filter\)"):
        model = st_embfilter.stack_filter(plain(folder), layer)
    assert filter_of(model) is layer


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_add_filter_to_a_filtered_model_that_is_loaded_plainly(
    make_lm: MakeLM, tmp_path: Path, keep: float
) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, keep=keep, normalize=True, device="cpu")
    path = st_embfilter.save_pretrained(model, tmp_path / "saved")
    loaded = SentenceTransformer(str(path), device="cpu")
    modules = list(loaded.children())
    with pytest.raises(PlacementError, match=r"Dense moves them to another space; .*load brings"):
        st_embfilter.add_filter(loaded)
    assert list(loaded.children()) == modules


def test_add_filter_to_a_model_with_a_trained_layer(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    for layer in (Dense(32, 32), LayerNorm(32)):
        with pytest.raises(PlacementError, match=type(layer).__name__):
            st_embfilter.add_filter(plain(folder, after=[layer]))


def test_add_filter_to_a_tied_model_whose_folder_is_gone(make_lm: MakeLM) -> None:
    for tied in (True, False):
        folder, _ = make_lm(name=f"lm-{tied}", tie_word_embeddings=tied)
        model = plain(folder)
        folder.rename(folder.with_name(f"elsewhere-{tied}"))
        if tied:
            assert filter_of(st_embfilter.add_filter(model)).metadata.provenance.tied
        else:
            with pytest.raises(UnembeddingError, match="pass unembedding="):
                st_embfilter.add_filter(model)


# load --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_brings_the_live_layer_back(
    make_lm: MakeLM, tmp_path: Path, normalize: bool, dtype: torch.dtype
) -> None:
    folder, _ = make_lm(dtype=dtype)
    band = Band("offset", 7, offset=5)
    model = st_embfilter.from_causal_lm(folder, band=band, normalize=normalize, device="cpu")
    path = st_embfilter.save_pretrained(model, tmp_path / "saved")
    again = st_embfilter.load(path, device="cpu")
    before, after = filter_of(model), filter_of(again)
    assert torch.equal(before.projection, after.projection)
    assert torch.equal(before.singular_values, after.singular_values)
    assert before.metadata == after.metadata
    assert same(model.encode(["the light"]), again.encode(["the light"]))


def test_load_reads_the_filter_once(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_lm()
    path = st_embfilter.save_pretrained(
        st_embfilter.from_causal_lm(folder, device="cpu"), tmp_path / "saved"
    )
    read: list[str] = []

    def counted(file: Path) -> dict[str, torch.Tensor]:
        read.append(file.name)
        return load_file(file)

    monkeypatch.setattr(filter_files, "load_tensors", counted)
    st_embfilter.load(path, device="cpu")
    assert sorted(read) == ["embfilter_spectrum.safetensors", "model.safetensors"]


def test_load_of_a_model_without_filter(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    plain(folder).save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(FormatError, match="must hold one Dense module, got 0"):
        st_embfilter.load(tmp_path / "plain", device="cpu")


# Wrong arguments, before anything is loaded ------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": 1.5}, BandError, r"keep must be a ratio in \(0, 1\] or an int >= 1, got 1\.5"),
        ({"keep": 300}, BandError, r"keep must be in \(0, 1\] or an int in \[1, 256\], got 300"),
        ({"band": "middle"}, BandError, "band must be one of bulk"),
        ({"pooling": "best"}, PlacementError, "pooling must be one of .*, got 'best'"),
        ({"prompt": "no-such-recipe"}, PromptError, "got 'no-such-recipe'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        st_embfilter.from_causal_lm(DEMO_LM, **arguments)


def test_build_filter_is_deterministic() -> None:
    first, second = (st_embfilter.build_filter(DEMO_LM) for _ in range(2))
    assert torch.equal(first.projection, second.projection)
    assert first.metadata == second.metadata
