"""Mixtures to a hub and back: the real client against a local server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from moelora.integrations.hub import HubError, client, download_mixture, upload_folder
from moelora.testing.hub_server import HubServer
from moelora.testing.hub_wire import Fault

# The hub client's own upload of large files calls its HTTP library in the deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

OWNER, STRANGER = "hf_ownersecret", "hf_strangersecret"
MIX = "acme/mix"
FILES = {
    "moelora_config.json": b'{"schema": 1}',
    "routers.safetensors": b"routers" * 100,
    "experts/000/adapter_config.json": b"{}",
    "experts/000/adapter_model.safetensors": b"expert 0",
    "experts/001/adapter_config.json": b'{"r": 4}',
    "experts/001/adapter_model.safetensors": b"expert 1",
}
STRAY = {"README.md": b"# Mix", "notes.txt": b"hello", "experts/000/run.py": b"import os", "optimizer.bin": b"x"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub where acme has pushed one mixture; retries do not wait."""
    monkeypatch.setattr(client, "RETRY_PAUSES", (0.01, 0.01))
    with HubServer({MIX: {**FILES, **STRAY}}, tokens={OWNER: "acme", STRANGER: "bob"}) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache."""
    return tmp_path / "cache"


def written(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(hub: HubServer, cache: Path, repo_id: str = MIX, **options) -> str:
    """The message with which a mixture is refused."""
    with pytest.raises(HubError) as caught:
        download_mixture(repo_id, endpoint=hub.endpoint, cache_dir=cache, **options)
    return str(caught.value)


def test_a_mixture_arrives_with_its_files_and_no_others(hub: HubServer, cache: Path) -> None:
    """Config, routers and experts come; scripts, pickles and notes beside them stay where they are."""
    folder, commit = download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache)

    assert content(folder) == FILES
    assert commit == hub.repos[MIX].refs["main"]
    assert not any("run.py" in line or "optimizer" in line for line in hub.asked())


def test_a_cached_mixture_is_not_downloaded_again(hub: HubServer, cache: Path) -> None:
    """The second use asks once what main is; offline it asks nobody."""
    first = download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache)
    hub.requests.clear()

    assert download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache) == first
    assert len(hub.requests) == 1
    assert download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache, local_files_only=True) == first
    assert len(hub.requests) == 1


def test_a_mixture_at_a_tag(hub: HubServer, cache: Path) -> None:
    """A revision brings the files of that revision."""
    hub.repos[MIX].tag("v1")
    hub.repos[MIX].commit({"moelora_config.json": b'{"schema": 2}'})

    old, _ = download_mixture(MIX, revision="v1", endpoint=hub.endpoint, cache_dir=cache)
    new, _ = download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache)
    assert (old / "moelora_config.json").read_bytes() == FILES["moelora_config.json"]
    assert (new / "moelora_config.json").read_bytes() == b'{"schema": 2}'


def test_an_outage_is_bridged_with_a_warning(hub: HubServer, cache: Path) -> None:
    """What was downloaded is used when the hub is down, and it is said."""
    first = download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache)
    hub.fail(Fault(path="/api/models", times=9, status=500))

    with pytest.warns(UserWarning, match="Going on with commit"):
        assert download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache) == first


def test_troubles_are_named(hub: HubServer, cache: Path) -> None:
    """Missing, of another kind, too large, hub down: each with its own sentence."""
    hub.add_repo("acme/model", {"config.json": b"{}"})
    hub.add_repo("acme/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})

    assert "was not found" in refused(hub, cache, "acme/none")
    assert "no revision 'v7'" in refused(hub, cache, revision="v7")
    assert "not a mixture pushed by moelora" in refused(hub, cache, "acme/model")
    assert "moelora.patch_model" in refused(hub, cache, "acme/adapter")
    assert "more than the 10 that are accepted" in refused(hub, cache, max_bytes=10)
    assert "not complete in the local cache" in refused(hub, cache, local_files_only=True)
    hub.fail(Fault(path="/api/models", times=9, status=503))
    assert "503" in refused(hub, cache)
    assert not any(request.host == "storage" for request in hub.requests)


def test_a_damaged_expert_leaves_nothing_behind(hub: HubServer, cache: Path) -> None:
    """The damaged file is removed, offline use knows that it is missing, and the next call gets a good one."""
    hub.fail(Fault(path="/large/", corrupt=True))

    assert "damaged on the way" in refused(hub, cache)
    assert "not complete in the local cache" in refused(hub, cache, local_files_only=True)
    folder, _ = download_mixture(MIX, endpoint=hub.endpoint, cache_dir=cache)
    assert content(folder) == FILES


def test_what_was_pushed_comes_back_identical(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    """A saved folder goes up, large files and small, and comes down byte by byte; stray files do not go up."""
    folder = written(tmp_path / "saved", {**FILES, **STRAY, ".env": b"HF_TOKEN=hf_ownersecret"})

    pushed = upload_folder(folder, "acme/new", token=OWNER, endpoint=hub.endpoint)
    back, commit = download_mixture("acme/new", endpoint=hub.endpoint, cache_dir=cache)
    assert content(back) == FILES
    assert commit == pushed.commit == hub.repos["acme/new"].refs["main"]
    assert pushed.url == f"{hub.endpoint}/acme/new/commit/{commit}"
    assert set(hub.repos["acme/new"].commits[commit]) == {*FILES, "README.md", ".gitattributes"}
    assert {request.token for request in hub.requests if request.host == "storage"} == {None}


def test_a_second_push_replaces_the_first(hub: HubServer, tmp_path: Path) -> None:
    """Changed files are replaced, experts that are gone are removed; the same folder again changes nothing."""
    folder = written(tmp_path / "saved", FILES)
    first = upload_folder(folder, "acme/new", token=OWNER, endpoint=hub.endpoint)
    assert upload_folder(folder, "acme/new", token=OWNER, endpoint=hub.endpoint).commit == first.commit

    (folder / "experts/001/adapter_model.safetensors").unlink()
    (folder / "experts/001/adapter_config.json").unlink()
    (folder / "routers.safetensors").write_bytes(b"trained longer")
    second = upload_folder(folder, "acme/new", token=OWNER, endpoint=hub.endpoint)
    now = hub.repos["acme/new"].commits[second.commit]
    assert now["routers.safetensors"] == b"trained longer"
    assert {name for name in now if name.startswith("experts/")} == {name for name in FILES if "/000/" in name}


def test_a_private_push_is_seen_by_its_owner_alone(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    """`private` makes the new repository private."""
    upload_folder(written(tmp_path / "saved", FILES), "acme/own", token=OWNER, endpoint=hub.endpoint, private=True)

    assert "was not found" in refused(hub, cache, "acme/own")
    assert content(download_mixture("acme/own", token=OWNER, endpoint=hub.endpoint, cache_dir=cache)[0]) == FILES


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("acme/new", None, "token=|log in"),
        ("acme/new", STRANGER, "write access"),
        (MIX, STRANGER, "write access"),
        ("acme/new", "hf_wrongsecret", "refused the token"),
        ("../acme", OWNER, "not the id"),
    ],
)
def test_a_push_without_the_right_is_explained(
    hub: HubServer, tmp_path: Path, repo_id: str, token: str | None, message: str
) -> None:
    """No token, another's token, a wrong one, no repository name: nothing is changed, and the reason is said."""
    with pytest.raises(HubError, match=message) as caught:
        upload_folder(written(tmp_path / "saved", FILES), repo_id, token=token, endpoint=hub.endpoint)

    assert "secret" not in str(caught.value)
    assert list(hub.repos) == [MIX]
    assert len(hub.repos[MIX].commits) == 1


def test_only_saved_mixtures_are_pushed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is none, and offline mode, are refused before anything is asked."""
    with pytest.raises(HubError, match="not a saved mixture"):
        upload_folder(written(tmp_path / "other", STRAY), "acme/new", token=OWNER, endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        upload_folder(written(tmp_path / "saved", FILES), "acme/new", token=OWNER, endpoint=hub.endpoint)
    assert hub.asked() == []
