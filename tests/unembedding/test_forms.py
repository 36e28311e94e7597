"""W_U is found, or refused with a reason, in every form in which people keep decoder models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import (
    AutoModelForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PreTrainedModel,
)

import st_embfilter
from st_embfilter.errors import BackboneError, FormatError, UnembeddingError
from st_embfilter.files import stored
from st_embfilter.files.folder import FolderFiles
from st_embfilter.files.stored import parse_header
from st_embfilter.files.tensors import open_checkpoint
from st_embfilter.model.backbone import load_backbone
from st_embfilter.unembedding.matrix import Unembedding
from st_embfilter.unembedding.source import Source, open_unembedding, unembedding_of_model
from tests.architectures import save_tiny, tiny_config, tiny_model
from tests.conftest import FLOAT32, MakeLM, same, sine, word_tokenizer

HEAD = "lm_head.weight"
TEXTS = ["the cup of tea", "a glacier is in the light", "sugar rates"]


def read(unembedding: Unembedding, rows: int = 7) -> torch.Tensor:
    return torch.cat(list(unembedding.blocks(rows)))


def rewrite(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: object
) -> None:
    """Changes the tensors and the config of a checkpoint."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | config))


def test_a_header_is_read_once_for_all_tensors(
    make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_lm()
    checkpoint = open_checkpoint(FolderFiles(folder))
    read = []

    def counted(data: bytes, file: str) -> dict[str, object]:
        read.append(file)
        return parse_header(data, file)

    monkeypatch.setattr(stored, "parse_header", counted)
    assert len([checkpoint.tensor(name) for name in checkpoint.names]) > 1
    assert read == ["model.safetensors"]


# Quantised checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "beside"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ".absmax"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, None),
        ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None),
    ],
)
def test_quantised_layers_leave_the_head_alone(
    make_lm: MakeLM, method: dict[str, Any], beside: str | None
) -> None:
    folder, model = make_lm(dtype=torch.float16, tie_word_embeddings=False)

    def quantise(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "_proj" in name]:
            packed = torch.zeros(4, 4, dtype=torch.int32)
            weights[name.replace("weight", "qweight")] = packed
            weights[name + (beside or "_scale_inv")] = torch.ones(4)
            del weights[name]

    rewrite(folder, quantise, quantization_config=method)
    assert torch.equal(read(open_unembedding(folder)), model.lm_head.weight)


@pytest.mark.parametrize("shape", [(13, 2), (200, 1), (200, 2), (1, 1), (200,), (1,), ()])
def test_fp8_head_is_multiplied_by_its_scales(make_lm: MakeLM, shape: tuple[int, ...]) -> None:
    folder, model = make_lm(tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(shape, generator=generator) + 0.5
    eight = model.lm_head.weight.detach().to(torch.float8_e4m3fn)
    name = "lm_head.weight_scale_inv" if shape == (13, 2) else "lm_head.weight_scale"
    rewrite(
        folder,
        lambda weights: weights.update({HEAD: eight, name: scale}),
        quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]},
    )
    grid = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    full = grid.repeat_interleave(16 if shape == (13, 2) else 200 // grid.shape[0], 0)
    full = full[:200].repeat_interleave(32 // grid.shape[1], 1)
    found = open_unembedding(folder)
    assert found.stored.dtype == torch.float32
    assert torch.equal(read(found), eight.to(torch.float32) * full)
    assert found.fit()[1].dtype == "float32"


def test_eight_bit_integers_of_bitsandbytes(make_lm: MakeLM) -> None:
    folder, model = make_lm(tie_word_embeddings=False)
    weight = model.lm_head.weight.detach()
    row_maxima = weight.abs().amax(1)
    integers = (weight / row_maxima[:, None] * 127).round().to(torch.int8)
    rewrite(folder, lambda weights: weights.update({HEAD: integers, "lm_head.SCB": row_maxima}))
    found = read(open_unembedding(folder))
    assert float((found - weight).abs().max() / row_maxima.max()) <= 0.5 / 127 * (1 + FLOAT32)


def test_plain_fp8_without_scales(make_lm: MakeLM) -> None:
    folder, model = make_lm(tie_word_embeddings=False)
    eight = model.lm_head.weight.detach().to(torch.float8_e5m2)
    rewrite(folder, lambda weights: weights.update({HEAD: eight}))
    assert torch.equal(read(open_unembedding(folder)).float(), eight.float())


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"lm_head.qweight": torch.int32},
            "packed 'lm_head.qweight'; take it from the unquantised",
        ),
        ({"lm_head.weight_packed": torch.int32}, "packed 'lm_head.weight_packed'"),
        ({HEAD: torch.uint8, f"{HEAD}.absmax": torch.float32}, f"packed '{HEAD}.absmax'"),
        ({HEAD: torch.int8}, "8-bit integers needs scales"),
        ({HEAD: torch.int8, "lm_head.SCB": torch.float32}, r"the scales of .* got shape \(3, 1\)"),
        ({HEAD: torch.uint8}, "stored in one of .* got 'lm_head.weight' in 'U8'"),
    ],
)
def test_heads_that_cannot_be_dequantised_exactly(
    make_lm: MakeLM, beside: dict[str, torch.dtype], message: str
) -> None:
    folder, _ = make_lm(tie_word_embeddings=False)

    def quantise(weights: dict[str, torch.Tensor]) -> None:
        del weights[HEAD]
        for name, dtype in beside.items():
            shape = (200, 32) if name == HEAD else (3,)
            weights[name] = torch.ones(shape, dtype=dtype)

    rewrite(folder, quantise)
    with pytest.raises(UnembeddingError, match=message):
        open_unembedding(folder)


