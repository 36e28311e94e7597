"""Models on the Hugging Face Hub: read any bytes of a file, write a folder as one commit.

Requests go through huggingface_hub's own session and headers, so that its endpoint, token, proxies,
offline mode and cache are those of every other library.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined] # it lists no exports
    build_hf_headers,
    hf_raise_for_status,
    validate_repo_id,
)

from st_embfilter.errors import HubError
from st_embfilter.files.tensors import FolderFiles, LocalSafetensors, ModelFiles, SafetensorsFile

#: Tries after the first, each without a single byte of progress.
RETRIES: Final = 5

#: Seconds before the first retry, which double up to the last figure.
FIRST_WAIT: Final = 0.5
MAX_WAIT: Final = 8.0

#: The longest time in seconds that a server may make us wait (`Retry-After`).
MAX_RETRY_AFTER: Final = 300.0

_TRANSIENT: Final = (408, 429)

# The base of HTTP errors is that of requests, httpx or httpx2, as huggingface_hub has it; those of
# requests are OSErrors.
_ERRORS: Final[tuple[type[Exception], ...]] = (
    HfHubHTTPError.__mro__[1],
    OSError,
    EntryNotFoundError,
    HFValidationError,
)
_UPLOAD_ERRORS: Final[tuple[type[Exception], ...]] = (*_ERRORS, RuntimeError, ValueError)
_FINAL: Final = (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)

#: Files of an earlier push that would change how the new model loads.
_STALE: Final = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|modules\.json|sentence_bert_config\.json|embfilter(_spectrum)?\.(json|safetensors)"
    r"|[1-9]_\w+/.*"
)

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


def is_repo_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name that is no local folder can be a Hub id."""
    try:
        validate_repo_id(name)  # type: ignore[arg-type] # of a path, that it is none
    except HFValidationError:
        return False
    return True


def model_files(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_folder: str | None = None,
    local_files_only: bool = False,
) -> ModelFiles:
    """The files of a folder, or of a Hub repository if there is no such folder.

    Args:
        name_or_path: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        cache_folder: The Hub cache, if not the usual one.
        local_files_only: Take files from that cache only.
    """
    if os.path.isdir(name_or_path) or not is_repo_id(name_or_path):
        return FolderFiles(name_or_path)
    return HubFiles(
        os.fspath(name_or_path),
        revision=revision,
        token=token,
        cache_folder=cache_folder,
        local_files_only=local_files_only,
    )


class _MissingError(HubError):
    """The repository has no such file (offline: the cache has none)."""


class _BrokenError(OSError):
    """A response that is worth another try."""


