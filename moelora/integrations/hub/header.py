"""What an adapter on a hub looks like, without downloading its weights. Begin with remote_header.

A safetensors file opens with eight bytes that say how long its header is, then a JSON header with name, dtype, shape
and place of every tensor (https://huggingface.co/docs/safetensors/index#metadata-parsing). One range request brings it.
"""

import json
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from moelora.integrations.hub.adapters import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_NAME,
    adapter_file,
)
from moelora.integrations.hub.client import LIBRARY_NAME, LIBRARY_VERSION, patiently
from moelora.integrations.hub.errors import HubError, Place, offline
from moelora.integrations.hub.names import check_token, checked_place

# A LoRA of every projection of a 100-layer model has a header of about 300 kB.
FIRST_BYTES = 100_000
MAX_HEADER_BYTES = 25_000_000


@dataclass(frozen=True, kw_only=True)
class RemoteAdapter:
    """An adapter as described by the hub: its config, the JSON header of its weights, their size, the commit."""

    config: dict[str, Any]
    header: dict[str, Any]
    weights_bytes: int
    commit: str | None


def remote_header(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> RemoteAdapter:
    """Config and safetensors header of an adapter on a hub; nothing is written to the cache.

    Raises `HubError` as `download_adapter` does, and for a header that is no safetensors header.
    """
    place = checked_place(repo_id, revision=revision, subfolder=subfolder, endpoint=endpoint)
    check_token(token)
    if constants.HF_HUB_OFFLINE:
        raise offline(place)

    # one commit for both files
    described = adapter_file(place, CONFIG_NAME, token, place.revision, MAX_CONFIG_BYTES)
    commit = str(described.commit_hash)
    weights = adapter_file(place, WEIGHTS_NAME, token, commit, MAX_WEIGHTS_BYTES)

    config = _json_object(
        read_range(place, CONFIG_NAME, commit, token, 0, int(described.size or 0)), place, CONFIG_NAME
    )
    header = _read_header(place, commit, token, weights_bytes=int(weights.size or 0))
    return RemoteAdapter(config=config, header=header, weights_bytes=int(weights.size or 0), commit=commit)


def _read_header(place: Place, commit: str, token: str | bool | None, *, weights_bytes: int) -> dict[str, Any]:
    start = read_range(place, WEIGHTS_NAME, commit, token, 0, min(FIRST_BYTES, weights_bytes))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, weights_bytes - 8):
        raise HubError(
            f"{place}: {WEIGHTS_NAME} is not a safetensors file: it announces a header of {length:,} bytes in a file "
            f"of {weights_bytes:,} (at most {MAX_HEADER_BYTES:,} are read)."
        )
    missing = length + 8 - len(start)
    if missing > 0:
        start += read_range(place, WEIGHTS_NAME, commit, token, len(start), missing)
    return _json_object(start[8 : 8 + length], place, f"the header of {WEIGHTS_NAME}")


def read_range(place: Place, name: str, commit: str, token: str | bool | None, first: int, count: int) -> bytes:
    """`count` bytes of a file from `first` on, and never more, also from a server that ignores the range."""
    if count == 0:
        return b""
    url = hf_hub_url(place.repo_id, place.path_of(name), revision=commit, endpoint=place.endpoint)
    headers = build_hf_headers(token=token, library_name=LIBRARY_NAME, library_version=LIBRARY_VERSION)
    headers |= {"Range": f"bytes={first}-{first + count - 1}", "Accept-Encoding": "identity"}

    def get() -> bytes:
        # the client drops the token when a redirect leads to another host
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skip = first if response.status_code == 200 else 0
            received = bytearray()
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) >= skip + count:
                    break
            return bytes(received[skip : skip + count])

    content = patiently(get, place, token)
    if len(content) != count:
        raise HubError(f"{place}: {name} stopped after {len(content):,} of {count:,} bytes. Try again.", transient=True)
    return content


def _json_object(content: bytes, place: Place, name: str) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HubError(f"{place}: {name} is not JSON ({error}).") from None
    if not isinstance(answer, dict):
        raise HubError(f"{place}: {name} is not a JSON object, got {type(answer).__name__}.")
    return answer