# Adapters -----------------------------------------------------------------------------------------


def adapter_folder(base: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    folder = base.with_name("adapter")
    folder.mkdir()
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(document | config))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in weights.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


QUERY = "model.layers.0.self_attn.q_proj"


def test_adapter_that_leaves_the_head_alone(make_lm: MakeLM) -> None:
    base, model = make_lm(tie_word_embeddings=False)
    a, b = torch.ones(2, 32), torch.ones(32, 2)
    folder = adapter_folder(base, {f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b})
    found = open_unembedding(folder)
    assert torch.equal(read(found), model.lm_head.weight)
    assert (found.stored.name, found.model_id) == (HEAD, "lm")


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_with_a_head_of_its_own(make_lm: MakeLM, tied: bool) -> None:
    base, _ = make_lm(tie_word_embeddings=tied)
    head = torch.randn(200, 32)
    found = open_unembedding(adapter_folder(base, {HEAD: head}))
    assert torch.equal(read(found), head)
    assert found.model_id == "adapter"


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5), ({"alpha_pattern": {"lm_head": 2}}, 1.0)],
)
def test_lora_on_the_head(make_lm: MakeLM, options: dict[str, object], scale: float) -> None:
    base, model = make_lm(tie_word_embeddings=False)
    a, b = torch.randn(2, 32), torch.randn(200, 2)
    weights = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
    found = read(open_unembedding(adapter_folder(base, weights, **options)))
    torch.testing.assert_close(found, model.lm_head.weight.detach() + scale * (b @ a))


@pytest.mark.parametrize(
    ("tied", "names"),
    [
        (True, ["model.embed_tokens.weight"]),
        (True, ["model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"]),
        (
            False,
            ["lm_head.lora_A.weight", "lm_head.lora_B.weight", "lm_head.lora_magnitude_vector"],
        ),
        (False, ["lm_head.ia3_l"]),
    ],
)
def test_adapters_that_must_be_merged_first(make_lm: MakeLM, tied: bool, names: list[str]) -> None:
    base, _ = make_lm(tie_word_embeddings=tied)
    folder = adapter_folder(base, {name: torch.ones(2, 2) for name in names})
    with pytest.raises(UnembeddingError, match=r"merge it into its base model with PEFT"):
        open_unembedding(folder)


def test_an_input_embedding_that_is_not_the_head_may_be_trained(make_lm: MakeLM) -> None:
    base, model = make_lm(tie_word_embeddings=False)
    folder = adapter_folder(base, {"model.embed_tokens.weight": torch.ones(200, 32)})
    assert torch.equal(read(open_unembedding(folder)), model.lm_head.weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("{}", "must name its base model"),
        ('{"base_model_name_or_path": "someone/unheard-of"}', "hf download someone/unheard-of"),
    ],
)
def test_damaged_adapters(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UnembeddingError, match=message):
        open_unembedding(tmp_path)