class HubFiles(ModelFiles):
    """The files of a model repository on the Hub, all of one commit.

    Offline (`HF_HUB_OFFLINE`), the local cache is all there is.

    Args:
        repo_id: E.g. "org/name".
        revision: Branch, tag or commit; the first file that is found pins the commit.
        token: Hub token.
        cache_folder: The Hub cache, if not the usual one.
        local_files_only: Take files from that cache only.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.name = repo_id
        self._revision = revision
        self._commit: str | None = None
        self._token = token
        self._cache = cache_folder
        self._offline = local_files_only or constants.HF_HUB_OFFLINE
        self._opened: dict[str, SafetensorsFile] = {}
        hint = f" (offline; online, hf download {repo_id} gets it)" if self._offline else ""
        self.where = repo_id + hint

    @property
    def commit(self) -> str | None:
        """Hash of the commit, once a file was found."""
        return self._commit

    def path(self, file: str) -> Path | None:
        """The file in the cache, downloaded if it is not there yet.

        Raises:
            HubError: If the repository, the revision or the Hub cannot be reached.
        """
        try:
            found = self._retrying(
                lambda: hf_hub_download(
                    self.name,
                    file,
                    revision=self._commit or self._revision,
                    token=self._token,
                    cache_dir=self._cache,
                    local_files_only=self._offline,
                )
            )
        except _MissingError:
            return None
        path = Path(found)
        self._commit = path.parents[len(PurePosixPath(file).parts) - 1].name
        return path

    def open(self, file: str) -> SafetensorsFile | None:
        """The file in the cache, or else the one on the Hub, which is not downloaded.

        Raises:
            HubError: If the repository, the revision or the Hub cannot be reached.
        """
        if file not in self._opened:
            revision = self._commit or self._revision

            def cached() -> LocalSafetensors | None:
                found = try_to_load_from_cache(
                    self.name, file, cache_dir=self._cache, revision=revision
                )
                return LocalSafetensors(Path(found)) if isinstance(found, str) else None

            local = cached()
            if local is not None:
                self._opened[file] = local
            elif self._offline:
                return None
            else:
                url = hf_hub_url(self.name, file, revision=revision)
                try:
                    self._opened[file] = RemoteSafetensors(
                        file, url, self._token, self._retrying, cached
                    )
                except _MissingError:
                    return None
        return self._opened[file]

    def _retrying(self, action: Callable[[], _T]) -> _T:
        """Runs an action until it succeeds or fails in a way that no retry helps."""
        for attempt in count():
            try:
                return action()
            except HubError:
                raise
            except _ERRORS as error:
                missing = isinstance(error, EntryNotFoundError)
                if missing and (self._offline or not isinstance(error, LocalEntryNotFoundError)):
                    raise _MissingError(
                        f"{self.where} must hold the file that is read, got none; it was removed"
                    ) from error
                if attempt == RETRIES or not _is_transient(error):
                    raise explained(error, self.name, self._revision) from error
                logger.info("retrying %s after %s", self.name, type(error).__name__)
                time.sleep(_wait(error, attempt))
        raise AssertionError  # the loop has no end


class RemoteSafetensors(SafetensorsFile):
    """A safetensors file on the Hub, read by HTTP range requests.

    What came before a connection broke is kept, and the next request asks for the rest. Before any
    retry the file is looked up again: that renews an expired link and notices a changed file.

    Args:
        name: For errors.
        url: That resolves to the file.
        token: Hub token; sent to the Hub alone, not to the storage that the Hub points to.
        retrying: Runs an action until it succeeds.
        cached: The same file in the cache, once somebody has downloaded it; None before.
    """

    def __init__(
        self,
        name: str,
        url: str,
        token: str | bool | None,
        retrying: Callable[[Callable[[], Any]], Any],
        cached: Callable[[], LocalSafetensors | None],
    ) -> None:
        self.name = name
        self._url = url
        self._token = token
        self._retrying = retrying
        self._cached = cached
        self._etag: str | None = None
        retrying(self._look_up)

    @property
    def remote(self) -> bool:
        """Whether it is still read over the network."""
        return self._cached() is None

    def read(self, start: int, length: int) -> bytearray:
        """Reads bytes [start, start + length).

        Raises:
            HubError: If they cannot be read, or the file changes meanwhile.
        """
        local = self._cached()
        if local is not None:
            return local.read(start, length)
        data = bytearray(length)
        with memoryview(data) as view:
            done = 0
            while done < length:
                part = view[done:]
                done += self._retrying(partial(self._read_some, start + done, part))
        return data

    def _look_up(self) -> None:
        """Finds where the bytes are now; the first time, which file they belong to."""
        found = get_hf_file_metadata(self._url, token=self._token)
        if found.etag is None or found.size is None:
            raise HubError(
                f"the Hub must give the size and the ETag of {self.name}, got size {found.size} "
                f"and ETag {found.etag}; check HF_ENDPOINT and the proxy"
            )
        if self._etag is None:
            self._etag, self.size = found.etag, found.size
        if (self._etag, self.size) != (found.etag, found.size):
            raise self._changed(self._etag, found.etag)
        self._location = urljoin(self._url, found.location)
        self._at_hub = _origin(self._location) == _origin(self._url)
        self._served: str | None = self._etag if self._at_hub else None
        self._fresh = True

    def _read_some(self, start: int, into: memoryview) -> int:
        """Reads as much as one request gives, at least one byte."""
        if not self._fresh:
            self._look_up()
        self._fresh = False
        done = 0
        headers = build_hf_headers(token=self._token if self._at_hub else False)
        headers["Accept-Encoding"] = "identity"
        headers["Range"] = f"bytes={start}-{start + len(into) - 1}"
        try:
            with _get(self._location, headers) as (response, chunks):
                self._check(response, start, len(into))
                for chunk in chunks:
                    if len(chunk) > len(into) - done:
                        raise HubError(
                            f"the server must send the {len(into)} bytes of {self.name} that were "
                            "asked for, got more; check HF_ENDPOINT and the proxy"
                        )
                    into[done : done + len(chunk)] = chunk
                    done += len(chunk)
        except HubError:
            raise
        except _ERRORS as error:
            if done == 0 or not _is_transient(error):
                raise
            logger.info("resuming %s at byte %d", self.name, start + done)
        if done == 0:
            raise _BrokenError("empty answer")
        self._fresh = done == len(into)
        return done

    def _check(self, response: Any, start: int, length: int) -> None:
        """Checks that a response carries the bytes that were asked for."""
        if response.status_code >= 400 and not self._at_hub:
            raise _BrokenError(f"HTTP {response.status_code} from the storage")  # an expired link
        hf_raise_for_status(response)
        asked = f"bytes {start}-{start + length - 1}/{self.size}"
        given = response.headers.get("Content-Range")
        if response.status_code != 206 or given is None:
            raise HubError(
                f"the server must answer range requests (206), got {response.status_code} for "
                f"{self.name}; check HF_ENDPOINT and the proxy, or download the model first"
            )
        etag = response.headers.get("ETag") or self._served
        etag = None if etag is None else etag.removeprefix("W/").strip('"')
        if self._served not in (None, etag):
            raise self._changed(self._served, etag)
        self._served = etag
        if given != asked or int(response.headers.get("Content-Length", length)) != length:
            raise _BrokenError(
                f"{given}, {response.headers.get('Content-Length')} bytes for {asked}"
            )

    def _changed(self, before: str | None, after: str | None) -> HubError:
        return HubError(
            f"{self.name} must stay the same while it is read, got ETag {after} after {before}; "
            "run it again"
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


def explained(error: BaseException, repo_id: str, revision: str | None) -> HubError:
    """An error of huggingface_hub in one sentence that says what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    # A plain ValueError is the Hub's verdict on the content, and says it.
    verdict = isinstance(error, ValueError)
    if status is None and isinstance(error.__cause__, _ERRORS) and not verdict:
        return explained(error.__cause__, repo_id, revision)
    log_in = "log in with `hf auth login`, set HF_TOKEN or pass token="
    if isinstance(error, HFValidationError):
        text = f"a Hub repository must be named like 'org/name', got {repo_id!r}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = f"{repo_id} must be in the cache while HF_HUB_OFFLINE is set; unset it to go online"
    elif isinstance(error, LocalTokenNotFoundError):
        text = f"{repo_id} needs a token, got none; {log_in}"
    elif isinstance(error, GatedRepoError):
        text = (
            f"{repo_id} is gated and needs a token with access, got {status}; ask for access on "
            f"its page, then {log_in}"
        )
    elif isinstance(error, RevisionNotFoundError):
        text = f"{repo_id} must have the revision {revision!r}, got {status}; check its name"
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        text = (
            f"{repo_id} must be a model folder or a Hub repository, got {status}: it does not "
            f"exist, or it is private; check its name, or {log_in}"
        )
    elif status == 401:
        text = f"{repo_id} needs a valid token or does not exist, got 401; {log_in}"
    elif status == 403:
        text = f"{repo_id} needs a token with the right to do this, got 403; {log_in}"
    elif status in _TRANSIENT or (status or 0) >= 500:
        text = f"the Hub must answer for {repo_id}, got {status}; try again later"
    elif status is not None:
        text = f"the Hub must accept the request for {repo_id}, got {status}; check its arguments"
    elif isinstance(error, OSError) and error.errno is not None:
        text = f"cannot read or write files for {repo_id}: {error.strerror or error}"
    elif isinstance(error, (ValueError, RuntimeError)):
        reason = " ".join(str(error).split()) or type(error).__name__
        text = f"the Hub must accept the files for {repo_id}, got: {reason}"
    else:
        what = str(error) if isinstance(error, _BrokenError) else type(error).__name__
        text = (
            f"the Hub ({constants.ENDPOINT}) must be reachable to read or write {repo_id}, got "
            f"{what}; check the connection, HF_ENDPOINT and proxies"
        )
    return HubError(text)


@contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A response and its body as it comes."""
    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):  # httpx; of requests it is a flag
        with session.stream("GET", url, headers=headers, timeout=timeout) as response:
            yield response, response.iter_bytes()
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(2**16)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (*_FINAL, EntryNotFoundError)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in _TRANSIENT or status >= 500
    # An error number is the disk's or the cache's; errors on the wire are wrapped and have none.
    return getattr(error, "errno", None) is None


def _wait(error: BaseException, attempt: int) -> float:
    """Seconds until the next try: doubling, or what the server asks for."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = headers.get("Retry-After", "")
    backoff = min(MAX_WAIT, FIRST_WAIT * 2.0**attempt)
    return max(backoff, min(float(asked), MAX_RETRY_AFTER)) if asked.isdigit() else backoff


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
