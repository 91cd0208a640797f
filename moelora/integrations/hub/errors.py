"""What can go wrong between a user and a model hub, in sentences. Begin with explain.

Every failure of the hub client becomes a `HubError` that names the repository and says what to do next. Tokens never
enter a message: none of these functions is given one.
"""

from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# What the client raises: the base error of the HTTP library that it stands on (httpx2 today), and OSError.
CLIENT_ERRORS = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)

TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class HubError(ValueError):
    """A hub could not give or take what was asked for. `transient`: the same call may succeed later."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where something lies: a repository of a hub, a revision of it, a folder in it."""

    repo_id: str
    revision: str
    subfolder: str | None
    endpoint: str

    def __str__(self) -> str:
        at = f" at revision {self.revision!r}" if self.revision != constants.DEFAULT_REVISION else ""
        below = f", folder {self.subfolder!r}" if self.subfolder else ""
        return f"hub repository {self.repo_id!r}{at}{below}"

    @property
    def host(self) -> str:
        """The hub's host and port, for messages; without a user name and password that the address may carry."""
        return urlsplit(self.endpoint).netloc.rsplit("@", 1)[-1]

    def path_of(self, name: str) -> str:
        """The path of a file in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def retry_after(error: Exception) -> float | None:
    """The seconds that a busy hub asked to wait, if it did; None for errors that waiting does not cure."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in TRANSIENT_STATUS:
        asked = error.response.headers.get("Retry-After", "")
        return float(asked) if asked.isdecimal() else 0.0
    return None


def explain(error: Exception, place: Place, *, has_token: bool) -> HubError:
    """The sentence for an error of the hub client."""
    match error:
        case OfflineModeIsEnabled():
            return offline(place)
        case LocalTokenNotFoundError():
            return HubError(f"{place}: token=True was passed, but nobody is logged in here: run `hf auth login`.")
        case LocalEntryNotFoundError() | RuntimeError() if isinstance(error.__cause__, Exception):
            # the client's own wrapper, for downloads and for uploads: what happened is its cause
            return explain(error.__cause__, place, has_token=has_token)
        case GatedRepoError():
            page = f"{place.endpoint}/{place.repo_id}"
            todo = "this token's account has no access yet" if has_token else "no token was sent"
            return HubError(
                f"{place} is gated and {todo}: accept its terms at {page}, then pass token=... of the same account."
            )
        case RevisionNotFoundError():
            return HubError(
                f"hub repository {place.repo_id!r} has no revision {place.revision!r}: "
                f"give a branch, a tag or a commit of it (see {place.endpoint}/{place.repo_id}/commits/main)."
            )
        case EntryNotFoundError():
            return HubError(f"{place} does not have the file that was asked for ({_last_line(error)}).")
        case FileMetadataError():
            return HubError(not_a_hub(place, "its answer names no commit or no ETag"))
        case RepositoryNotFoundError():
            return not_found(place, has_token=has_token)
        case HfHubHTTPError():
            return _explain_status(error, place, has_token=has_token)
        case OSError() if "Consistency check failed" in str(error):
            return HubError(
                f"{place}: the download stopped early or the file has another size than announced. "
                "Nothing of it was kept; try again.",
                transient=True,
            )
        case OSError() if error.errno is not None and not isinstance(error, ConnectionError):
            return HubError(
                f"{place}: the cache cannot be written: {error.strerror or error}. Pass another cache_dir=..."
            )
    return HubError(
        f"{place}: the hub at {place.host} could not be reached ({type(error).__name__}). Check the connection and the "
        "endpoint; files that were downloaded before are used with local_files_only=True.",
        transient=True,
    )


def not_found(place: Place, *, has_token: bool) -> HubError:
    """Missing and private look the same from outside, so the message names both."""
    todo = (
        "this token's account cannot see it: use a token that has access to it"
        if has_token
        else "for a private one pass token=..., or log in with `hf auth login`"
    )
    return HubError(f"hub repository {place.repo_id!r} was not found at {place.host}. Check its name; {todo}.")


def offline(place: Place) -> HubError:
    """Nothing in the cache, and nothing may be asked."""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only=True was passed"
    return HubError(
        f"{place} is not complete in the local cache, and {why}, so the hub was not asked. Download it once while "
        "online (with the same revision and cache_dir), or pass a local folder instead."
    )


def _explain_status(error: HfHubHTTPError, place: Place, *, has_token: bool) -> HubError:
    status = error.response.status_code
    if status == 401:
        if has_token:
            return HubError(f"{place}: the hub at {place.host} refused the token (401): it is wrong or has expired.")
        return not_found(place, has_token=False)
    if status == 403:
        return HubError(
            f"{place}: the hub at {place.host} does not allow this (403): the token lacks the right (a push needs one "
            "with write access to that name), or the repository is disabled."
        )
    if status == 429:
        wait = retry_after(error)
        when = f"in {wait:.0f} seconds" if wait else "later"
        hint = "" if has_token else " Requests with a token have a higher limit."
        return HubError(
            f"{place}: the hub at {place.host} has had too many requests (429): try again {when}.{hint}", transient=True
        )
    if status in TRANSIENT_STATUS:
        return HubError(
            f"{place}: the hub at {place.host} is in trouble (status {status}): try again later, or use files that "
            "were downloaded before with local_files_only=True.",
            transient=True,
        )
    return HubError(not_a_hub(place, f"it answered with status {status}"))


def not_a_hub(place: Place, why: str) -> str:
    """The message for a server that answers, but not as a hub does."""
    return (
        f"{place}: the server at {place.host} does not behave like a model hub ({why}). "
        "Check endpoint=..., HF_ENDPOINT and proxies."
    )


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
