"""`EmbedFilterLayer`: the theorem, the place, the dtype, the file format."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

import st_embfilter
from st_embfilter.errors import FormatError, PlacementError, ShapeError
from st_embfilter.model.layer import EmbedFilterLayer, check_placement
from st_embfilter.model.metadata import METADATA_FILE, FilterMetadata
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import spectrum_of_weight
from tests.conftest import FLOAT32, FLOAT64, TEXTS, MakeLM, planted, same


@pytest.fixture
def weight() -> torch.Tensor:
    return planted(300, torch.linspace(3, 1, 24), dtype=torch.float32)[0]


@pytest.fixture
def layer(weight: torch.Tensor) -> EmbedFilterLayer:
    return st_embfilter.build_filter(weight)


def apply(layer: EmbedFilterLayer, x: torch.Tensor) -> torch.Tensor:
    return layer({"sentence_embedding": x})["sentence_embedding"]


@given(seed=st.integers(0, 2**31), k=st.integers(1, 24))
def test_inner_products_equal_the_full_size_projector(seed: int, k: int) -> None:
    """h V_k keeps every inner product of V_k V_k^T h (paper, section 4)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(100, 24, generator=generator)
    h = torch.randn(5, 24, generator=generator)
    small = apply(st_embfilter.build_filter(weight, keep=k), h).double()
    v = spectrum_of_weight(weight).directions[Band("bulk", k).indices(24)]
    projector = v.T @ v
    full = h.double() @ projector
    assert same(projector @ projector, projector, FLOAT64)
    # Vectors that err by FLOAT32 of their length: twice that of a product of two lengths.
    length = max(1.0, float(h.norm(dim=1).max()))
    off = 2 * FLOAT32 * length
    assert torch.allclose(small @ small.T, full @ full.T, rtol=0, atol=off * length)
    assert torch.allclose(torch.cdist(small, small), torch.cdist(full, full), rtol=0, atol=off)


def test_a_prefix_is_the_smaller_filter(weight: torch.Tensor) -> None:
    h = torch.randn(9, 24)
    whole = apply(st_embfilter.build_filter(weight, keep=1.0), h)
    for k in range(1, 25):
        built = apply(st_embfilter.build_filter(weight, keep=k), h)
        assert same(whole[:, :k], built)