def test_adapter_without_weights_or_with_others(make_lm: MakeLM) -> None:
    base, _ = make_lm(tie_word_embeddings=False)
    weights = {
        "lm_head.lora_A.weight": torch.ones(2, 16),
        "lm_head.lora_B.weight": torch.ones(9, 2),
    }
    folder = adapter_folder(base, weights)
    with pytest.raises(UnembeddingError, match="belongs to another model"):
        open_unembedding(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UnembeddingError, match=r"must hold adapter_model\.safetensors"):
        open_unembedding(folder)


@pytest.mark.parametrize("whole", [None, ["embed_tokens"]])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_an_adapter_is_merged_and_survives_publishing(
    make_lm: MakeLM, tmp_path: Path, whole: list[str] | None
) -> None:
    peft = pytest.importorskip("peft")
    base, _ = make_lm(tie_word_embeddings=False)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=whole,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if whole:
        with torch.no_grad():
            adapted.get_input_embeddings().weight.add_(0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    word_tokenizer().save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    word_tokenizer().save_pretrained(tmp_path / "merged")

    def build(name: str) -> SentenceTransformer:
        return st_embfilter.from_causal_lm(tmp_path / name, device="cpu", show_progress_bar=False)

    model = build("adapter")
    expected = build("merged").encode(TEXTS)
    assert same(model.encode(TEXTS), expected)
    assert not same(build("lm").encode(TEXTS), expected, 1e-2)
    folder = st_embfilter.save_pretrained(model, tmp_path / "portable")
    plain = SentenceTransformer(str(folder), device="cpu")
    assert same(plain.encode(TEXTS), expected)
    assert not list(folder.glob("adapter*"))

    unmerged = SentenceTransformer(
        modules=[(backbone := Transformer(str(tmp_path / "adapter"))), Pooling(32)], device="cpu"
    )
    assert backbone.auto_model._hf_peft_config_loaded
    st_embfilter.add_filter(unmerged, show_progress_bar=False)
    with pytest.raises(FormatError, match="a portable folder holds merged weights"):
        st_embfilter.save_pretrained(unmerged, tmp_path / "refused")


# GGUF ---------------------------------------------------------------------------------------------


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, (array, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    # Half of the last of 24, 11 and 8 bits; half a step of 127 to the largest of 32 values.
    ("kind", "tolerance"),
    [("F32", 0.0), ("F16", 2.0**-11), ("BF16", 2.0**-8), ("Q8_0", 0.5 / 127 + 2.0**-11)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf(tmp_path: Path, kind: str, tolerance: float, tied: bool) -> None:
    head = np.random.default_rng(0).standard_normal((80, 64)).astype(np.float32)
    other = (np.zeros((80, 64), np.float32), "F32")
    embeddings = {"token_embd.weight": (head, kind)}
    if not tied:
        embeddings = {"token_embd.weight": other, "output.weight": (head, kind)}
    path = write_gguf(tmp_path / "tiny.gguf", embeddings | {"blk.0.ffn_up.weight": other})
    for source in (path, tmp_path):
        found = open_unembedding(source)
        assert (found.tied, found.model_id) == (tied, "tiny.gguf")
        assert found.stored.shape == (80, 64)
        assert (
            float((read(found).float() - torch.from_numpy(head)).abs().max())
            <= tolerance * abs(head).max()
        )
    layer = st_embfilter.build_filter(path, show_progress_bar=False)
    exact = st_embfilter.build_filter(read(found))
    assert sine(layer.projection, exact.projection) <= FLOAT32


def test_gguf_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"no such format" * 9)
    with pytest.raises(UnembeddingError, match=r"a\.gguf must be a GGUF file"):
        open_unembedding(tmp_path)
    write_gguf(tmp_path / "b.gguf", {"blk.0.x": (np.zeros((2, 32), np.float32), "F32")})
    with pytest.raises(UnembeddingError, match=r"must hold output\.weight or token_embd\.weight"):
        open_unembedding(tmp_path / "b.gguf")
    with pytest.raises(UnembeddingError, match=r"got 2 in .*: a\.gguf, b\.gguf"):
        open_unembedding(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UnembeddingError, match=r"install st-embfilter\[gguf\]"):
        open_unembedding(tmp_path / "b.gguf")


# Embedding models on decoders ---------------------------------------------------------------------


def embedding_model(lm: Path, folder: Path, *, headless: bool) -> SentenceTransformer:
    """A folder as Qwen3-Embedding's: last token, unit length, prompts, a chat-free tokenizer."""
    word_tokenizer(pad_token="</s>").save_pretrained(lm)
    backbone = Transformer(str(lm))
    modules = [backbone, Pooling(32, "lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "the "}, device="cpu")
    model.save_pretrained(str(folder))
    if not headless:
        shutil.copy(lm / "model.safetensors", folder / "model.safetensors")
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_model_on_a_decoder(make_lm: MakeLM, tmp_path: Path, tied: bool) -> None:
    lm, live = make_lm("qwen3", tie_word_embeddings=tied)
    model = embedding_model(lm, tmp_path / "embedder", headless=True)
    raw = model.encode(TEXTS, prompt_name="query")
    if tied:
        st_embfilter.add_filter(model, keep=8, show_progress_bar=False)
    else:
        with pytest.raises(UnembeddingError, match="take that of the model it was made from"):
            st_embfilter.add_filter(model, keep=8, show_progress_bar=False)
        st_embfilter.add_filter(model, keep=8, unembedding=lm, show_progress_bar=False)
    names = [type(module).__name__ for module in model.children()]
    assert names == ["Transformer", "Pooling", "EmbedFilterLayer", "Normalize"]
    expected = (
        raw
        @ st_embfilter.build_filter(live.get_output_embeddings().weight, keep=8)
        .projection.numpy()
        .T
    )
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert same(model.encode(TEXTS, prompt_name="query"), expected)
    folder = st_embfilter.save_pretrained(model, tmp_path / "portable")
    plain = SentenceTransformer(str(folder), device="cpu")
    assert same(plain.encode(TEXTS, prompt_name="query"), expected)


# Heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "option", "values"),
    [
        ("cohere", "logit_scale", (0.0625, 3.0)),
        ("gemma2", "final_logit_softcapping", (None, 5.0)),
        ("granite", "logits_scaling", (1.0, 8.0)),
    ],
)
def test_scaled_and_capped_logits_have_the_same_filter(
    tmp_path: Path, model_type: str, option: str, values: tuple[object, object]
) -> None:
    filters, logits = [], []
    for i, value in enumerate(values):
        model = tiny_model(tiny_config(model_type, **{option: value}))
        save_tiny(model, tmp_path / str(i))
        logits.append(model(input_ids=torch.tensor([[1, 7, 9]])).logits)
        filters.append(st_embfilter.build_filter(tmp_path / str(i), show_progress_bar=False))
    assert not torch.allclose(logits[0], logits[1])
    assert torch.equal(filters[0].projection, filters[1].projection)


def test_a_head_bias_is_no_part_of_the_matrix(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("phi"))
    assert model.lm_head.bias is not None
    with torch.no_grad():
        model.lm_head.bias.fill_(100.0)
    save_tiny(model, tmp_path)
    assert torch.equal(read(open_unembedding(tmp_path)), model.lm_head.weight)


def test_a_projection_after_the_layers(tmp_path: Path) -> None:
    """OPT-350m: the config's hidden size is not the width of the last hidden state."""
    model = tiny_model(tiny_config("opt", hidden_size=32, word_embed_proj_dim=16))
    save_tiny(model, tmp_path / "lm")
    embedder = st_embfilter.from_causal_lm(
        tmp_path / "lm", keep=1.0, device="cpu", show_progress_bar=False
    )
    assert embedder.encode(TEXTS).shape == (3, 16)


def test_one_head_for_each_codebook_is_refused() -> None:
    config = MusicgenDecoderConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=16, num_codebooks=4
    )
    with pytest.raises(
        UnembeddingError, match=r"MusicgenForCausalLM with 4, one for each codebook"
    ):
        unembedding_of_model(MusicgenForCausalLM(config))


@pytest.mark.parametrize("model_type", ["distilbert", "modernbert", "bert"])
def test_masked_lm_on_request(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(tiny_config(model_type), masked_lm=True)
    save_tiny(model, tmp_path)
    with pytest.raises(UnembeddingError, match=r"pass masked_lm=True \(--masked-lm\)"):
        open_unembedding(tmp_path)
    found = open_unembedding(tmp_path, masked_lm=True)
    assert torch.equal(read(found), model.get_output_embeddings().weight)


def test_a_decoder_is_no_masked_lm(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    with pytest.raises(UnembeddingError, match=r"AutoModelForMaskedLM can build, got .* 'llama'"):
        open_unembedding(folder, masked_lm=True)


def test_bert_as_a_decoder_has_layers_in_its_head(tmp_path: Path) -> None:
    save_tiny(tiny_model(tiny_config("bert", is_decoder=True)), tmp_path)
    with pytest.raises(UnembeddingError, match=r"'cls\.predictions\.transform\.dense\.weight' in"):
        open_unembedding(tmp_path)


# Vision-language models ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl", "llava"])
def test_nested_text_decoder(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    save_tiny(model, tmp_path)
    assert torch.equal(read(open_unembedding(tmp_path)), model.get_output_embeddings().weight)


def test_processor_files_travel(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from transformers import AutoTokenizer, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    lm = tmp_path / "lm"
    save_tiny(tiny_model(tiny_config("gemma3")), lm)
    names = ("boi_token", "eoi_token", "image_token")
    tokenizer = AutoTokenizer.from_pretrained(
        lm, extra_special_tokens=dict.fromkeys(names, "<unk>")
    )
    Gemma3Processor(Gemma3ImageProcessorPil(), tokenizer).save_pretrained(lm)
    model = st_embfilter.from_causal_lm(lm, device="cpu", show_progress_bar=False)
    assert type(model[0].processor).__name__ == "Gemma3Processor"
    folder = st_embfilter.save_pretrained(model, tmp_path / "portable")
    assert (folder / "processor_config.json").is_file()
    plain = SentenceTransformer(str(folder), device="cpu")
    assert same(plain.encode(TEXTS), model.encode(TEXTS))


def test_a_missing_processor_is_one_sentence(tmp_path: Path) -> None:
    save_tiny(tiny_model(tiny_config("gemma3")), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["processor_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"can load with AutoModel and AutoProcessor, got"):
        load_backbone(Source(str(tmp_path)))


# Remote code --------------------------------------------------------------------------------------

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

Path({marker!r}).write_text("ran")


class OddConfig(LlamaConfig):
    model_type = "odd-lm"


class OddModel(LlamaModel):
    config_class = OddConfig


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def remote_code(make_lm: MakeLM, marker: Path) -> tuple[Path, PreTrainedModel]:
    folder, model = make_lm(name="odd")
    (folder / "modeling_odd.py").write_text(CODE.format(marker=str(marker)))
    rewrite(
        folder,
        lambda weights: None,
        model_type="odd-lm",
        architectures=["OddForCausalLM"],
        auto_map={
            "AutoConfig": "modeling_odd.OddConfig",
            "AutoModel": "modeling_odd.OddModel",
            "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
        },
    )
    return folder, model


def test_remote_code_runs_only_when_trusted(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    marker = tmp_path / "marker"
    folder, live = remote_code(make_lm, marker)
    with pytest.raises(UnembeddingError, match="trust_remote_code"):
        st_embfilter.from_causal_lm(folder, show_progress_bar=False)
    with pytest.raises(UnembeddingError, match="trust_remote_code"):
        st_embfilter.build_filter(folder, show_progress_bar=False)
    assert not marker.exists()
    found = open_unembedding(folder, trust_remote_code=True)
    assert torch.equal(read(found), live.get_output_embeddings().weight)
    assert marker.exists()
    model = st_embfilter.from_causal_lm(
        folder, device="cpu", trust_remote_code=True, show_progress_bar=False
    )
    portable = st_embfilter.save_pretrained(model, tmp_path / "portable")
    plain = SentenceTransformer(str(portable), device="cpu", trust_remote_code=True)
    assert same(plain.encode(TEXTS), model.encode(TEXTS))
