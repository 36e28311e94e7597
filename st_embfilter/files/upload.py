"""Write a folder to a repository of the Hub as one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from st_embfilter.files.hub_errors import ERRORS, explained

_UPLOAD_ERRORS: Final[tuple[type[Exception], ...]] = (*ERRORS, RuntimeError, ValueError)


#: Files of an earlier push that would change how the new model loads.
_STALE: Final = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|modules\.json|sentence_bert_config\.json|embfilter(_spectrum|_baked)?\.(json|safetensors)"
    r"|[1-9]_\w+/.*"
)


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str,
    contents: Mapping[str, bytes] | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Writes a folder to a model repository, which is made if need be, as one commit.

    Weights and modules of an earlier model there are removed in the same commit; other files stay.

    Args:
        folder: All of its files are uploaded but hidden ones.
        repo_id: E.g. "org/name".
        commit_message: Its first line.
        contents: Files to write with another content than in the folder.
        private: Visibility of a new repository; one that exists keeps its own.
        revision: Branch to commit to, made if need be; None for the main one.
        create_pr: Open a pull request instead.
        token: Hub token.

    Raises:
        HubError: If the Hub refuses. A commit holds all files or none.
    """
    folder = Path(folder)
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    hidden = [name for name in paths if any(part.startswith(".") for part in name.parts)]
    files: dict[str, Path | bytes] = {
        name.as_posix(): path for name, path in paths.items() if name not in hidden
    }
    files |= contents or {}
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=None if create_pr else revision)
        stale = [file for file in present if _STALE.fullmatch(file) and file not in files]
        # Not upload_folder: with hf_xet installed it may split the upload into several commits.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(file) for file in stale),
                *(CommitOperationAdd(name, files[name]) for name in sorted(files)),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    except _UPLOAD_ERRORS as error:
        raise explained(error, repo_id, revision) from error
