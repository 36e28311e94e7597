"""Calibration: texts that a language model writes by itself, and filters fitted to texts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from st_embfilter.errors import CalibrationError, PlacementError
from st_embfilter.model.gguf_backbone import readable
from st_embfilter.model.layer import EmbedFilterLayer, filter_of
from st_embfilter.model.pipeline import replace_module
from st_embfilter.model.tokenizer import start_token
from st_embfilter.spectrum.whitening import (
    DEFAULT_STRENGTH,
    Calibration,
    affine_map,
    check_strength,
    different_texts,
    moments,
    texts_hash,
)
from st_embfilter.text import reading
from st_embfilter.unembedding.source import Source

#: Tokens of a sampled text, about two sentences: the length of the texts that people embed.
DEFAULT_TOKENS: Final = 32

#: Fixed, because the samples of a seed depend on it.
_BATCH: Final = 64


def calibrate_filter(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    strength: float = DEFAULT_STRENGTH,
    seed: int | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = True,
) -> SentenceTransformer:
    """Centres and whitens a model's filtered embeddings with the moments of some texts.

    The texts are encoded as the model encodes, without its default prompt and before Normalize. The
    map is folded into the filter, which stays one linear layer, now with a bias.

    Args:
        model: A filtered model; changed in place.
        texts: Texts like those to embed, or `sample_texts` of the model's own. Empty and repeated
            ones are dropped.
        strength: A number in [0, 1]; 0 leaves the embeddings as they are, 1 whitens in full.
        seed: The seed of `sample_texts`, if the texts come from there, for the record.
        batch_size: Texts that are encoded at a time.
        show_progress_bar: Whether a bar is shown while the texts are encoded.

    Returns:
        The same model.

    Raises:
        CalibrationError: If the texts are too few or their embeddings unfit, or the model is
            calibrated already.
    """
    strength = check_strength(strength)
    texts = different_texts(texts)
    layer = filter_of(model)
    if layer is None:
        raise PlacementError("calibration needs a filtered model, got none; use add_filter first")
    if layer.metadata.calibration is not None:
        raise CalibrationError(
            "a filter is calibrated at most once, got a calibrated one; build the filter anew"
        )
    children = list(model.children())
    pipeline = SentenceTransformer(
        modules=children[: children.index(layer) + 1], device=str(model.device)
    )
    embeddings = pipeline.encode(
        texts,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar and sys.stderr.isatty(),
        convert_to_tensor=True,
    )
    estimate = moments(embeddings)
    matrix, bias = affine_map(estimate, strength)
    record = Calibration(
        source="texts" if seed is None else "self",
        texts=len(texts),
        sha256=texts_hash(texts),
        strength=strength,
        shrinkage=estimate.shrinkage,
        seed=seed,
    )
    calibrated = EmbedFilterLayer(
        matrix @ layer.projection.detach().to("cpu", torch.float64),
        replace(layer.metadata, calibration=record),
        layer.singular_values,
        bias,
    )
    replace_module(model, layer, calibrated)
    return model


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

    The same seed gives the same texts on the same machine and library versions. The random state of
    torch is left as it was.

    Args:
        name_or_path: Folder or Hub id of a causal language model, or a `Source`, which has a
            revision, a token and a trust of its own.
        count: Number of texts, >= 1.
        seed: Seed of the sampling.
        max_new_tokens: Longest text in tokens, >= 1.
        device: Where the model runs; None for the CPU.
        dtype: Dtype of the model, as in transformers.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        trust_remote_code: Allow model code of the checkpoint to run.
        show_progress_bar: Show a bar.

    Raises:
        CalibrationError: If the model keeps writing nothing, or the same.
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
    # Nothing else of the checkpoint's own settings: they are a stranger's, and shape the texts.
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)
    start = start_token(tokenizer, model.config)
    if start is None:
        raise CalibrationError(
            "sampling needs a token that starts a text, got a tokenizer without BOS and EOS; give "
            "texts instead"
        )
    texts: dict[str, None] = {}
    rounds = -(-4 * count // _BATCH)
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tqdm(
            total=count,
            unit="text",
            desc="Sampling texts",
            disable=None if show_progress_bar else True,
        ) as bar,
    ):
        torch.manual_seed(seed)
        for _ in range(rounds):
            prompts = torch.full((_BATCH, 1), start, device=model.device)
            written = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or start,
            )
            for text in tokenizer.batch_decode(written, skip_special_tokens=True):
                if text.strip() and len(texts) < count:
                    texts[text.strip()] = None
            bar.update(len(texts) - bar.n)
            if len(texts) == count:
                return list(texts)
    raise CalibrationError(
        f"the language model must write different texts to calibrate on, got {len(texts)} in "
        f"{rounds * _BATCH} samples of {name}; give texts instead"
    )
