"""A checkpoint with gaps, or with NaN, is an error wherever a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM

import st_embfilter
from st_embfilter.errors import BackboneError
from tests.architectures import save_tiny, tiny_config, tiny_model
from tests.conftest import MakeLM, word_tokenizer

Weights = dict[str, torch.Tensor]

QUERY = "model.layers.0.self_attn.q_proj.weight"


def edit(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop(weights: Weights) -> None:
    del weights[QUERY]


def resize(weights: Weights) -> None:
    weights[QUERY] = weights[QUERY][:16].clone()


def put(value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[QUERY][3, 5] = value

    return change


DAMAGES = [
    (drop, r"layers\.0\.self_attn\.q_proj\.weight is not stored"),
    (resize, r"layers\.0\.self_attn\.q_proj\.weight is stored in another shape"),
    (put(float("nan")), r"got NaN or infinity in .*layers\.0\.self_attn\.q_proj\.weight"),
    (put(float("-inf")), r"got NaN or infinity in .*layers\.0\.self_attn\.q_proj\.weight"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_weights_of_a_language_model(
    make_lm: MakeLM, damage: Callable[[Weights], object], message: str
) -> None:
    folder, _ = make_lm()
    edit(folder, damage)
    with pytest.raises(BackboneError, match=message):
        st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_weights_of_a_saved_model(
    make_lm: MakeLM, tmp_path: Path, damage: Callable[[Weights], object], message: str
) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    st_embfilter.load(saved, device="cpu")
    edit(saved, damage)
    with pytest.raises(BackboneError, match=message):
        st_embfilter.load(saved, device="cpu")


def test_hidden_states_that_are_no_numbers(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": float("nan")}))
    with pytest.raises(BackboneError, match="got NaN or infinity for a short text"):
        st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)


def test_other_loads_are_not_touched(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    edit(folder, drop)
    with pytest.raises(BackboneError):
        st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    assert isinstance(AutoModel.from_pretrained(folder), torch.nn.Module)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "opt", "mixtral", "mamba"])
def test_whole_models_of_several_families(tmp_path: Path, model_type: str) -> None:
    """With heads that a backbone leaves out, tied heads, ignored keys, experts, a vision tower."""
    save_tiny(tiny_model(tiny_config(model_type)), tmp_path)
    model = st_embfilter.from_causal_lm(tmp_path, device="cpu", show_progress_bar=False)
    assert bool(model.encode(["a text"], convert_to_tensor=True).isfinite().all())


def test_a_masked_lm_has_no_pooler(tmp_path: Path) -> None:
    save_tiny(tiny_model(tiny_config("bert"), masked_lm=True), tmp_path)
    model = st_embfilter.from_causal_lm(
        tmp_path, masked_lm=True, device="cpu", show_progress_bar=False
    )
    assert isinstance(model, SentenceTransformer)


# Adapters ----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(make_lm: MakeLM) -> Path:
    """A LoRA adapter as PEFT saves it: two files, no tokenizer."""
    peft = pytest.importorskip("peft")
    base, _ = make_lm(tie_word_embeddings=False)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    folder = base.with_name("adapter")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    assert not list(folder.glob("tokenizer*"))
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_an_adapter_without_a_tokenizer_has_its_base_models(adapter: Path) -> None:
    without = st_embfilter.from_causal_lm(adapter, device="cpu", show_progress_bar=False)
    word_tokenizer().save_pretrained(adapter)
    beside = st_embfilter.from_causal_lm(adapter, device="cpu", show_progress_bar=False)
    texts = ["the light of the cup .", "glacier"]
    assert (without.encode(texts) == beside.encode(texts)).all()
    assert without.max_seq_length == beside.max_seq_length
    base = st_embfilter.from_causal_lm(adapter.with_name("lm"), device="cpu")
    assert not (without.encode(texts) == base.encode(texts)).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_damaged_base_model_of_an_adapter(adapter: Path) -> None:
    edit(adapter.with_name("lm"), drop)
    with pytest.raises(BackboneError, match=r"q_proj\.weight is not stored"):
        st_embfilter.from_causal_lm(adapter, device="cpu", show_progress_bar=False)
