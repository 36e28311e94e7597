"""The lens on one model: what its embeddings say and how it changes, as tables, JSON or one page.

`look` shows nearest tokens, `study` measures on a corpus; both take live objects. `open_model` is
the thin loader.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from st_embfilter.errors import BandError, EmbedFilterError, LensError, ProvenanceError
from st_embfilter.lens.anisotropy import Anisotropy, anisotropy
from st_embfilter.lens.counts import SMOOTHING, TokenCounts
from st_embfilter.lens.spectroscopy import Spectroscopy, optimal_band, spectroscopy_of_counts
from st_embfilter.lens.tokens import logit_lens, pooled_embeddings, visible
from st_embfilter.model.build import from_causal_lm
from st_embfilter.model.find import find_filter
from st_embfilter.model.layer import FEATURE, EmbedFilterLayer, filter_of
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.saved.load import load
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.text import first_line
from st_embfilter.unembedding.matrix import Provenance, Unembedding
from st_embfilter.unembedding.source import Source

#: Nearest tokens of which the share of frequent ones is measured, as in the paper.
SHARE_OF: Final = 10


@dataclass(frozen=True)
class Token:
    """A token near an embedding.

    Attributes:
        text: Decoded.
        id: The token's number.
        probability: Softmax over the whole vocabulary, in [0, 1].
    """

    text: str
    id: int
    probability: float

    @property
    def visible(self) -> str:
        """The text as it is shown: no spaces around, nothing invisible."""
        return visible(self.text)


@dataclass(frozen=True)
class TextLens:
    """Nearest tokens of one text, most probable first, without and with the filter."""

    text: str
    before: tuple[Token, ...]
    after: tuple[Token, ...]


@dataclass(frozen=True)
class Side:
    """Measures of a sample of embeddings on one side of the filter.

    Attributes:
        dims: Width.
        anisotropy: How unevenly they fill their space.
        frequent_share: Share of the corpus's frequent tokens among the nearest ten, in [0, 1].
    """

    dims: int
    anisotropy: Anisotropy
    frequent_share: float


@dataclass(frozen=True)
class Study:
    """What a corpus says about a model and its filter.

    Attributes:
        singular_values: (d,) float64.
        spectroscopy: dpi of all directions for three token groups.
        before: The sample without the filter.
        after: The sample with it.
        sample: Number of texts in the sample.
        counts: Token counts of the corpus.
        smoothing: Pseudo-count of the average token.
    """

    singular_values: Tensor
    spectroscopy: Spectroscopy
    before: Side
    after: Side
    sample: int
    counts: TokenCounts
    smoothing: float


@dataclass(frozen=True)
class LensReport:
    """Everything that the lens shows of one model.

    Attributes:
        name: Name of the model.
        metadata: Metadata of its filter.
        layers: How many of the model's blocks were run, see `Depth.parse`; None for all.
        texts: Nearest tokens of single texts.
        study: Measures on a corpus, if there was one.
    """

    name: str
    metadata: FilterMetadata
    layers: float | int | None
    texts: tuple[TextLens, ...]
    study: Study | None = None

    @property
    def d(self) -> int:
        """Width before the filter."""
        return self.metadata.d

    @property
    def k(self) -> int:
        """Width after the filter."""
        return self.metadata.k

    @property
    def band(self) -> Band:
        """Which directions the filter keeps."""
        return self.metadata.band

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; the shifts of all directions included."""
        document: dict[str, Any] = {
            "model": self.name,
            "band": str(self.band),
            "d": self.d,
            "k": self.k,
            "calibrated": self.metadata.calibration is not None,
            "layers": self.layers,
            "texts": [asdict(text) for text in self.texts],
        }
        if self.study is not None:
            shifts = self.study.spectroscopy.shifts
            document["study"] = {
                "corpus": {"texts": self.study.counts.texts, "tokens": self.study.counts.total},
                "sample": self.study.sample,
                "smoothing": self.study.smoothing,
                "before": asdict(self.study.before),
                "after": asdict(self.study.after),
                "mean_shift": {
                    name: self.study.spectroscopy.edges_and_middle(name) for name in shifts
                },
                "shift": {name: shift.tolist() for name, shift in shifts.items()},
                "singular_values": self.study.singular_values.tolist(),
            }
        return document


