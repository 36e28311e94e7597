"""Checks of a saved filtered model: what its files promise, held against one another and W_U."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_embfilter.errors import EmbedFilterError, FormatError, HubError
from st_embfilter.files.folder import ModelFiles, links_out
from st_embfilter.model.depth import text_config
from st_embfilter.model.find import find_filter
from st_embfilter.model.gguf_backbone import readable
from st_embfilter.model.layer import EmbedFilterLayer, read_filter
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.saved import (
    baked_checks,
    calibration_checks,
    checks,
    file_checks,
    layout,
    static_checks,
)
from st_embfilter.saved.card_rules import check_card, stated_base
from st_embfilter.saved.checks import Check, attempt, measured_spectrum
from st_embfilter.saved.load import load, read_saved
from st_embfilter.saved.prompt_checks import check_prompt
from st_embfilter.saved.runtimes import older_layout
from st_embfilter.saved.static import read_table
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.text import shown
from st_embfilter.unembedding.matrix import Unembedding
from st_embfilter.unembedding.source import Source


def verify(
    path: str | os.PathLike[str],
    *,
    rebuild: bool = False,
    texts: Sequence[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> list[Check]:
    """Checks a saved filtered model, or a filter alone.

    Only what `save_pretrained` writes can be proven. Nothing of the model runs, unless a calibrated
    filter is rebuilt. The unembedding matrix is read once, from the model itself, or from its base
    model where the model holds none: of a static model every row of the table is held against that,
    and of a baked one every tensor.

    Args:
        path: Folder or Hub id.
        rebuild: Also compare the spaces of all prefixes with the filter built anew, repeat a
            calibration, and download the weights of a model on the Hub to check them.
        texts: What the filter was calibrated with, if not with generic texts or the model's own.
        base: Folder, GGUF file or Hub id of the language model that a filter alone, a static or a
            baked model was made from; of others, what texts begin with is held against it.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        trust_remote_code: Allow model code of the checkpoint to run.
        show_progress_bar: Show a bar while texts are sampled.

    Returns:
        The checks in the order in which they were made. A failed one may end the list.
    """
    source = Source(
        os.fspath(path), revision=revision, token=token, trust_remote_code=trust_remote_code
    )
    job = _Job(source, rebuild, texts, None if base is None else os.fspath(base), show_progress_bar)
    return list(job.checks())


@dataclass
class _Job:
    """One run of the checks, over one view of the files."""

    source: Source
    rebuild: bool
    texts: Sequence[str] | None
    base: str | None
    bar: bool
    code: tuple[str, ...] = field(default=(), init=False)

    @property
    def files(self) -> ModelFiles:
        return self.source.files

    def checks(self) -> Iterator[Check]:
        found = self._folded()
        if found is not None:
            yield from found
            return
        try:
            alone = self.files.path(MODULES_FILE) is None
            # Which classes and code there may be is checked below, whatever is trusted.
            layer = (
                read_filter(self.files, "")
                if alone
                else read_saved(self.files, trust_remote_code=True)
            )
        except EmbedFilterError as error:
            yield Check("files", False, str(error))
            return
        form = "a filter alone" if alone else "modules, configuration, metadata and weights agree"
        yield Check("files", True, form)
        metadata = layer.metadata
        yield Check("window", True, f"{metadata.band} band, {metadata.k} of {metadata.d}")
        if metadata.norm is None:
            yield attempt("rows", lambda: checks.check_rows(layer))
        else:  # what they are divided by is in the model
            self.source = replace(self.source, norm=metadata.norm)
        if self.source.is_folder:
            yield attempt("links", self._links)
        if not alone:
            yield attempt("modules", lambda: self._modules(layer))
            yield attempt("prompt", lambda: self._prompt(metadata))
            yield attempt("layout", lambda: self._layout(metadata.prompt is not None))
            yield attempt("card", lambda: self._card(metadata))
            if metadata.depth is not None:
                yield attempt("depth", lambda: self._depth(layer))
        yield from self._against_the_matrix(layer, alone)

    def _folded(self) -> list[Check] | None:
        """The checks of a static or baked model, whose filter is no module of its own."""
        try:
            baked = baked_checks.find_baked(self.files)
            found = None if baked is not None else find_filter(self.source)
        except FormatError as error:
            static = self.files.path(static_checks.TABLE_FILE) is not None
            return [Check("files", False, str(error))] if static else None
        except EmbedFilterError:
            return None
        if baked is not None:
            return [Check("files", True, "a filter baked into the weights"), *self._baked(baked)]
        depth = None if found is None else found.metadata.depth
        if found is None or depth is None or depth.layers > 0:
            return None
        metadata = found.metadata
        kept = f"{metadata.band} band, {metadata.k} of {metadata.d}, no block of {depth.of}"
        checked = [
            Check("window", True, kept),
            *([attempt("links", self._links)] if self.source.is_folder else []),
            attempt("modules", lambda: static_checks.check_static_modules(self.files, metadata)),
            attempt("card", lambda: self._card(metadata)),
        ]
        try:
            table = read_table(self.files.path(static_checks.TABLE_FILE), metadata)
        except FormatError as error:
            return [Check("files", False, str(error)), *checked]
        held = f"a finite table of {table.shape[0]:,} x {table.shape[1]}, {table.dtype}"
        return [Check("files", True, held), *checked, *self._static_source(metadata, table)]

    def _static_source(self, metadata: FilterMetadata, table: Tensor) -> Iterator[Check]:
        """Every row of a static model's table against its language model."""
        self.source = replace(self.source, norm=metadata.norm)
        found, checked = self._source_matrix(metadata)
        yield from checked
        if found is None:
            return
        base, spectrum = found
        try:
            states, tokenizer = static_checks.states_of(base, metadata)
        except EmbedFilterError as error:
            yield Check("rows", False, str(error))
            return
        stored = self.files.path(static_checks.TOKENIZER_FILE)
        yield attempt("tokenizer", lambda: static_checks.check_tokenizer(stored, tokenizer))
        if len(table) != len(states):
            yield Check("rows", False, f"{len(table)} tokens, the language model has {len(states)}")
            return
        held = static_checks.StaticTable(table, metadata, states, spectrum, base.unembedding().gain)
        yield attempt("rows", lambda: static_checks.check_table_rows(held))
        record = metadata.calibration
        if record is None:
            return

        def calibration() -> tuple[bool | None, str]:
            if not self.rebuild:
                return None, calibration_checks.NOT_REPEATED
            texts = calibration_checks.texts_of(
                record, base, self.texts, show_progress_bar=self.bar
            )
            if isinstance(texts, str):
                return None, texts
            return calibration_checks.check_table_calibration(
                held, tokenizer, record, texts, show_progress_bar=self.bar
            )

        yield attempt("calibration", calibration)

    def _baked(self, metadata: FilterMetadata) -> Iterator[Check]:
        """A folder with rotated weights: by itself, then against the model it was made of."""
        own = replace(self.source, norm=None)
        kept = f"{metadata.band} band, the first {metadata.k} of {metadata.d}"
        yield Check("window", True, kept)
        if self.source.is_folder:
            yield attempt("links", self._links)
        yield attempt("modules", lambda: baked_checks.check_baked_modules(self.files, metadata.d))
        yield attempt("prompt", lambda: self._prompt(metadata))
        yield attempt("card", lambda: self._card(metadata))
        try:
            unembedding = own.unembedding()
        except EmbedFilterError as error:
            yield Check("backbone", False, str(error))
            return
        yield attempt("backbone", lambda: self._backbone(unembedding))
        yield attempt("gains", lambda: baked_checks.check_gains(own))
        yield attempt("directions", lambda: baked_checks.check_gram(unembedding, metadata))
        self.source = replace(self.source, norm="folded")
        found, checked = self._source_matrix(metadata)
        yield from checked
        if found is None:
            return
        origin, matrix = found
        yield attempt("config", lambda: baked_checks.check_config(own, origin, metadata))
        yield attempt("tokenizer", lambda: baked_checks.check_tokenizer(own, origin, metadata))
        yield attempt("rows", lambda: baked_checks.check_weights(own, origin, matrix, metadata))

    def _source_matrix(
        self, metadata: FilterMetadata
    ) -> tuple[tuple[Source, Spectrum] | None, list[Check]]:
        """The language model that a filter was made from and the spectrum of its W_U, if at hand.

        And the checks on the way there: its hash, or why there is nothing to compare rows with.
        """
        try:
            base = self._made_from(metadata, whole=True)
            unembedding = base.unembedding()
        except (HubError, _UnknownError) as error:
            return None, [Check("unembedding", None, f"{error}; give base= (--base)")]
        except EmbedFilterError as error:
            return None, [Check("unembedding", False, str(error))]
        # Float32 would leave more signs and more turns of directions open.
        spectrum, check = measured_spectrum(unembedding, metadata, "float64")
        if spectrum is None:
            return None, [check]
        if unembedding.stored.remote and not self.rebuild:
            told = "the base model was not downloaded; with --rebuild it is"
            return None, [check, Check("rows", None, told)]
        return (base, spectrum), [check]

    def _depth(self, layer: EmbedFilterLayer) -> tuple[bool, str]:
        """The config must have as many blocks as the metadata say."""
        depth = layer.metadata.depth
        blocks = text_config(self.source.config()).num_hidden_layers
        if depth is not None and blocks != depth.layers:
            return False, f"config.json has {blocks} blocks, embfilter.json says {depth.layers}"
        return True, f"{blocks} blocks" + ("" if depth is None else f" of {depth.of}")

    def _against_the_matrix(self, layer: EmbedFilterLayer, alone: bool) -> Iterator[Check]:
        try:
            unembedding = self._unembedding(layer, alone)
        except (HubError, _UnknownError) as error:
            unreachable = alone or isinstance(error, _UnknownError)
            yield Check("unembedding", None if unreachable else False, f"{error}; give base=")
            return
        except EmbedFilterError as error:
            yield Check("unembedding", False, str(error))
            return
        saved, gain = layer, unembedding.gain
        if gain is not None:
            layer = checks.unfolded(saved, gain)
            yield attempt("rows", lambda: checks.check_rows(layer))
        if not alone:
            yield attempt("backbone", lambda: self._backbone(unembedding))
        found, check = measured_spectrum(unembedding, layer.metadata)
        yield check
        if found is None:
            return
        spectrum = found
        yield attempt("directions", lambda: checks.check_directions(spectrum, layer))
        yield attempt("spectrum", lambda: checks.check_spectrum(spectrum, layer))
        if self.rebuild:
            yield attempt("rebuild", lambda: checks.check_prefixes(spectrum, layer))
        if layer.metadata.calibration is not None:
            yield attempt("calibration", lambda: self._calibration(saved, layer, gain, alone))

    def _links(self) -> tuple[bool, str]:
        found = links_out(Path(self.source.name))
        if found:
            return False, f"{len(found)} links out of the folder, e.g. {shown(found[0])}"
        return True, "none leads out of the folder"

    def _modules(self, layer: EmbedFilterLayer) -> tuple[bool | None, str]:
        found, self.code = file_checks.check_modules(self.files, layer.in_features)
        return found

    def _prompt(self, metadata: FilterMetadata) -> tuple[bool | None, str]:
        base = None if self.base is None else self._other(self.base, None)
        return check_prompt(self.source, metadata.prompt, metadata.d, base)

    def _layout(self, prompted: bool) -> tuple[bool, str]:
        """Never a failure: an older folder holds the same model."""
        changes = list(older_layout(self.files, prompted=prompted))
        if not changes:
            return True, "for every runtime"
        told = "; ".join(changes)
        return True, f"of an older version: {told}; st_embfilter.load and save it anew"

    def _card(self, metadata: FilterMetadata) -> tuple[bool, str]:
        path = self.files.path(layout.CARD_FILE)
        if path is None:
            raise FormatError(f"a saved model must hold {layout.CARD_FILE}, got none")
        text = path.read_text(encoding="utf-8", errors="replace")
        check_card(text)
        stated, base = stated_base(text), metadata.provenance.model_id
        if stated is not None and stated != base:
            return False, f"names the base model {stated}, embfilter.json says {base}"
        return True, "valid metadata" + ("" if stated is None else f", base model {stated}")

    def _unembedding(self, layer: EmbedFilterLayer, alone: bool) -> Unembedding:
        if not alone:
            return self.source.unembedding()
        # Without such a hash it was made from the rows of W_U as they are in the file.
        whole = layer.metadata.provenance.gguf_sha256 is not None
        return self._made_from(layer.metadata, whole=whole).unembedding()

    def _made_from(self, metadata: FilterMetadata, *, whole: bool) -> Source:
        """The language model that a filter was made from.

        Args:
            metadata: Of the filter.
            whole: Whether all weights are needed: those of a GGUF file are then dequantised into
                the dtype that they had when the filter was made.
        """
        made_from = metadata.provenance
        if self.base is not None:
            base = self._other(self.base, None)
            if not whole:
                return base
            opened, _ = readable(base, made_from.dtype, show_progress_bar=self.bar)
            return opened if opened is base else replace(opened, norm=base.norm)
        if made_from.model_id is None or made_from.revision is None:
            raise _UnknownError(
                f"made from {shown(made_from.model_id or 'an unnamed model')}, which is on no Hub"
            )
        return self._other(made_from.model_id, made_from.revision)

    def _other(self, name: str, revision: str | None) -> Source:
        return replace(self.source, name=name, revision=revision)

    def _backbone(self, unembedding: Unembedding) -> tuple[bool | None, str]:
        """Loads the backbone as sentence-transformers does, for what that would hide."""
        if unembedding.stored.remote and not self.rebuild:
            return None, "the weights were not downloaded; with --rebuild they are"
        return checks.check_backbone(self.source)

    def _calibration(
        self, layer: EmbedFilterLayer, turned: EmbedFilterLayer, gain: Tensor | None, alone: bool
    ) -> tuple[bool | None, str]:
        """Repeats the calibration of a filter; `turned` is the filter without a folded gain."""
        record = layer.metadata.calibration
        if record is None or not self.rebuild:
            return None, calibration_checks.NOT_REPEATED
        if self.code and not self.source.trust_remote_code:
            # Its code may be ours, but trust would let other code of the folder run too.
            return None, f"runs {', '.join(self.code)}; with --trust-remote-code it is repeated"
        if alone:
            return None, "needs the model that the filter was calibrated in; verify that one"
        texts = calibration_checks.texts_of(
            record, self.source, self.texts, show_progress_bar=self.bar
        )
        if isinstance(texts, str):
            return None, texts
        model = load(self.source, device="cpu")
        projection = checks.directions_of(turned)
        bare = EmbedFilterLayer(
            projection if gain is None else projection / gain,
            replace(layer.metadata, calibration=None),
        )
        modules = [bare if isinstance(m, EmbedFilterLayer) else m for m in model.children()]
        plain = SentenceTransformer(modules=modules, device="cpu")
        made = calibration_checks.repeated(plain, texts, record, show_progress_bar=self.bar)
        difference = max(
            float((value - layer.weights()[key]).norm() / value.norm())
            for key, value in made.weights().items()
        )
        return calibration_checks.verdict(difference, made, gain, checks.encoding_error(model))


class _UnknownError(EmbedFilterError):
    """Where the unembedding matrix is, is not known here."""
