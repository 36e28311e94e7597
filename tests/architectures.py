"""Every architecture that transformers maps to a causal LM, made tiny and taken the whole way.

`python -m tests.architectures` runs them all, each under a time limit in a process that a crash may
end, and writes docs/architectures.md.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import st_embfilter
from st_embfilter.unembedding import Unembedding, unembedding_of_folder
from tests.conftest import word_tokenizer

TEXTS: Final = ["the cup of tea is in the light", "a glacier", "sugar rates , sugar tea ."]

VOCAB: Final = 224  # more than tests.conftest.word_tokenizer has: padded, as many are
MAX_PARAMETERS: Final = 5_000_000

#: Field names of configs and the size that makes a model tiny; the first that matches counts, and
#: no value is raised.
SIZES: Final = [
    (r".*vocab_size.*|.*_vocab", VOCAB),
    (r".*(key_value_heads|kv_heads|query_groups)", 4),
    (r".*(per_tok|per_token|topk|top_k|top_k_experts|moe_k)", 2),
    (r".*(n_group|topk_group|expert_group|n_?groups)", 1),
    (r".*(experts|expert_num)", 4),
    (r".*(hidden_layers|n_layers?|num_layers|num_blocks|coder_layers|layers_per_stack)", 2),
    (r".*heads?", 4),
    (r".*(head_?dim|d_head|dim_head|kv_channels|head_size)", 8),
    (r".*(intermediate_size|ffn_dim|dff|d_inner|ffn_hidden_size|dim_ff|feed_forward_size)", 64),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embed_dim|embedding_size|width)", 32),
    (r".*(position_embeddings|n_positions|n_ctx|seq_len|context_length|_positions)", 128),
    (r".*_rank", 8),
    (r".*", 64),
]

#: Fields that are None by default where a model needs a value, or would derive a large one.
UNSET: Final = {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2}

#: What introspection cannot know: sizes that hang together in ways of their own.
EXCEPTIONS: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "blt": {"global_config": {"hidden_size": 64}},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"],
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_hidden_layers": 2,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
    },
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
}


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The config of an architecture with every size reduced, nested configs too."""
    return _shrink(CONFIG_MAPPING[model_type], overrides)


def _shrink(kind: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    overrides = EXCEPTIONS.get(kind.model_type, {}) | overrides
    try:
        default = kind()
    except Exception:  # invalid by default
        default = kind(**overrides)
    fields = {field.name for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for name in fields:
        value = _value(default, name)
        if isinstance(value, PretrainedConfig):
            options[name] = _shrink(type(value), overrides.get(name, {}))
        elif isinstance(value, int) and not isinstance(value, bool):
            options[name] = _small(name, value)
        elif name == "eos_token_id" and isinstance(value, list):
            options[name] = 2
        elif value is None and name in UNSET:
            options[name] = UNSET[name]
    for name in fields & {"layer_types", "layers_block_type"}:  # one layer of every kind
        layers = list(dict.fromkeys(_value(default, name) or ()))
        if layers:
            layers = (layers * 2)[: max(2, len(layers))]
            options |= {name: layers, "num_hidden_layers": len(layers)}
            mlps = list(dict.fromkeys(_value(default, "mlp_layer_types") or ()))
            if mlps:
                options["mlp_layer_types"] = [mlps[min(i, len(mlps) - 1)] for i in range(len(layers))]
    nested = {name for name, value in options.items() if isinstance(value, PretrainedConfig)}
    options |= {name: value for name, value in overrides.items() if name not in nested}
    return kind(**options)


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # fields that differ by layer may not be read
        return vars(config).get(name)


def _small(name: str, value: int) -> int:
    if re.fullmatch(r".*token_(id|index)", name):
        return value if value < VOCAB else 3
    return next(min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, name))


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random causal LM, after a look at its size on the meta device."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"a tiny model must have at most {MAX_PARAMETERS} parameters, got {size}")
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # initial weights are so small that all hidden states look alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def exercise(model_type: str, folder: Path) -> Unembedding:
    """Takes an architecture the whole way; raises where it fails.

    Saves a tiny model, finds W_U in the files, compares it with the live head, checks that it reads
    the backbone's last hidden state, builds, encodes, saves the portable folder and loads that with
    nothing but sentence-transformers.
    """
    source, portable = folder / "lm", folder / "portable"
    model = tiny_model(tiny_config(model_type))
    model.save_pretrained(source)
    word_tokenizer().save_pretrained(source)

    found = unembedding_of_folder(source)
    weight = torch.cat(list(found.blocks()))
    check(torch.equal(weight, model.get_output_embeddings().weight), "W_U is the live head")

    embedder = st_embfilter.from_causal_lm(
        source, keep=0.5, device="cpu", show_progress_bar=False
    )
    check_reads_hidden_state(model, embedder, weight)
    embeddings = embedder.encode(TEXTS)
    check(embeddings.shape == (len(TEXTS), found.d // 2), "embeddings are (n, k)")
    check(bool(np.isfinite(embeddings).all()), "embeddings are finite")
    check(len(np.unique(embeddings.round(5), axis=0)) == len(TEXTS), "texts differ")
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    check(close(alone, embeddings), "a text embeds the same alone as in a batch")

    st_embfilter.save_pretrained(embedder, portable)
    plain = SentenceTransformer(str(portable), device="cpu").encode(TEXTS)
    check(close(plain, embeddings), "the portable folder embeds the same")
    return found


def check(holds: bool, claim: str) -> None:
    if not holds:
        raise AssertionError(f"does not hold: {claim}")


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())


def check_reads_hidden_state(
    model: PreTrainedModel, embedder: SentenceTransformer, weight: Tensor
) -> None:
    """Logits are a rising function of W_U h (+ bias), h the backbone's last hidden state.

    Rising is enough: scales and caps of logits change no direction.
    """
    features = embedder.tokenize(TEXTS[:1])
    with torch.no_grad():
        hidden = embedder[0](dict(features))["token_embeddings"]
        logits = model(input_ids=features["input_ids"], use_cache=False).logits
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    lens = hidden @ weight.T + (0 if bias is None else bias)
    check(lens.shape == logits.shape, f"logits {tuple(logits.shape)} have the shape of W_U h {tuple(lens.shape)}")
    order = lens.argsort(-1)
    rising = logits.gather(-1, order).diff(dim=-1)
    check(float(rising.min()) >= -1e-4 * float(logits.abs().max()), "logits rise with W_U h")
