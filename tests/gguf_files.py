"""Tiny GGUF files of random language models, written with the gguf library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

#: Sizes that quantised blocks of 32 values fit.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "ĠĠ"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
    "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "Ġ Ġ"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
}


def tiny_model(architecture: str = "llama", *, tied: bool = True) -> PreTrainedModel:
    """A random causal LM whose weights are exact in float16."""
    torch.manual_seed(0)
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    options = {"vocab_size": len(TOKENS), "tie_word_embeddings": tied, **SIZES}
    if architecture == "gemma3":
        options |= {"sliding_window": 16, "query_pre_attn_scalar": 256}  # no key of GGUF
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            parameter.copy_(parameter.half().float())
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    *,
    kind: str = "F32",
    metadata: dict[str, Any] | None = None,
    leave_out: str = "",
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a model as llama.cpp's converter does.

    Args:
        path: The file.
        model: From `tiny_model` of that architecture.
        architecture: "llama", "qwen2" or "gemma3".
        kind: Quantisation of the matrices; vectors stay float32.
        metadata: Goes over the keys of `TOKENIZER`; None takes one out.
        leave_out: A tensor that is not written.
        extra: Tensors to write in addition.
    """
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6 if architecture == "gemma3" else 10000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for key, value in (TOKENIZER | (metadata or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    number = getattr(gguf.MODEL_ARCH, architecture.upper())
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        target = f"{names.get_name(stem)}.{suffix}"
        if target == leave_out:
            continue
        values = parameter.detach().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):  # RoPE in pairs
            heads = values.shape[0] // config.head_dim
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = values.reshape(parameter.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        quantised = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        values = np.ascontiguousarray(values)
        writer.add_tensor(target, gguf.quantize(values, quantised), raw_dtype=quantised)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
