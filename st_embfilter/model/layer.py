"""`EmbedFilterLayer`: the filter as a sentence-transformers module."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Module, Normalize, Pooling
from torch import Tensor, nn

from st_embfilter.errors import FormatError, PlacementError, ShapeError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.hub import model_files
from st_embfilter.files.staging import staged
from st_embfilter.files.upload import upload
from st_embfilter.model.filter_files import check_parts, filter_card, load_tensors, read_parts
from st_embfilter.model.metadata import METADATA_FILE, SPECTRUM_FILE, FilterMetadata
from st_embfilter.model.modules_file import IDENTITY

FEATURE: Final = "sentence_embedding"

logger = logging.getLogger(__name__)


class EmbedFilterLayer(Module):
    """Maps a sentence embedding to the kept singular directions of the unembedding matrix.

    Computes h V_k (arXiv 2606.07502, section 4): inner products, norms and distances of the result
    equal those of the full-size projection V_k V_k^T h. The first k' outputs are the filter of
    width k'. Always float32 arithmetic and float32 output, whatever the backbone's dtype; frozen.

    A calibrated filter is an affine map of the same directions, see `calibration`.

    It goes after Pooling and before Normalize.

    Args:
        projection: (k, d) float32, in nested order; with orthonormal rows unless calibrated.
        metadata: What the filter was made from.
        singular_values: (d,) float64 of the whole spectrum, if known.
        bias: (k,) float32 of a calibrated filter.

    Raises:
        ShapeError: If the shapes are not the (k, d) and (k,) of the metadata.
    """

    config_keys: ClassVar[list[str]] = [  # type: ignore[misc]
        "in_features",
        "out_features",
        "bias",
        "activation_function",
    ]
    activation_function: Final = IDENTITY

    def __init__(
        self,
        projection: Tensor,
        metadata: FilterMetadata,
        singular_values: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if tuple(projection.shape) != (metadata.k, metadata.d):
            raise ShapeError(
                f"the projection must have the shape of its metadata, {(metadata.k, metadata.d)}, "
                f"got {tuple(projection.shape)}"
            )
        if bias is not None and tuple(bias.shape) != (metadata.k,):
            raise ShapeError(f"the bias must have shape ({metadata.k},), got {tuple(bias.shape)}")
        self.metadata = metadata
        self.singular_values = singular_values
        # The state's key is Dense's "linear.weight", so the saved folder is also a Dense.
        self.linear = _FrozenLinear(
            projection.to(torch.float32), None if bias is None else bias.to(torch.float32)
        )

    @property
    def projection(self) -> Tensor:
        """(k, d) float32, rows in nested order; orthonormal unless calibrated."""
        return self.linear.weight

    def weights(self) -> dict[str, Tensor]:
        """The tensors of a saved filter, by the names that `Dense` gives them, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.state_dict().items()}

    @property
    def bias(self) -> bool:
        """Whether a bias is added; the value in the configuration."""
        return self.linear.bias is not None

    @property
    def in_features(self) -> int:
        """Width d of the embeddings that go in."""
        return self.projection.shape[1]

    @property
    def out_features(self) -> int:
        """Width k of the embeddings that come out."""
        return self.projection.shape[0]

    def get_embedding_dimension(self) -> int:
        """Width k of the embeddings that come out."""
        return self.out_features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Replaces `sentence_embedding` (.., d) by its filtered form (.., k), float32.

        Raises:
            PlacementError: If there is no `sentence_embedding` yet.
            ShapeError: If its width is not d.
        """
        embedding = features.get(FEATURE)
        if embedding is None:
            raise PlacementError(
                "EmbedFilterLayer must stand after Pooling, got features without "
                f"{FEATURE!r}; put it after the module that pools"
            )
        if embedding.shape[-1] != self.in_features:
            raise ShapeError(
                f"this filter takes embeddings of width {self.in_features}, got "
                f"{embedding.shape[-1]}; build it from the unembedding matrix of this backbone"
            )
        features[FEATURE] = self.linear(embedding)
        return features

    def on_model_ready(self, model: nn.Module) -> None:
        """Hook of sentence-transformers: checks the place in the pipeline."""
        check_placement(model.children())

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Writes a folder that is valid for `Dense`, plus the metadata and the spectrum.

        sentence-transformers calls it from its own `save_pretrained`.
        """
        logger.warning(
            "%s is in the form of sentence-transformers, which loads only with trust_remote_code "
            "and this package; st_embfilter.save_pretrained(model, path) writes the form that "
            "loads everywhere",
            output_path,
        )
        self._write(output_path, safe_serialization)

    def _write(self, output_path: str, safe_serialization: bool = True) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)
        write_metadata(output_path, self)

    @classmethod
    def load(  # type: ignore[override] # the other parameters are in kwargs
        cls, model_name_or_path: str, **kwargs: Any
    ) -> EmbedFilterLayer:
        """Loads a saved layer from a folder or the Hub.

        Args:
            model_name_or_path: Folder or Hub id of the model that holds it.
            **kwargs: As in `Module.load`: subfolder, token, cache_folder, revision,
                local_files_only; others are ignored.

        Raises:
            FormatError: If the metadata is missing or contradicts the weights.
        """
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in names if name in kwargs}
        metadata_file = cls.load_file_path(model_name_or_path, METADATA_FILE, **where)
        if metadata_file is None:
            raise FormatError(
                f"a saved EmbedFilterLayer must hold {METADATA_FILE}, got none in "
                f"{model_name_or_path}/{kwargs.get('subfolder', '')}"
            )
        weights = cls.load_torch_weights(model_name_or_path, **where)
        spectrum_file = cls.load_file_path(model_name_or_path, SPECTRUM_FILE, **where)
        parts = check_parts(
            weights,
            FilterMetadata.from_json(Path(metadata_file).read_bytes()),
            None if spectrum_file is None else load_tensors(Path(spectrum_file)),
        )
        return cls(*parts)

    def save_pretrained(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes the filter alone, without the model: a few megabytes.

        The folder appears complete or not at all. `from_pretrained` reads it, and as a module it is
        a valid `Dense`.

        Args:
            path: Target folder; must be missing or empty.
            overwrite: Replace a folder of ours that is there already.

        Returns:
            The target folder.

        Raises:
            OutputError: If the target is not empty, or cannot be written.
        """
        with staged(path, overwrite=overwrite) as folder:
            self._fill(folder)
        return Path(path).absolute()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Publishes the filter alone on the Hub, as one commit.

        Args:
            repo_id: E.g. "org/name"; made if it does not exist.
            private: Visibility of a new repository; one that exists keeps its own.
            revision: Branch to commit to, made if need be; None for the main one.
            create_pr: Open a pull request instead of committing to the branch.
            commit_message: Its first line.
            token: Hub token; None for the one that is logged in or in `HF_TOKEN`.

        Returns:
            What huggingface_hub says about the commit.

        Raises:
            HubError: If the Hub refuses.
        """
        with TemporaryDirectory(prefix="st-embfilter-") as folder:
            self._fill(Path(folder), repo_id)
            return upload(
                folder,
                repo_id,
                commit_message=commit_message or "Add EmbedFilter filter",
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
    ) -> EmbedFilterLayer:
        """Loads a filter that was saved alone, or the filter of a saved model.

        Args:
            name_or_path: Folder or Hub id.
            revision: Branch, tag or commit on the Hub.
            token: Hub token.
            cache_folder: The Hub cache, if not the usual one.
            local_files_only: Take files from that cache only.

        Raises:
            FormatError: If there is no filter, or its files contradict each other.
            HubError: If the Hub, the repository or the revision cannot be reached.
        """
        files = model_files(
            name_or_path,
            revision=revision,
            token=token,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
        )
        return read_filter(files)

    def _fill(self, folder: Path, *name: str) -> None:
        self._write(str(folder))
        (folder / "README.md").write_text(filter_card(self.metadata, *name), encoding="utf-8")


class _FrozenLinear(nn.Module):
    """x W^T + b in float32 with values that no training and no cast changes."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(torch.float32), self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _FrozenLinear:
        # .half() and .to(dtype) may move the weight to another device, never change its dtype.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            after = self.get_buffer(name)
            if after.dtype != value.dtype:
                setattr(self, name, value.to(after.device))
        return self


# The public path is a file format: modules.json of saved models names it.
EmbedFilterLayer.__module__ = "st_embfilter"


def write_metadata(folder: str | os.PathLike[str], layer: EmbedFilterLayer) -> None:
    """Writes the metadata and, where it is known, the spectrum."""
    folder = Path(folder)
    (folder / METADATA_FILE).write_text(layer.metadata.to_json(), encoding="utf-8")
    if layer.singular_values is not None:
        save_file({"singular_values": layer.singular_values.cpu()}, folder / SPECTRUM_FILE)


def read_filter(files: ModelFiles, folder: str | None = None) -> EmbedFilterLayer:
    """The filter among the files of a model, see `read_parts`."""
    return EmbedFilterLayer(*read_parts(files, folder))


def check_placement(modules: Iterable[nn.Module]) -> None:
    """Checks that the filter stands once, after pooling and before normalisation.

    Raises:
        PlacementError: Says what stands where.
    """
    modules = list(modules)
    names = " > ".join(type(module).__name__ for module in modules)
    filters = [i for i, module in enumerate(modules) if isinstance(module, EmbedFilterLayer)]
    normalizers = [i for i, module in enumerate(modules) if isinstance(module, Normalize)]
    if len(filters) > 1:
        raise PlacementError(f"a model holds one EmbedFilterLayer at most, got {names}")
    if not filters:
        return
    if any(position < filters[0] for position in normalizers):
        raise PlacementError(
            f"EmbedFilterLayer must stand before Normalize, got {names}; filter first, so that "
            "the filtered embeddings have unit length"
        )
    before = modules[: filters[0]]
    if any(isinstance(module, Pooling) for module in modules) and not any(
        isinstance(module, Pooling) for module in before
    ):
        raise PlacementError(f"EmbedFilterLayer must stand after Pooling, got {names}")
    if any(isinstance(module, Dense) for module in before):
        raise PlacementError(
            f"EmbedFilterLayer must stand directly after Pooling, got {names}; a Dense layer "
            "before it leaves the space of the unembedding matrix"
        )


def filter_of(model: SentenceTransformer) -> EmbedFilterLayer | None:
    """The model's filter, or None."""
    return next((m for m in model.children() if isinstance(m, EmbedFilterLayer)), None)
