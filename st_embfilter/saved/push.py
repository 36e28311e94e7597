"""Publish a saved model, or a filter alone, on the Hub."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitInfo
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer

from st_embfilter.errors import FormatError, LinkError
from st_embfilter.files.folder import links_out
from st_embfilter.files.tensors import SAFETENSORS_FILE, read_index
from st_embfilter.files.upload import upload
from st_embfilter.model.backbone import backbone_files
from st_embfilter.model.filter_files import filter_card
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.metadata import METADATA_FILE, FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.saved.card import card_of_folder
from st_embfilter.saved.card_rules import check_card
from st_embfilter.saved.folder import write_model
from st_embfilter.saved.layout import CARD_FILE, FILTER_FILES, PORTABLE_FILES, STATIC_FOLDER
from st_embfilter.saved.static import STATIC_FILES, is_static, read_table

_TOKENIZER: Final = re.compile(
    r"tokenizer\.json|vocab\.(json|txt)|tekken\.json|.*\.(model|spm|tiktoken)"
)


def push_to_hub(
    model: SentenceTransformer,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Publishes a filtered model on the Hub; plain `SentenceTransformer(repo_id)` loads it.

    The portable folder becomes one commit. It is checked first: nothing is uploaded, and no
    repository is made, unless it is complete.

    Args:
        model: Transformer, Pooling, EmbedFilterLayer and optionally Normalize.
        repo_id: E.g. "org/name"; made if it does not exist.
        private: Visibility of a new repository; one that exists keeps its own.
        revision: Branch to commit to, made if need be; None for the main one.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Its first line.
        token: Hub token; None for the one that is logged in or in `HF_TOKEN`.

    Returns:
        What huggingface_hub says about the commit: `commit_url`, `oid`, `pr_url` ...

    Raises:
        FormatError: If the model has other modules, or the folder fails its validation.
        HubError: If the Hub refuses.
    """
    with tempfile.TemporaryDirectory(prefix="st-embfilter-") as folder:
        write_model(model, Path(folder), _link, token=token)
        return _push(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
        )


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Publishes a portable folder, or the folder of a filter alone, on the Hub.

    Args:
        folder: As `save_pretrained` or `EmbedFilterLayer.save_pretrained` wrote it.
        repo_id: As all others, see `push_to_hub`.
        private: See there.
        revision: See there.
        create_pr: See there.
        commit_message: See there.
        token: See there.
    """
    linked = links_out(Path(folder))
    if linked:
        raise LinkError(
            f"every file of a model must lie in its folder, got the link {linked[0]!r:.200} out "
            "of it; put the file itself there"
        )
    return _push(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
    )


def _push(
    folder: str | os.PathLike[str], repo_id: str, *, commit_message: str | None, **options: Any
) -> CommitInfo:
    """Checks and uploads a folder, in which a link is one of our own to a file of weights."""
    validate_folder(folder)
    what = "filter" if _is_filter_alone(Path(folder)) else "embedding model"
    return upload(
        folder,
        repo_id,
        contents={CARD_FILE: _card_for(Path(folder), repo_id)},
        commit_message=commit_message or f"Add EmbedFilter {what}",
        **options,
    )


def validate_folder(folder: str | os.PathLike[str]) -> None:
    """Checks that a folder is complete and consistent, before anybody gets it.

    Args:
        folder: A portable folder, or the folder of a filter alone.

    Raises:
        FormatError: Names the file that is missing or breaks a rule.
        UnembeddingError: If the weights of the backbone are missing or damaged.
    """
    folder = Path(folder)
    filter_alone = _is_filter_alone(folder)
    required: tuple[str, ...] = FILTER_FILES if filter_alone else PORTABLE_FILES
    if is_static(folder):
        required = STATIC_FILES
    missing = [name for name in required if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"a folder to publish must hold {', '.join(required)}, got none of "
            f"{', '.join(missing)} in {folder}; write it with save_pretrained or `st-embfilter "
            "build`"
        )
    if is_static(folder):
        metadata = (folder / METADATA_FILE).read_text(encoding="utf-8", errors="replace")
        read_table(folder / STATIC_FOLDER / SAFETENSORS_FILE, FilterMetadata.from_json(metadata))
    else:
        EmbedFilterLayer.from_pretrained(folder)
        if not filter_alone:
            _check_backbone(folder)
    check_card((folder / CARD_FILE).read_text(encoding="utf-8", errors="replace"))


def _is_filter_alone(folder: Path) -> bool:
    return not (folder / MODULES_FILE).is_file() and not (folder / "2_Dense").is_dir()


def _check_backbone(folder: Path) -> None:
    """Checks that weights are there, whole and readable; and a tokenizer."""
    files = backbone_files(folder)
    for file in files:
        if file.name.endswith(".index.json"):
            for shard in sorted(set(read_index(file).values())):
                if not (folder / shard).is_file():
                    raise FormatError(f"{file.name} names the shard {shard}, got no such file")
        elif file.suffix == ".safetensors":
            try:
                safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FormatError(
                    f"{file.name} must be a whole safetensors file, got: {error}"
                ) from error
    if not any(_TOKENIZER.fullmatch(file.name) for file in files):
        raise FormatError(
            "a portable folder must hold a tokenizer, got none of its files; save the tokenizer "
            "of the language model into it"
        )


def _card_for(folder: Path, repo_id: str) -> bytes:
    """The folder's card, which names the repository in its usage unless somebody edited it."""
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    if _is_filter_alone(folder):
        metadata = EmbedFilterLayer.from_pretrained(folder).metadata
        plain, named = filter_card(metadata), filter_card(metadata, repo_id)
    else:
        plain, named = card_of_folder(folder), card_of_folder(folder, repo_id=repo_id)
    return (named if text == plain else text).encode()


def _link(source: Path, target: Path) -> None:
    """A link where that is possible: a model that is only passed on needs no second copy."""
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
