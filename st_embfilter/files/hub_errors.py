"""What goes wrong with the Hub, in one sentence each, and whether another try helps."""

from __future__ import annotations

from typing import Final

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from st_embfilter.errors import HubError

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
ERRORS: Final[tuple[type[Exception], ...]] = (
    HfHubHTTPError.__mro__[1],
    OSError,
    EntryNotFoundError,
    HFValidationError,
)


_FINAL: Final = (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)


class MissingError(HubError):
    """The repository has no such file (offline: the cache has none)."""


class BrokenError(OSError):
    """A response that is worth another try."""


def explained(error: BaseException, repo_id: str, revision: str | None) -> HubError:
    """An error of huggingface_hub in one sentence that says what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    # A plain ValueError is the Hub's verdict on the content, and says it.
    verdict = isinstance(error, ValueError)
    if status is None and isinstance(error.__cause__, ERRORS) and not verdict:
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
        what = str(error) if isinstance(error, BrokenError) else type(error).__name__
        text = (
            f"the Hub ({constants.ENDPOINT}) must be reachable to read or write {repo_id}, got "
            f"{what}; check the connection, HF_ENDPOINT and proxies"
        )
    return HubError(text)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, (*_FINAL, EntryNotFoundError)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in _TRANSIENT or status >= 500
    # An error number is the disk's or the cache's; errors on the wire are wrapped and have none.
    return getattr(error, "errno", None) is None


def retry_wait(error: BaseException, attempt: int) -> float:
    """Seconds until the next try: doubling, or what the server asks for."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = headers.get("Retry-After", "")
    backoff = min(MAX_WAIT, FIRST_WAIT * 2.0**attempt)
    return max(backoff, min(float(asked), MAX_RETRY_AFTER)) if asked.isdigit() else backoff
