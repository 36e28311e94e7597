"""Texts that a language model writes by itself, to calibrate on."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from st_embfilter.errors import CalibrationError, SampleWarning
from st_embfilter.model.decode import write
from st_embfilter.model.gguf_backbone import readable
from st_embfilter.model.tokenizer import DOCUMENT_SEPARATOR, start_token
from st_embfilter.text import progress_bar, reading, shown
from st_embfilter.unembedding.source import Source

#: Tokens of a sampled text, about two sentences: the length of the texts that people embed.
DEFAULT_TOKENS: Final = 32

#: Fixed, because the samples of a seed depend on it. A step reads all weights once, whatever the
#: number of texts that it adds a token to.
BATCH: Final = 256

#: From this share of the texts on, a flaw is reported.
MAX_FLAWED: Final = 0.25

#: Words that must be the same for two texts to begin alike, and how many such texts are a template.
_OPENING: Final = 4
_ALIKE: Final = 4


@reading("the language model", CalibrationError, "write texts to calibrate on")
def sample_texts(
    name_or_path: str | os.PathLike[str] | Source,
    count: int = 1024,
    *,
    seed: int = 0,
    max_new_tokens: int = DEFAULT_TOKENS,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> list[str]:
    """Samples different texts from a language model, at temperature 1 from the start of a text.

    The same seed and count give the same texts on the same machine and library versions. The random
    state of torch is left as it was.

    Args:
        name_or_path: Folder or Hub id of a causal language model, or a `Source`, which has a
            revision, a token and a trust of its own.
        count: Number of texts, >= 1.
        seed: Seed of the sampling.
        max_new_tokens: Longest text in tokens, >= 1.
        device: Where the model runs; None for the CPU.
        dtype: Dtype of the weights, as in transformers; what a CPU computes in is `cpu_dtype`.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        trust_remote_code: Allow model code of the checkpoint to run.
        show_progress_bar: Show a bar.

    Raises:
        CalibrationError: If the model keeps writing nothing, or the same.

    Warns:
        SampleWarning: If the only start there is begins a turn of a chat, or the texts have a flaw
            of `flaws` more often than `MAX_FLAWED`.
    """
    if count < 1 or max_new_tokens < 1:
        raise CalibrationError(
            f"sampling needs count >= 1 and max_new_tokens >= 1, got {count} and {max_new_tokens}"
        )
    source = Source.of(
        name_or_path, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    source, dtype = readable(source, dtype, show_progress_bar=show_progress_bar)
    name, hub = source.name, source.for_transformers()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **hub)
    model: Any = AutoModelForCausalLM.from_pretrained(
        name, **hub, **({} if dtype is None else {"dtype": dtype})
    )
    model.to(device or "cpu").eval()
    if model.device.type == "cpu":
        model.to(cpu_dtype())
    start = start_token(tokenizer, model.config)
    if start is None:
        raise CalibrationError(
            "sampling needs a token that starts a text, got a tokenizer without BOS and EOS; give "
            "texts instead"
        )
    if starts_turn(tokenizer, start):
        warnings.warn(
            f"texts are sampled after {shown(tokenizer.convert_ids_to_tokens(start))!r}, which "
            "starts a turn of a chat, because the tokenizer has no token that starts a document; "
            "read some of `sample_texts`, or calibrate with 'generic' or texts of your own",
            SampleWarning,
            stacklevel=3,
        )
    texts: dict[str, None] = {}
    drawn: list[str] = []
    rows = min(BATCH, 64 * -(-count // 64))
    rounds = -(-4 * count // rows)
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        progress_bar("Sampling texts", "text", count, show=show_progress_bar) as bar,
    ):
        torch.manual_seed(seed)
        pad = tokenizer.pad_token_id or tokenizer.eos_token_id or start
        for _ in range(rounds):
            written = write(model, start, rows, max_new_tokens, pad)
            some = tokenizer.batch_decode(written, skip_special_tokens=True)
            drawn += [text.strip() for text in some]
            texts.update((text, None) for text in drawn if text)
            bar.update(min(count, len(texts)) - bar.n)
            if len(texts) >= count:
                break
        else:
            raise CalibrationError(
                f"the language model must write different texts to calibrate on, got {len(texts)} "
                f"in {rounds * rows} samples of {name}; give texts instead"
            )
    found = [f"{share:.0%} {flaw}" for flaw, share in flaws(drawn).items() if share > MAX_FLAWED]
    if found:
        warnings.warn(
            f"texts to calibrate on must be varied, got {', '.join(found)} among {len(drawn)} "
            f"samples of {name}; read some of `sample_texts`, or calibrate with 'generic' or texts "
            "of your own",
            SampleWarning,
            stacklevel=3,
        )
    return list(texts)[:count]


def cpu_dtype() -> torch.dtype:
    """What a CPU multiplies fastest: bfloat16 if it has instructions for it, or else float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def starts_turn(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is part of a chat's markup: its template writes it out, as `<|im_start|>`.

    A template takes BOS and EOS from the tokenizer, by name. The separator of documents is none of
    the markup, whatever a template does with it.
    """
    content = str(tokenizer.convert_ids_to_tokens(token))
    template = tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template or ""]
    return content != DOCUMENT_SEPARATOR and any(content in one for one in templates)


def flaws(texts: Sequence[str]) -> dict[str, float]:
    """What is wrong with samples, and with which share of them, in [0, 1].

    Args:
        texts: All samples that were drawn, empty and repeated ones too; at least one.
    """
    words = [text.lower().split() for text in texts]
    openings = Counter(tuple(said[:_OPENING]) for said in words if len(said) > _OPENING)
    found = {
        "are empty": sum(not said for said in words),
        "repeat another one": len(texts) - len(set(texts)),
        "repeat themselves": sum(len(set(said)) < len(said) / 2 for said in words),
        "begin alike": sum(n for n in openings.values() if n >= _ALIKE),
    }
    return {flaw: count / len(texts) for flaw, count in found.items()}