def test_keeping_everything_changes_no_cosine(weight: torch.Tensor) -> None:
    h = torch.randn(9, 24)
    whole = apply(st_embfilter.build_filter(weight, keep=1.0), h)
    cosine = torch.nn.functional.cosine_similarity
    assert same(cosine(whole[0], whole[1:]), cosine(h[0], h[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_float32_for_every_input(layer: EmbedFilterLayer, dtype: torch.dtype) -> None:
    h = torch.randn(9, 24).to(dtype)
    out = apply(layer, h)
    assert out.dtype == torch.float32
    exact = h.double() @ layer.projection.double().T
    assert same(out.double(), exact)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_no_cast_changes_the_projection(layer: EmbedFilterLayer, cast: str) -> None:
    before = layer.projection.clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer)
    model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model[0].weight.dtype != torch.float32
    assert layer.projection.dtype == torch.float32
    assert torch.equal(layer.projection, before)


def test_autocast_does_not_reach_inside(layer: EmbedFilterLayer) -> None:
    h = torch.randn(9, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = apply(layer, h)
    assert torch.equal(out, apply(layer, h))


def test_frozen_but_transparent_to_gradients(layer: EmbedFilterLayer) -> None:
    assert list(layer.parameters()) == []
    h = torch.randn(3, 24, requires_grad=True)
    apply(layer, h).sum().backward()
    assert h.grad is not None
    assert same(h.grad, layer.projection.sum(0).expand(3, -1))


def test_copies(layer: EmbedFilterLayer) -> None:
    h = torch.randn(3, 24)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(apply(twin, h), apply(layer, h))
        assert twin.metadata == layer.metadata


def test_wrong_width(layer: EmbedFilterLayer) -> None:
    with pytest.raises(ShapeError, match="takes embeddings of width 24, got 23"):
        apply(layer, torch.randn(2, 23))
    with pytest.raises(ShapeError, match=r"\(12, 24\), got \(12, 23\)"):
        EmbedFilterLayer(torch.ones(12, 23), layer.metadata)


def test_without_pooling_before(layer: EmbedFilterLayer) -> None:
    with pytest.raises(PlacementError, match="after Pooling, got features without"):
        layer({"token_embeddings": torch.ones(1, 2, 24)})


def test_placement_rules(layer: EmbedFilterLayer) -> None:
    pooling, normalize = Pooling(24), Normalize()
    check_placement([pooling, layer, normalize])
    check_placement([pooling, normalize])
    for wrong, message in [
        ([pooling, normalize, layer], "must stand before Normalize, got Pooling > Normalize"),
        ([layer, pooling], "must stand after Pooling, got EmbedFilterLayer > Pooling"),
        ([pooling, layer, layer], "one EmbedFilterLayer at most"),
        ([pooling, Dense(24, 24), layer], "directly after Pooling"),
    ]:
        with pytest.raises(PlacementError, match=message):
            check_placement(wrong)


def test_sentence_transformers_checks_the_place_too(
    demo_model: SentenceTransformer, weight: torch.Tensor
) -> None:
    backbone, pooling, layer = demo_model.children()
    with pytest.raises(PlacementError, match="before Normalize"):
        SentenceTransformer(modules=[backbone, pooling, Normalize(), layer], device="cpu")


def test_the_public_path_is_frozen() -> None:
    """modules.json of every saved model names it."""
    kind = EmbedFilterLayer
    assert f"{kind.__module__}.{kind.__qualname__}" == "st_embfilter.EmbedFilterLayer"
    assert st_embfilter.EmbedFilterLayer is EmbedFilterLayer


def test_saved_folder_is_also_a_dense(layer: EmbedFilterLayer, tmp_path: Path) -> None:
    layer.save(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "in_features": 24,
        "out_features": 12,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    h = torch.randn(4, 24)
    dense = Dense.load(str(tmp_path))
    assert same(dense({"sentence_embedding": h})["sentence_embedding"], apply(layer, h))
    again = EmbedFilterLayer.load(str(tmp_path))
    assert torch.equal(again.projection, layer.projection)
    assert torch.equal(again.singular_values, layer.singular_values)
    assert again.metadata == layer.metadata


def test_round_trip_through_sentence_transformers(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, normalize=True, device="cpu")
    model.save_pretrained(str(tmp_path / "own"))
    modules = json.loads((tmp_path / "own" / "modules.json").read_text())
    assert modules[2]["type"] == "st_embfilter.EmbedFilterLayer"
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "own"), device="cpu")
    again = SentenceTransformer(str(tmp_path / "own"), trust_remote_code=True, device="cpu")
    assert isinstance(again[2], EmbedFilterLayer)
    assert same(again.encode(TEXTS), model.encode(TEXTS))


# Metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "band",
    [Band("bulk", 0.5), Band("offset", 5, offset=3), Band("random", 0.25, seed=9), Band("edges")],
)
def test_metadata_round_trip(weight: torch.Tensor, band: Band) -> None:
    metadata = st_embfilter.build_filter(weight, band=band).metadata
    assert FilterMetadata.from_json(metadata.to_json()) == metadata


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 2, "from 1 to 1, got 2; a newer one needs a newer st-embfilter"),
        (("format_version",), None, "from 1 to 1, got None"),
        (("base_model",), [], "base_model must be an object"),
        (("unembedding", "shape"), [24], "shape must be two ints"),
        (("unembedding", "shape"), [300, 26], "filter.d must be 26 for this band and shape"),
        (("unembedding", "sha256"), 5, "sha256 must be str"),
        (("unembedding", "tied"), "yes", "tied must be bool"),
        (("filter", "k"), 13, "filter.k must be 12 .* got 13; the file was edited"),
        (("filter", "start"), 0, "filter.start must be 6"),
        (("filter", "keep"), 2.5, r"keep must be a ratio in \(0, 1\]"),
        (("filter", "keep"), "half", "keep must be int or float"),
        (("filter", "band"), "middle", "band must be one of bulk"),
        (("filter", "seed"), 3, "seed= belongs to family 'random'"),
        (("prompt",), "hello", "prompt must be an object"),
    ],
)
def test_edited_metadata(
    layer: EmbedFilterLayer, path: tuple[str, ...], value: object, message: str
) -> None:
    document = json.loads(layer.metadata.to_json())
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(FormatError, match=message):
        FilterMetadata.from_json(json.dumps(document))


@given(text=st.one_of(st.text(), st.recursive(st.none() | st.integers(), st.lists).map(json.dumps)))
def test_any_text_as_metadata_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        FilterMetadata.from_json(text)


def test_weights_that_do_not_fit_their_metadata(layer: EmbedFilterLayer, tmp_path: Path) -> None:
    layer.save(str(tmp_path))
    document = json.loads((tmp_path / METADATA_FILE).read_text())
    document["filter"].update(keep=5, k=5, start=9)
    (tmp_path / METADATA_FILE).write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"shape \(5, 24\) .* got shape \(12, 24\)"):
        EmbedFilterLayer.load(str(tmp_path))
    (tmp_path / METADATA_FILE).unlink()
    with pytest.raises(FormatError, match=r"must hold embfilter\.json"):
        EmbedFilterLayer.load(str(tmp_path))
