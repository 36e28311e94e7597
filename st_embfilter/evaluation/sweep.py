"""Sweeps: every filter and baseline on every task, from one encoding of the texts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from st_embfilter.errors import DataError
from st_embfilter.evaluation.baselines import (
    FITTED,
    Configuration,
    Folded,
    Transform,
    baseline_names,
    grid,
)
from st_embfilter.evaluation.bootstrap import Floats, Outcome, interval, replicates
from st_embfilter.evaluation.depth import DepthStore
from st_embfilter.evaluation.tasks import Releasable, Task
from st_embfilter.evaluation.vectors import Vectors, VectorStore
from st_embfilter.model.backbone import DEFAULT_MAX_SEQ_LENGTH, backbone_model
from st_embfilter.model.build import from_causal_lm
from st_embfilter.model.depth import block_stack
from st_embfilter.model.find import find_filter
from st_embfilter.model.layer import EmbedFilterLayer, filter_of
from st_embfilter.saved.load import load
from st_embfilter.saved.results import Result
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.text import progress_bar
from st_embfilter.unembedding.source import Source

logger = logging.getLogger(__name__)

#: Largest number of texts that data-driven baselines are fitted on.
FIT_TEXTS: Final = 10_000


@dataclass(frozen=True)
class RawModel:
    """A model without its filter, and the spectrum that filters are made of.

    Attributes:
        model: Transformer and Pooling.
        spectrum: Spectrum of its unembedding matrix.
        name: Folder name or Hub id.
        prompt: Prompt recipe, None for plain text.
        normalize: Whether its embeddings are to have unit length.
        layer: The filter that was taken off a filtered model.
        folded: For bands of a folded norm.
    """

    model: SentenceTransformer
    spectrum: Spectrum
    name: str | None = None
    prompt: str | None = None
    normalize: bool = False
    layer: EmbedFilterLayer | None = None
    folded: Folded | None = None

    @property
    def pooling(self) -> str | None:
        """Pooling mode, None for a model without a plain `Pooling`."""
        modules = (module for module in self.model.children() if isinstance(module, Pooling))
        pooling = next(modules, None)
        if pooling is None:
            return None
        mode = pooling.pooling_mode
        return mode if isinstance(mode, str) else "+".join(mode)


def raw_model(
    name_or_path: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    pooling: str | None = None,
    normalize: bool = False,
    max_seq_length: int | None = DEFAULT_MAX_SEQ_LENGTH,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    folded: bool = False,
    show_progress_bar: bool = True,
) -> RawModel:
    """The unfiltered form of a causal language model or of a filtered model.

    Args:
        name_or_path: Folder or Hub id of a causal language model; or of a filtered model, which
            brings its own recipe, pooling, normalisation and length.
        prompt: Prompt recipe, as in `from_causal_lm`.
        pooling: Pooling mode, as in `from_causal_lm`.
        normalize: Embeddings of unit length.
        max_seq_length: Longest text in tokens; None for the model's own limit.
        device: Where the model runs; None for the best at hand.
        dtype: Dtype of the backbone, as in transformers.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        trust_remote_code: Allow model code of the checkpoint to run.
        folded: Also read the spectrum of W_U diag(g), for configurations "folded"; always read for
            a filtered model of `norm="folded"`.
        show_progress_bar: Show a bar while the unembedding matrix is read.

    Raises:
        DataError: If a filtered model is given a prompt or a pooling.
    """
    source = Source.of(
        name_or_path, revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    name = source.name
    found = find_filter(source)
    if found is not None:
        if (prompt, pooling) != (None, None):
            raise DataError(
                "a filtered model has a prompt and a pooling of its own, got prompt or pooling for "
                f"{name}; give the language model that it was made from"
            )
        model = load(source, device=device)
    else:
        model = from_causal_lm(
            source,
            prompt=prompt,
            pooling=pooling,
            keep=1.0,
            normalize=normalize,
            max_seq_length=max_seq_length,
            device=device,
            dtype=dtype,
            show_progress_bar=show_progress_bar,
        )
    layer = filter_of(model)
    recipe = None if layer is None else layer.metadata.prompt
    unit = any(isinstance(module, Normalize) for module in model.children())
    with_gain: Folded | None = None
    # Every band of a sweep must be exact, so the sums are float64.
    spectrum, _ = source.unembedding().fit(precision="float64")
    if folded or (found is not None and layer is not None and layer.metadata.norm == "folded"):
        matrix = replace(source, norm="folded").unembedding()
        if matrix.gain is not None:
            with_gain = Folded(matrix.fit(precision="float64")[0], matrix.gain)
    return RawModel(
        without_filter(model),
        spectrum,
        Path(name).resolve().name if source.is_folder else name,
        prompt or (None if recipe is None else str(recipe["recipe"])),
        unit,
        None if found is None else layer,
        with_gain,
    )


def without_filter(model: SentenceTransformer) -> SentenceTransformer:
    """The same model, changed in place, without filter and normalisation."""
    for name, module in list(model.named_children()):
        if isinstance(module, EmbedFilterLayer | Normalize):
            del model._modules[name]
    return model


@dataclass(frozen=True)
class Filtered:
    """An encoder: vectors from the store, mapped."""

    store: VectorStore
    transform: Transform

    def encode(
        self, texts: Sequence[str], *, method: str = "encode", prompt: str | None = None
    ) -> Vectors:
        """Mapped vectors (n, k) of texts."""
        return self.transform(self.store.encode(texts, method=method, prompt=prompt))


def default_configurations() -> list[Configuration]:
    """The filter and everything it should be compared with, at d/2, d/4 and d/8."""
    return grid(["bulk", *baseline_names()])


def sweep(
    raw: RawModel,
    tasks: Sequence[Task],
    configurations: Sequence[Configuration] | None = None,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    fit_texts: Sequence[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    show_progress_bar: bool = True,
) -> Iterator[Result]:
    """Measures configurations on tasks; every text is encoded once.

    Args:
        raw: The unfiltered model.
        tasks: What to measure on.
        configurations: What to measure, None for `default_configurations`. The raw model is always
            measured, and first.
        layers: Depths to measure, or "all", each with every configuration, from one encoding; None
            for the whole model. The raw model at its full depth is always measured, and first.
        fit_texts: Texts that data-driven baselines are fitted on; None for a sample of the task's
            own texts, without their labels.
        cache: Folder for raw vectors, None for none.
        batch_size: Texts in a batch of the model.
        resamples: Bootstrap samples; 0 for no intervals.
        level: Coverage of the intervals in (0, 1).
        seed: Seed of the bootstrap and of the sample for data-driven baselines.
        show_progress_bar: Show bars.

    Yields:
        A row as soon as it is measured. A baseline that cannot be fitted on so few texts is left
        out with a warning.
    """
    chosen = default_configurations() if configurations is None else list(configurations)
    chosen = [Configuration("raw"), *(c for c in chosen if c.name != "raw")]
    for configuration in chosen:
        configuration.dims(raw.spectrum.d)  # one that does not fit is an error before any encoding
    stores = _stores(raw, layers, cache, batch_size, show_progress_bar)
    samples: dict[int | None, Vectors] = {}
    for depth, store in stores.items() if fit_texts is not None else ():
        samples[depth] = store.encode(list(fit_texts or ()))
        store.forget()
    fitted_on = "the task's own texts" if fit_texts is None else f"{len(fit_texts)} given texts"
    with progress_bar(
        "Sweep", "score", len(tasks) * len(stores) * len(chosen), show=show_progress_bar
    ) as bar:
        for task in tasks:
            bar.set_description(task.info.name)
            reference: tuple[Outcome, Floats | None] | None = None
            for (depth, store), configuration in product(stores.items(), chosen):
                bar.update()
                own = configuration.name in FITTED and fit_texts is None
                texts = store.seen(FIT_TEXTS, seed) if own else samples.get(depth)
                try:
                    outcomes = _outcomes(raw, store, task, configuration, texts)
                except DataError as error:
                    if configuration.name not in FITTED:
                        raise
                    logger.warning("%s: left out, %s", task.info.name, error)
                    continue
                outcome = Outcome.mean(outcomes)
                if not math.isfinite(outcome.score):  # a prompt's last token, before any block
                    logger.warning(
                        "%s: %s left out at %s blocks, where all texts have the same embedding",
                        task.info.name,
                        configuration.name,
                        depth,
                    )
                    continue
                drawn = replicates(outcome, resamples, seed) if resamples else None
                reference = reference or (outcome, drawn)
                difference = None
                if drawn is not None and reference[1] is not None:
                    difference = interval(drawn - reference[1], level)
                scores = None if drawn is None else interval(drawn, level)
                yield Result(
                    task=task.info.name,
                    task_type=task.info.task_type,
                    dataset=task.info.dataset,
                    revision=task.info.revision,
                    split=task.info.split,
                    metric=task.info.metric,
                    configuration=configuration.name,
                    dims=configuration.dims(raw.spectrum.d),
                    full_dims=raw.spectrum.d,
                    start=configuration.start(raw.spectrum.d),
                    needs_data=configuration.needs_data,
                    fitted_on=_fitted_on(configuration, fitted_on),
                    score=outcome.score,
                    low=None if scores is None else scores[0],
                    high=None if scores is None else scores[1],
                    delta=outcome.score - reference[0].score,
                    delta_low=None if difference is None else difference[0],
                    delta_high=None if difference is None else difference[1],
                    std=float(np.std([o.score for o in outcomes], ddof=1))
                    if len(outcomes) > 1
                    else None,
                    level=level,
                    resamples=resamples,
                    units=outcome.units,
                    model=raw.name,
                    prompt=raw.prompt,
                    pooling=raw.pooling,
                    normalize=raw.normalize,
                    max_seq_length=raw.model.max_seq_length,
                    measured_by=task.info.measured_by,
                    layers=depth,
                )
                if configuration == chosen[-1]:
                    store.forget()
            for store in stores.values():
                store.forget()
            if isinstance(task, Releasable):
                task.release()


def _stores(
    raw: RawModel,
    layers: Sequence[int] | Literal["all"] | None,
    cache: str | os.PathLike[str] | None,
    batch_size: int,
    show_progress_bar: bool,
) -> dict[int | None, VectorStore]:
    """Where vectors come from, by depth, the whole model first."""
    options: dict[str, Any] = {
        "cache": cache,
        "batch_size": batch_size,
        "show_progress_bar": show_progress_bar,
    }
    if layers is None:
        return {None: VectorStore(raw.model, **options)}
    full = len(block_stack(backbone_model(raw.model))[1])
    asked = range(full) if layers == "all" else layers
    depths = DepthStore(raw.model, [full, *asked], **options)
    return {depth: depths.at(depth) for depth in depths.layers}


def _fitted_on(configuration: Configuration, texts: str) -> str | None:
    if configuration.name in FITTED:
        return texts
    if configuration.name == "calibrated":
        return "its calibration texts"
    return "token counts" if configuration.order is not None else None


def _outcomes(
    raw: RawModel,
    store: VectorStore,
    task: Task,
    configuration: Configuration,
    sample: Vectors | None,
) -> list[Outcome]:
    transforms = configuration.transforms(
        raw.spectrum, sample, normalize=raw.normalize, layer=raw.layer, folded=raw.folded
    )
    return [task.run(Filtered(store, transform)) for transform in transforms]
