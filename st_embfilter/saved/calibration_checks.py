"""How `verify` repeats a calibration: its texts, the map made anew, what rounding explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor

from st_embfilter.errors import EmbedFilterError
from st_embfilter.model.calibrate import calibrate_filter, generic_texts
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.sampling import sample_texts
from st_embfilter.model.static import scale_of
from st_embfilter.saved import checks
from st_embfilter.saved.static_checks import StaticTable
from st_embfilter.spectrum.whitening import Calibration, different_texts, texts_hash
from st_embfilter.text import first_line
from st_embfilter.unembedding.source import Source

#: A calibration counts as repeated if the maps differ by at most this, relative. A choice of what
#: is proven, which no processor turns into a failure: above it, and as far as the rounding of
#: embeddings may go by theory (`calibration_error`), nothing is said.
CALIBRATION_TOLERANCE: Final = 1e-2

#: More texts than this are not sampled again: it would take a day.
MAX_SAMPLED: Final = 65_536

NOT_REPEATED: Final = "not repeated; with --rebuild it is"


def texts_of(
    record: Calibration, source: Source, given: Sequence[str] | None, *, show_progress_bar: bool
) -> list[str] | str:
    """The texts of a calibration, or why they are not at hand and what would help.

    Args:
        record: How the filter was calibrated.
        source: The language model that may have written them.
        given: Those that a user says it was made with.
        show_progress_bar: Show a bar while texts are sampled.
    """
    if given is not None:
        texts = different_texts(given)
    elif record.source == "generic":
        texts = generic_texts(record.texts)
    elif record.source != "self":
        return "made with given texts, which the model does not hold; give them (--texts)"
    elif record.texts > MAX_SAMPLED:
        return f"{record.texts} texts are not sampled again, only up to {MAX_SAMPLED}"
    else:
        try:
            texts = sample_texts(
                source, record.texts, seed=record.seed or 0, show_progress_bar=show_progress_bar
            )
        except (EmbedFilterError, OSError, ValueError) as error:
            return f"cannot sample again: {first_line(error)}; give the texts (--texts)"
    if texts_hash(texts) != record.sha256:
        if given is not None:
            return "the texts given are not those that it was made with"
        if record.source == "generic":
            return "other texts come with this version; give those that it was made with"
        return (
            "sampling gives other texts with these library versions or this machine; give the "
            "texts (--texts)"
        )
    return texts


def repeated(
    model: SentenceTransformer, texts: list[str], record: Calibration, *, show_progress_bar: bool
) -> EmbedFilterLayer:
    """The filter of a model without calibration, calibrated as the record says."""
    again = calibrate_filter(
        model,
        texts,
        strength=record.strength,
        seed=record.seed,
        show_progress_bar=show_progress_bar,
    )
    return next(m for m in again.children() if isinstance(m, EmbedFilterLayer))


def verdict(
    difference: float, made: EmbedFilterLayer, gain: Tensor | None, encoding: float
) -> tuple[bool | None, str]:
    """What a calibration made anew says of the stored one.

    Args:
        difference: Between the two, relative.
        made: The filter made anew.
        gain: g, (d,), of a folded norm.
        encoding: Error of an embedding, relative to its length.
    """
    if difference <= CALIBRATION_TOLERANCE:
        return True, f"repeated, to {difference:.1e}"
    whole = made if gain is None else checks.unfolded(made, gain)
    rounding = checks.calibration_error(whole, encoding)
    told = f"repeated, differs by {difference:.1e}, rounding explains {rounding:.1e}"
    return (False if difference > rounding else None), told


def check_table_calibration(
    held: StaticTable,
    tokenizer: Tokenizer,
    record: Calibration,
    texts: list[str],
    *,
    show_progress_bar: bool,
) -> tuple[bool | None, str]:
    """A static model's table against that of its filter calibrated anew.

    Args:
        held: The table, beside its language model.
        tokenizer: Of the static model.
        record: How it was calibrated.
        texts: What it was calibrated with.
        show_progress_bar: Show a bar while texts are encoded.
    """
    wide = StaticEmbedding(tokenizer, embedding_weights=held.states)
    bare = EmbedFilterLayer(held.rows, replace(held.metadata, calibration=None))
    model = SentenceTransformer(modules=[wide, bare], device="cpu")
    made = repeated(model, texts, record, show_progress_bar=show_progress_bar)
    with torch.no_grad():
        expected = made.linear(held.states).to(torch.float64)
    expected *= scale_of(held.table, expected)
    stored = held.table.to(torch.float64)
    centre, middle = stored.mean(0), expected.mean(0)
    spread = (stored - centre).norm()
    of_rows = float(((expected - middle) - (stored - centre)).norm() / spread)
    length = torch.maximum(centre.norm(), spread / len(stored) ** 0.5)
    of_centre = float((middle - centre).norm() / length)
    return verdict(max(of_rows, of_centre), made, held.gain, checks.encoding_error(wide))
