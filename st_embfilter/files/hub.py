"""Models on the Hugging Face Hub: any bytes of a file.

Requests go through huggingface_hub's own session and headers, so that its endpoint, token, proxies,
offline mode and cache are those of every other library.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined] # it lists no exports
    build_hf_headers,
    hf_raise_for_status,
    validate_repo_id,
)

from st_embfilter.errors import HubError
from st_embfilter.files.folder import FolderFiles, ModelFiles
from st_embfilter.files.hub_errors import (
    ERRORS,
    RETRIES,
    BrokenError,
    MissingError,
    explained,
    is_transient,
    retry_wait,
)
from st_embfilter.files.stored import LocalSafetensors, SafetensorsFile

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
        except MissingError:
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
                except MissingError:
                    return None
        return self._opened[file]

    def _retrying(self, action: Callable[[], _T]) -> _T:
        """Runs an action until it succeeds or fails in a way that no retry helps."""
        for attempt in count():
            try:
                return action()
            except HubError:
                raise
            except ERRORS as error:
                missing = isinstance(error, EntryNotFoundError)
                if missing and (self._offline or not isinstance(error, LocalEntryNotFoundError)):
                    raise MissingError(
                        f"{self.where} must hold the file that is read, got none; it was removed"
                    ) from error
                if attempt == RETRIES or not is_transient(error):
                    raise explained(error, self.name, self._revision) from error
                logger.info("retrying %s after %s", self.name, type(error).__name__)
                time.sleep(retry_wait(error, attempt))
        raise AssertionError  # the loop has no end


class RemoteSafetensors(SafetensorsFile):
    """A safetensors file on the Hub, read by HTTP range requests.

    What came before a connection broke is kept, and the next request asks for the rest. Before any
    retry the file is looked up again: that renews an expired link and notices a changed file.

    Args:
        name: For errors.
        url: A URL that resolves to the file.
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
        except ERRORS as error:
            if done == 0 or not is_transient(error):
                raise
            logger.info("resuming %s at byte %d", self.name, start + done)
        if done == 0:
            raise BrokenError("empty answer")
        self._fresh = done == len(into)
        return done

    def _check(self, response: Any, start: int, length: int) -> None:
        """Checks that a response carries the bytes that were asked for."""
        if response.status_code >= 400 and not self._at_hub:
            raise BrokenError(f"HTTP {response.status_code} from the storage")  # an expired link
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
            raise BrokenError(
                f"{given}, {response.headers.get('Content-Length')} bytes for {asked}"
            )

    def _changed(self, before: str | None, after: str | None) -> HubError:
        return HubError(
            f"{self.name} must stay the same while it is read, got ETag {after} after {before}; "
            "run it again"
        )


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


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
