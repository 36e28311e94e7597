"""Where a language model is, as one object: its files, all of one commit, and its W_U."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from st_embfilter.errors import UnembeddingError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.hub import is_repo_id, model_files
from st_embfilter.files.stored import StoredTensor
from st_embfilter.files.tensors import open_checkpoint
from st_embfilter.unembedding.adapter import Adapter
from st_embfilter.unembedding.gguf import find_gguf, read_gguf, read_gguf_gain
from st_embfilter.unembedding.head import (
    find_output_embedding,
    meta_model,
    output_embedding,
    reason_of,
    stored_name,
)
from st_embfilter.unembedding.matrix import Unembedding, unembedding_of_tensor
from st_embfilter.unembedding.residual import check_gain, final_norm

CONFIG_FILE: Final = "config.json"

#: With this key of a config, transformers reads the weights from another file than all others do.
OTHER_WEIGHTS: Final = "transformers_weights"


@dataclass(frozen=True)
class Source:
    """A model that lies somewhere: a folder, a GGUF file, or one commit of a Hub repository.

    What is read is read once: the first file that is found pins the commit for all others, and the
    unembedding matrix is looked for at its first use.

    Attributes:
        name: Folder, GGUF file or Hub id; a folder goes before a repository of the same name.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        trust_remote_code: Whether model code of the checkpoint may run.
        masked_lm: Whether the model is a masked language model, whose decoder matrix is taken;
            outside the paper.
        cache_folder: The Hub cache, if not the usual one.
        local_files_only: Whether files come from that cache only.
        gguf_sha256: Hash of the GGUF file that the folder was made from, if it was.
        norm: "folded" for an unembedding matrix with the gain of the norm before it.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    masked_lm: bool = False
    cache_folder: str | None = None
    local_files_only: bool = False
    gguf_sha256: str | None = None
    norm: str | None = None

    def __post_init__(self) -> None:
        if self.name.lower().endswith(".gguf") and not os.path.exists(self.name):
            raise UnembeddingError(f"a GGUF file must exist, got {self.name}; check the path")

    @classmethod
    def of(cls, source: str | os.PathLike[str] | Source, **options: Any) -> Source:
        """A source by its name, or itself.

        Args:
            source: Folder, GGUF file or Hub id; or a source, which has options of its own.
            **options: The other attributes.
        """
        return source if isinstance(source, Source) else cls(os.fspath(source), **options)

    @cached_property
    def files(self) -> ModelFiles:
        """The model's files; those of an adapter, not of its base model."""
        return model_files(
            self.name,
            revision=self.revision,
            token=self.token,
            cache_folder=self.cache_folder,
            local_files_only=self.local_files_only,
        )

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return os.path.isdir(self.name)

    def for_transformers(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` beside the name, with the pinned commit as revision.

        Raises:
            HubError: If the Hub, the repository or the revision cannot be reached.
        """
        if self.files.commit is None:
            self.files.path(CONFIG_FILE)
        options: dict[str, Any] = {
            "revision": self.files.commit or self.revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }
        if self.cache_folder is not None:
            options["cache_dir"] = self.cache_folder
        if self.local_files_only:
            options["local_files_only"] = True
        return options

    def for_sentence_transformers(self) -> dict[str, Any]:
        """Arguments of `SentenceTransformer` beside the name and `trust_remote_code`."""
        options = self.for_transformers()
        del options["trust_remote_code"]
        if "cache_dir" in options:
            options["cache_folder"] = options.pop("cache_dir")
        return options

    def unembedding(self) -> Unembedding:
        """The unembedding matrix; the model is not loaded, and not downloaded.

        From the Hub only the bytes of the matrix are read, by range requests, or from the cache as
        soon as its file is there; `.bin` weights, which have no index of their bytes, are
        downloaded.

        Raises:
            HubError: If the Hub, the repository or the revision cannot be reached.
            UnembeddingError: If the model, its head or its weights are missing or unfit.
        """
        found = self._unembedding
        return found if self.norm is None else replace(found, gain=self._gain)

    @cached_property
    def _unembedding(self) -> Unembedding:
        gguf = find_gguf(Path(self.name))
        if gguf is not None:
            stored, tied = read_gguf(gguf)
            return Unembedding(stored, tied, gguf.name)
        if not self.is_folder and (os.path.exists(self.name) or not is_repo_id(self.name)):
            raise UnembeddingError(f"a model folder must exist, got {self.name}; check the path")
        self.files.path(CONFIG_FILE)  # first, as it pins the commit
        adapter = Adapter.open(self.files)
        base = self if adapter is None else self.base(adapter)
        model = meta_model(
            base.config(), masked_lm=self.masked_lm, trust_remote_code=self.trust_remote_code
        )
        checkpoint = open_checkpoint(base.files)
        head, tied = find_output_embedding(model, checkpoint, base.files.where, adapter)
        owner = self if adapter is not None and adapter.trains(head.name) else base
        identity = model_identity(owner.name, owner.files.commit)
        return Unembedding(head, tied, *identity, self.gguf_sha256)

    @cached_property
    def _gain(self) -> Tensor:
        """The gain of the norm before the unembedding matrix, (d,) float64."""
        if self.norm != "folded":
            raise UnembeddingError(f"norm must be None or 'folded', got {self.norm!r}")
        gguf = find_gguf(Path(self.name))
        if gguf is not None:
            gain = read_gguf_gain(gguf)
        elif Adapter.open(self.files) is not None:
            raise UnembeddingError(
                "norm='folded' needs a model of its own, got an adapter, which may train the norm; "
                "merge it into its base model with PEFT (merge_and_unload) and save that"
            )
        else:
            config = self.config()
            norm = final_norm(config)
            model = meta_model(config, trust_remote_code=self.trust_remote_code)
            checkpoint = open_checkpoint(self.files)
            stored = checkpoint.tensor(stored_name(model, checkpoint, norm.weight))
            gain = stored.read_rows(0, stored.shape[0])[:, 0].to(torch.float64) + norm.offset
        check_gain(gain)
        return gain

    def config(self) -> PretrainedConfig:
        """The configuration of the model; none for an adapter alone.

        Raises:
            UnembeddingError: If there is none, or transformers does not know it.
        """
        if self.files.path(CONFIG_FILE) is None:
            raise UnembeddingError(
                f"a model folder must hold {CONFIG_FILE}, got none in {self.files.where}; give the "
                "folder or the Hub id of a transformers checkpoint"
            )
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.name, **self.for_transformers()
            )
        except Exception as error:  # configs of strangers fail in many ways, all mean the same
            raise UnembeddingError(
                f"{CONFIG_FILE} in {self.files.where} must describe a model that transformers "
                f"knows, got: {reason_of(error)}"
            ) from error
        if getattr(config, OTHER_WEIGHTS, None) is not None:
            raise UnembeddingError(
                f"{CONFIG_FILE} in {self.files.where} must leave the weights in their usual files, "
                f"got {OTHER_WEIGHTS}; rename that file and remove the key"
            )
        return config

    def base(self, adapter: Adapter) -> Source:
        """The base model of an adapter."""
        return Source(
            adapter.config["base_model_name_or_path"],
            adapter.config.get("revision"),
            self.token,
            self.trust_remote_code,
            cache_folder=self.cache_folder,
            local_files_only=self.local_files_only,
        )


#: Where an unembedding matrix may come from: a tensor (V, d), a causal LM, a folder or Hub id.
UnembeddingSource = Tensor | nn.Module | str | os.PathLike[str] | Source | Unembedding


def open_unembedding(source: UnembeddingSource, **options: Any) -> Unembedding:
    """Finds the unembedding matrix behind a tensor, a model, a folder, a GGUF file or a Hub id.

    Args:
        source: Where it may be found.
        **options: Attributes of `Source`, for a name.

    Raises:
        UnembeddingError: If there is no usable unembedding matrix.
        HubError: If the Hub, the repository or the revision cannot be reached.
    """
    if isinstance(source, Unembedding):
        return source
    if isinstance(source, Tensor):
        return unembedding_of_tensor(source)
    if isinstance(source, nn.Module):
        return unembedding_of_model(source)
    return Source.of(source, **options).unembedding()


def unembedding_of_model(model: nn.Module) -> Unembedding:
    """The unembedding matrix of a live transformers model.

    Args:
        model: A model with `get_output_embeddings()`; a causal LM, not its headless backbone.

    Raises:
        UnembeddingError: If it has no output embedding.
    """
    names, tied, weight = output_embedding(model)
    config = getattr(model, "config", None)
    model_id, revision = model_identity(
        getattr(config, "_name_or_path", "") or None, getattr(config, "_commit_hash", None)
    )
    return Unembedding(StoredTensor.of(names[0], weight), tied, model_id, revision)


def model_identity(name_or_path: str | None, revision: str | None) -> tuple[str | None, str | None]:
    """Hub id and commit of a model, without a path of this machine.

    A folder of the Hub cache is read as the repository it caches; of any other folder only the
    name remains.
    """
    if name_or_path is None or not os.path.isdir(name_or_path):
        return name_or_path, revision
    path = Path(name_or_path).absolute()
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})", str(path))
    if cached:
        return cached[1].replace("--", "/", 1), cached[2]
    return path.resolve().name, revision
