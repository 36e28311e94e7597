"""Small tokenizers in the style of Llama 3, Llama 2, Qwen2 and Mistral, with their LMs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM

CORPUS = """
Summarize the sentence: "The glacier retreats." in one word:"
This sentence: "Rates went up again last week." means [MASK]
Rewrite the following paragraph: The cat sat on the mat. The rewritten paragraph: The cat sat.
Name the category of the text: "Photosynthesis turns light into sugar." in one word:"
Name the feeling, the subject and the keyword of the meaning in the text: "Tea in the morning."
He said "no." and left (again). The word "ten" is written ten times: ten ten ten ten.
Ça va? Über uns, naïve café. The retreating glaciers of the summarized paragraphs sat.
"""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
)


def lines() -> Iterator[str]:
    return iter(CORPUS.strip().splitlines())


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines(), trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A BPE as converted from sentencepiece: word starts are marked, unknown characters bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trained.train_from_iterator(
        lines(),
        trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special[:3]])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def bos_template(tokenizer: Tokenizer, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def llama3() -> tuple[Tokenizer, dict[str, object]]:
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = byte_level([bos, eos])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), bos_template(tokenizer, bos)]
    )
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": CHATML,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def qwen2() -> tuple[Tokenizer, dict[str, object]]:
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }


def mistral() -> tuple[Tokenizer, dict[str, object]]:
    tokenizer = byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = bos_template(tokenizer, "<s>")
    return tokenizer, {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "chat_template": CHATML,
    }


def llama2() -> tuple[Tokenizer, dict[str, object]]:
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = bos_template(tokenizer, "<s>")
    # The special tokens are those that the class knows by itself.
    return tokenizer, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}


Style = Callable[[], tuple[Tokenizer, dict[str, object]]]

#: Style by name, with the type of model that it comes with and the BOS that it puts in front.
STYLES: dict[str, tuple[Style, str, str | None]] = {
    "llama3": (llama3, "llama", "<|begin_of_text|>"),
    "llama2": (llama2, "llama", "<s>"),
    "qwen2": (qwen2, "qwen2", None),
    "mistral": (mistral, "mistral", "<s>"),
}
EOS = {
    "llama3": "<|end_of_text|>",
    "llama2": "</s>",
    "qwen2": "<|endoftext|>",
    "mistral": "</s>",
}


def make_lm(style: str, folder: Path) -> Path:
    """Saves a tiny random LM with a tokenizer of this style, as its makers would."""
    build, model_type, _ = STYLES[style]
    tokenizer, config = build()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            model_type,
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.token_to_id(EOS[style]),
        )
    )
    with torch.no_grad():  # initial weights are so small that all hidden states look alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config["model_max_length"] = 256
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
