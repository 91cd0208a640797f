"""What an adapter on a hub looks like, read by range requests from a local server."""

import json

import pytest
from one_adapter_hub import ADAPTER
from one_adapter_hub import hub as hub

from moelora.integrations.hub import HubError, remote_header
from moelora.testing.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files
from moelora.testing.hub_server import HubServer


def test_a_header_is_read_without_the_weights(hub: HubServer) -> None:
    """Config, header, size and commit; of the weights only the first bytes are requested."""
    remote = remote_header(ADAPTER, endpoint=hub.endpoint)
    weights = adapter_files()[WEIGHTS_NAME]
    length = int.from_bytes(weights[:8], "little")

    assert remote.config == json.loads(adapter_files()[CONFIG_NAME])
    assert remote.header == json.loads(weights[8 : 8 + length])
    assert remote.weights_bytes == len(weights)
    assert remote.commit == hub.repos[ADAPTER].refs["main"]
    assert [request.headers["range"] for request in hub.requests if request.host == "storage"] == [
        f"bytes=0-{len(weights) - 1}"
    ]


def test_a_long_header_takes_a_second_range(hub: HubServer) -> None:
    """Thousands of tensors: the header is longer than the first request, the data is still not asked for."""
    weights = adapter_files(modules=600)[WEIGHTS_NAME]
    length = int.from_bytes(weights[:8], "little")
    hub.add_repo("acme/deep", {**adapter_files(), WEIGHTS_NAME: weights})

    remote = remote_header("acme/deep", endpoint=hub.endpoint)
    ranges = [request.headers["range"] for request in hub.requests if request.host == "storage"]
    assert remote.header == json.loads(weights[8 : 8 + length])
    assert ranges == ["bytes=0-99999", f"bytes=100000-{length + 7}"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"", "not a safetensors file"),
        (b"short", "not a safetensors file"),
        ((2**62).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((4).to_bytes(8, "little") + b"nope", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not JSON"),
        ((90_000).to_bytes(8, "little") + b"[" * 90_000, "not JSON"),
    ],
    ids=["empty", "short", "huge", "text", "list", "bytes", "nested"],
)
def test_a_header_that_lies_is_refused(hub: HubServer, weights: bytes, message: str) -> None:
    """Whatever stands in the first bytes, the answer is an error about this file."""
    hub.add_repo("acme/liar", {**adapter_files(), WEIGHTS_NAME: weights})

    with pytest.raises(HubError, match=message):
        remote_header("acme/liar", endpoint=hub.endpoint)


def test_a_header_is_refused_as_a_download_is(hub: HubServer) -> None:
    """The same sentences for the same troubles."""
    hub.add_repo("acme/old", {CONFIG_NAME: adapter_files()[CONFIG_NAME], "adapter_model.bin": b"pickle"})
    hub.add_repo("acme/gated", adapter_files(), gated=True)

    for repo_id, message in [
        ("acme/none", "was not found"),
        ("acme/old", "pickle"),
        ("acme/gated", "accept its terms"),
    ]:
        with pytest.raises(HubError, match=message):
            remote_header(repo_id, endpoint=hub.endpoint)
