"""Questions to a hub, asked with measure. Begin with file_metadata.

The hub client retries a failing request for 23 seconds and more. Here the first question is asked through its one
function that does not retry, and repeated at most twice while the hub says that it is busy: a user learns within
seconds that a hub is down, or how long it wants to be left alone.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi, HfFileMetadata, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError

from moelora import __version__
from moelora.integrations.hub.errors import CLIENT_ERRORS, HubError, Place, explain, not_a_hub, retry_after
from moelora.integrations.hub.names import COMMIT, ETAG

LIBRARY_NAME = "moelora"
LIBRARY_VERSION: str = __version__

# Seconds between tries while the hub answers 429 or 5xx; a longer Retry-After is told to the user instead.
RETRY_PAUSES = (0.5, 2.0)
LONGEST_PAUSE = 5.0

Answer = TypeVar("Answer")


def file_metadata(
    place: Place,
    name: str,
    token: str | bool | None,
    *,
    revision: str | None = None,
    max_bytes: int,
) -> HfFileMetadata | None:
    """Commit, size and hash of one file, without downloading it; None if the repository does not have it.

    Raises `HubError` for a file that is larger than `max_bytes`.
    """
    url = hf_hub_url(place.repo_id, place.path_of(name), revision=revision or place.revision, endpoint=place.endpoint)

    def head() -> HfFileMetadata | None:
        try:
            return get_hf_file_metadata(
                url,
                token=token,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                endpoint=place.endpoint,
                library_name=LIBRARY_NAME,
                library_version=LIBRARY_VERSION,
            )
        except RemoteEntryNotFoundError:
            return None

    metadata = patiently(head, place, token)
    if metadata is None:
        return None
    # commit and ETag become names in the cache
    if not COMMIT.fullmatch(metadata.commit_hash or "") or not ETAG.fullmatch(metadata.etag or ""):
        raise HubError(not_a_hub(place, "its answer lacks a commit or an ETag"))
    if metadata.size is None:
        raise HubError(not_a_hub(place, f"it does not say how large {name} is"))
    if metadata.size > max_bytes:
        raise too_large(place, name, metadata.size, max_bytes)
    return metadata


def too_large(place: Place, name: str, size: int, max_bytes: int) -> HubError:
    """A file that is refused before it is downloaded."""
    return HubError(
        f"{place}: {name} has {size:,} bytes, more than the {max_bytes:,} that are accepted, and was not downloaded. "
        "If you trust it, download it yourself and pass the folder."
    )


def patiently(call: Callable[[], Answer], place: Place, token: str | bool | None) -> Answer:
    """The call's answer, tried again shortly while the hub says that it is busy. Every error becomes a `HubError`."""
    started = time.monotonic()
    for pause in (*RETRY_PAUSES, None):
        try:
            return call()
        except CLIENT_ERRORS as error:
            wait = retry_after(error)
            # the client may have waited itself
            tired = time.monotonic() - started > LONGEST_PAUSE
            if pause is None or wait is None or wait > LONGEST_PAUSE or tired:
                raise explain(error, place, has_token=sends_token(token)) from error
            time.sleep(max(wait, pause))
    raise AssertionError("the last try returns or raises")


def sends_token(token: str | bool | None) -> bool:
    """Whether requests carry a token: the given one, or the one that the user is logged in with."""
    if isinstance(token, str):
        return True
    if token is False:
        return False
    return get_token() is not None and (bool(token) or not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN)


def hub_api(place: Place, token: str | bool | None) -> HfApi:
    """The hub client for calls that are not about one file."""
    return HfApi(endpoint=place.endpoint, token=token, library_name=LIBRARY_NAME, library_version=LIBRARY_VERSION)


def file_list(place: Place, token: str | bool | None) -> list[str]:
    """All paths of the repository, to give hints from; empty if the hub does not tell."""
    try:
        return hub_api(place, token).list_repo_files(place.repo_id, revision=place.revision)
    except CLIENT_ERRORS:
        return []