def open_model(
    name_or_path: str | os.PathLike[str] | Source,
    *,
    keep: float | int | None = None,
    band: str | Band | None = None,
    prompt: str | None = None,
    counts: TokenCounts | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    show_progress_bar: bool = True,
) -> tuple[SentenceTransformer, Unembedding]:
    """A filtered model and its unembedding matrix, from a filtered model or a causal LM.

    Args:
        name_or_path: Folder or Hub id of either.
        keep: For a causal LM, as in `from_causal_lm`; a filtered model has its own.
        band: Band of a causal LM's filter; "optimal" is measured with `counts`.
        prompt: Prompt recipe of a causal LM; a filtered model has its own.
        counts: Token counts, for band "optimal".
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        trust_remote_code: Allow code of the model to run.
        device: Where the model runs; None for the best at hand.
        show_progress_bar: Show bars.

    Raises:
        LensError: If a filtered model is asked to be built otherwise.
        EmbedFilterError: If the model cannot be loaded or built.
    """
    source = Source.of(
        name_or_path, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    if find_filter(source) is not None:
        if (keep, band, prompt) != (None, None, None):
            raise LensError(
                "a filtered model has a band and a prompt of its own, got keep, band or prompt for "
                f"{source.name}; give its language model to try others"
            )
        try:
            model = load(source, device=device)
            norm = _filter(model).metadata.norm
            return model, replace(source, norm=norm).unembedding()
        except EmbedFilterError:
            raise
        except (ValueError, OSError) as error:
            raise LensError(
                f"a filtered model must load with sentence-transformers, got {first_line(error)}; "
                "one with code of its own needs trust_remote_code (--trust-remote-code)"
            ) from error
    unembedding = source.unembedding()
    if band == "optimal":
        if counts is None:
            raise BandError(
                "band 'optimal' is measured on a corpus, got no token counts; pass them"
            )
        spectrum, _ = _fit(unembedding, show_progress_bar)
        shifts = spectroscopy_of_counts(unembedding, spectrum, counts).shifts
        band = optimal_band(shifts["frequent"], 0.5 if keep is None else keep)
    model = from_causal_lm(
        source,
        prompt=prompt,
        keep=keep,
        band="bulk" if band is None else band,
        device=device,
        show_progress_bar=show_progress_bar,
    )
    return model, unembedding


def load_tokenizer(
    name_or_path: str | os.PathLike[str] | Source,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, to count a corpus with before the model is opened.

    Raises:
        UnembeddingError: If there is no such model.
        LensError: If it has no tokenizer.
    """
    source = Source.of(
        name_or_path, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    source.unembedding()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, **source.for_transformers()
        )
    except (OSError, ValueError) as error:
        raise LensError(
            f"the lens needs the model's tokenizer, got none in {source.name}; add its files"
        ) from error
    return tokenizer


def look(
    model: SentenceTransformer,
    unembedding: Unembedding,
    texts: Sequence[str],
    *,
    name: str = "model",
    layers: float | int | None = None,
    top_k: int = 5,
    show_progress_bar: bool = True,
) -> LensReport:
    """The nearest tokens of texts, without and with the model's filter.

    Args:
        model: With a filter.
        unembedding: W_U of its backbone.
        texts: Texts to embed.
        name: Name of the model, for the report.
        layers: How many blocks to run, see `pooled_embeddings`.
        top_k: Tokens of each text.
        show_progress_bar: Show a bar.

    Raises:
        LensError: If the model has no filter.
    """
    found = _filter(model)
    hidden = pooled_embeddings(model, texts, layers=layers, show_progress_bar=show_progress_bar)
    filtered = _filtered(found, hidden)
    before, after = (
        [
            tuple(map(Token, *row))
            for row in zip(
                lens.tokens(model.tokenizer),
                lens.ids.tolist(),
                lens.probabilities.tolist(),
                strict=True,
            )
        ]
        for lens in (
            logit_lens(hidden, unembedding, top_k=top_k),
            logit_lens(filtered, unembedding, found.projection, top_k=top_k),
        )
    )
    shown = tuple(map(TextLens, texts, before, after))
    return LensReport(name, found.metadata, layers, shown)


def study(
    model: SentenceTransformer,
    unembedding: Unembedding,
    counts: TokenCounts,
    sample: Sequence[str],
    *,
    layers: float | int | None = None,
    smoothing: float = SMOOTHING,
    show_progress_bar: bool = True,
) -> Study:
    """Measures spectroscopy and anisotropy.

    Args:
        model: With a filter.
        unembedding: W_U of its backbone.
        counts: Token counts of a corpus, by the model's tokenizer.
        sample: Texts to embed, a few hundred.
        layers: How many blocks to run, see `pooled_embeddings`.
        smoothing: Pseudo-count of the average token, see `TokenCounts.log_probabilities`.
        show_progress_bar: Show bars.

    Raises:
        ProvenanceError: If the filter was made from another matrix, or the counts with another
            tokenizer.
        ShapeError: If the sample has fewer than two different texts.
    """
    found = _filter(model)
    counts.check_tokenizer(model.tokenizer)
    spectrum, provenance = _fit(unembedding, show_progress_bar)
    _check_source(found.metadata, unembedding, provenance)
    measured = spectroscopy_of_counts(unembedding, spectrum, counts, smoothing=smoothing)
    frequent = counts.groups()["frequent"]
    hidden = pooled_embeddings(model, sample, layers=layers, show_progress_bar=show_progress_bar)
    before, after = (
        Side(
            dims=embeddings.shape[1],
            anisotropy=anisotropy(embeddings),
            frequent_share=logit_lens(embeddings, unembedding, rows, top_k=SHARE_OF).share_of(
                frequent
            ),
        )
        for embeddings, rows in ((hidden, None), (_filtered(found, hidden), found.projection))
    )
    return Study(spectrum.singular_values, measured, before, after, len(sample), counts, smoothing)


def _filter(model: SentenceTransformer) -> EmbedFilterLayer:
    found = filter_of(model)
    if found is None:
        raise LensError("the lens compares without and with a filter, got a model without one")
    return found


def _filtered(layer: EmbedFilterLayer, hidden: Tensor) -> Tensor:
    """(n, k) on the CPU."""
    moved = hidden.to(layer.projection.device)
    filtered: Tensor = layer({FEATURE: moved})[FEATURE]
    return filtered.cpu()


def _fit(unembedding: Unembedding, show_progress_bar: bool) -> tuple[Spectrum, Provenance]:
    """The spectrum in float64, which the average token needs, and what W_U is."""
    with unembedding.progress_bar(show_progress_bar) as progress:
        return unembedding.fit(precision="float64", progress=progress)


def _check_source(metadata: FilterMetadata, unembedding: Unembedding, found: Provenance) -> None:
    expected = metadata.provenance
    sha256 = unembedding.made_as(expected, found).sha256
    if sha256 != expected.sha256:
        raise ProvenanceError(
            "the unembedding matrix must be the one that the filter was made from, got sha256 "
            f"{sha256[:12]} instead of {expected.sha256[:12]}; build the filter anew"
        )
