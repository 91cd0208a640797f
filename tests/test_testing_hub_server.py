"""The local hub itself, asked by the real client: what other tests and the examples rely on."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from moelora.testing.hub_repos import sha256
from moelora.testing.hub_server import HubServer
from moelora.testing.hub_wire import Fault, Reply, Request, with_range

FILES = {"config.json": b"{}", "a/weights.safetensors": b"0123456789", "a/b/notes.txt": b"hello"}


def asked_for(**headers: str) -> Request:
    """A request with these headers."""
    return Request(host="hub", method="GET", path="/", query={}, headers=headers, body=b"")


def test_folders_mappings_and_a_root_are_served(tmp_path: Path) -> None:
    """A repository is made from a folder or from bytes; a root folder holds owner/name folders."""
    for name, content in FILES.items():
        path = tmp_path / "root" / "acme" / "one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    for repos in ({"acme/one": FILES}, {"acme/one": tmp_path / "root" / "acme" / "one"}, tmp_path / "root"):
        with HubServer(repos) as hub:
            cache = tmp_path / "cache" / hub.endpoint[-5:]
            folder = Path(snapshot_download("acme/one", endpoint=hub.endpoint, cache_dir=cache))
            assert {name: (folder / name).read_bytes() for name in FILES} == FILES
            assert list(hub.repos) == ["acme/one"]


def test_large_files_lie_on_another_host() -> None:
    """By name, not by port alone: else the client follows the redirect and loses the commit and the hash with it."""
    with HubServer({"acme/one": FILES}) as hub:
        hosts = {urlsplit(url).hostname for url in (hub.endpoint, hub.storage_endpoint)}
        metadata = get_hf_file_metadata(hf_hub_url("acme/one", "a/weights.safetensors", endpoint=hub.endpoint))

    assert len(hosts) == 2
    assert metadata.location.startswith(hub.storage_endpoint)
    assert metadata.commit_hash == hub.repos["acme/one"].refs["main"]
    assert (metadata.etag, metadata.size) == (sha256(b"0123456789"), 10)


def test_listings_tell_names_sizes_and_hashes() -> None:
    """Model info and trees, whole and folder by folder."""
    with HubServer({"acme/one": FILES}) as hub:
        api = HfApi(endpoint=hub.endpoint)
        sizes = {file.rfilename: file.size for file in api.model_info("acme/one", files_metadata=True).siblings or []}
        assert sizes == {name: len(content) for name, content in FILES.items()}
        assert sorted(api.list_repo_files("acme/one")) == sorted(FILES)
        assert {entry.path for entry in api.list_repo_tree("acme/one")} == {"a", "config.json"}
        assert {entry.path for entry in api.list_repo_tree("acme/one", "a")} == {"a/b", "a/weights.safetensors"}


def test_absent_things_raise_the_clients_own_errors(tmp_path: Path) -> None:
    """The header X-Error-Code selects them."""
    with HubServer({"acme/one": FILES}, tokens={"hf_bob": "bob"}) as hub:
        options = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "token": "hf_bob"}
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("acme/two", "config.json", **options)
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download("acme/one", "config.json", revision="v2", **options)
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download("acme/one", "nothing.json", **options)
        assert HfApi(endpoint=hub.endpoint, token="hf_bob").whoami()["name"] == "bob"


@pytest.mark.parametrize(
    ("asked", "status", "body"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=0-99", 206, b"0123456789"),
        ("bytes=10-", 416, b""),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
def test_ranges(asked: str, status: int, body: bytes) -> None:
    """First and last byte, an open end, the last bytes; outside is 416, another unit is ignored."""
    reply = with_range(asked_for(range=asked), Reply(body=b"0123456789"))

    assert (reply.status, reply.body) == (status, body)


def test_faults_end(tmp_path: Path) -> None:
    """A fault acts as often as it says, on the requests it names, and the reply of a spoiled one changes as it says."""
    fault = Fault(path="config", status=503, times=2, retry_after=7)
    with HubServer({"acme/one": FILES}) as hub:
        hub.fail(fault)
        statuses = [hub._respond(asked_for()).status]
        request = Request(
            host="hub", method="HEAD", path="/acme/one/resolve/main/config.json", query={}, headers={}, body=b""
        )
        replies = [hub._respond(request) for _ in range(3)]

    assert statuses == [404]
    assert [reply.status for reply in replies] == [503, 503, 200]
    assert replies[0].headers["Retry-After"] == "7"
    assert Fault(path="", truncate_to=2).spoil(Reply(body=b"abc")).body == b"ab"
    assert Fault(path="", corrupt=True).spoil(Reply(body=b"abc")).body == b"ab\x9c"


def test_repositories_are_named_by_owner() -> None:
    """A name without owner, or a folder that is not there, is an error at once."""
    with HubServer() as hub:
        with pytest.raises(ValueError, match="owner/name"):
            hub.add_repo("one", FILES)
        with pytest.raises(ValueError, match="a folder or a mapping"):
            hub.add_repo("acme/one", "no/such/folder")
