"""Adapters from a hub, as the real client fetches them from a local server."""

import os
import subprocess
import sys
from pathlib import Path

from one_adapter_hub import ADAPTER, OWNER, STRANGER, kept, refused
from one_adapter_hub import cache as cache
from one_adapter_hub import hub as hub

from moelora.integrations.hub import download_adapter, remote_header
from moelora.testing.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files
from moelora.testing.hub_server import HubServer


def test_an_adapter_arrives_as_it_is(hub: HubServer, cache: Path) -> None:
    """Both files are identical to the repository's, of one commit, and each is asked for by its fixed name."""
    files = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)

    assert files.config_path.read_bytes() == adapter_files()[CONFIG_NAME]
    assert files.weights_path.read_bytes() == adapter_files()[WEIGHTS_NAME]
    assert files.commit == hub.repos[ADAPTER].refs["main"]
    assert all(line.endswith((CONFIG_NAME, WEIGHTS_NAME)) or " storage:/large/" in line for line in hub.asked())
    assert all(request.headers["user-agent"].startswith("moelora/") for request in hub.requests)


def test_a_branch_costs_one_request_when_nothing_changed(hub: HubServer, cache: Path) -> None:
    """The second use of a branch asks once where it is, and downloads nothing."""
    first = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    hub.requests.clear()

    assert download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache) == first
    assert hub.asked() == [f"HEAD /{ADAPTER}/resolve/main/{CONFIG_NAME}"]


def test_a_pinned_commit_costs_no_request_the_second_time(hub: HubServer, cache: Path) -> None:
    """A full commit in the cache is final."""
    commit = hub.repos[ADAPTER].refs["main"]
    first = download_adapter(ADAPTER, revision=commit, endpoint=hub.endpoint, cache_dir=cache)
    hub.requests.clear()

    assert download_adapter(ADAPTER, revision=commit, endpoint=hub.endpoint, cache_dir=cache) == first
    assert hub.asked() == []


def test_branches_tags_and_short_commits_are_revisions(hub: HubServer, cache: Path) -> None:
    """Every way to name a commit brings the files of that commit."""
    repo = hub.repos[ADAPTER]
    old = repo.refs["main"]
    repo.tag("v1")
    new = repo.commit(adapter_files(seed=1))
    wild = repo.commit(adapter_files(seed=2), branch="feature/wild")
    expected = {None: new, "main": new, "v1": old, old[:8]: old, "feature/wild": wild, old: old}

    for revision, commit in expected.items():
        files = download_adapter(ADAPTER, revision=revision, endpoint=hub.endpoint, cache_dir=cache)
        assert files.commit == commit
        assert files.config_path.read_bytes() == repo.commits[commit][CONFIG_NAME]
        assert files.weights_path.read_bytes() == repo.commits[commit][WEIGHTS_NAME]


def test_a_branch_that_moved_is_followed(hub: HubServer, cache: Path) -> None:
    """After a new commit on main, main means the new files."""
    download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    commit = hub.repos[ADAPTER].commit(adapter_files(seed=3))

    files = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    assert (files.commit, files.weights_path.read_bytes()) == (commit, adapter_files(seed=3)[WEIGHTS_NAME])


def test_an_adapter_in_a_folder(hub: HubServer, cache: Path) -> None:
    """`subfolder` names the folder; the commit is found at any depth, online and from the cache."""
    repo = hub.add_repo("acme/many", {f"a/b/{name}": content for name, content in adapter_files(4).items()})
    options = {"subfolder": "a/b", "endpoint": hub.endpoint, "cache_dir": cache}

    files = download_adapter("acme/many", **options)
    assert files.weights_path.read_bytes() == adapter_files(4)[WEIGHTS_NAME]
    assert files.commit == repo.refs["main"]
    assert download_adapter("acme/many", local_files_only=True, **options) == files


def test_a_renamed_repository_is_followed(hub: HubServer, cache: Path) -> None:
    """A hub answers the old name with a relative redirect."""
    hub.renamed["acme/old-name"] = ADAPTER

    files = download_adapter("acme/old-name", endpoint=hub.endpoint, cache_dir=cache)
    assert files.weights_path.read_bytes() == adapter_files()[WEIGHTS_NAME]


def test_a_private_repository_needs_its_owners_token(hub: HubServer, cache: Path) -> None:
    """Without, with a stranger's and with a wrong token the message says what to do; with the right one it loads."""
    hub.add_repo("acme/vault", adapter_files(), private=True)

    assert "token=" in refused(hub, cache, "acme/vault")
    assert "token that has access" in refused(hub, cache, "acme/vault", token=STRANGER)
    assert "refused the token" in refused(hub, cache, "acme/vault", token="hf_wrongsecret")
    assert kept(cache) == []
    files = download_adapter("acme/vault", token=OWNER, endpoint=hub.endpoint, cache_dir=cache)
    assert files.weights_path.read_bytes() == adapter_files()[WEIGHTS_NAME]


def test_a_missing_repository_is_named(hub: HubServer, cache: Path) -> None:
    """A typing error is the likeliest reason, so the name is repeated."""
    assert "'acme/lawlora' was not found" in refused(hub, cache, "acme/lawlora")


def test_a_gated_repository_points_to_its_terms(hub: HubServer, cache: Path) -> None:
    """The message has the page to accept them at; after that, the same token works."""
    repo = hub.add_repo("acme/gated", adapter_files(), gated=True)

    for options in ({}, {"token": STRANGER}):
        message = refused(hub, cache, "acme/gated", **options)
        assert "accept its terms" in message
        assert f"{hub.endpoint}/acme/gated" in message
    repo.accepted.add("bob")
    assert download_adapter("acme/gated", token=STRANGER, endpoint=hub.endpoint, cache_dir=cache).commit


def test_a_missing_revision_is_named(hub: HubServer, cache: Path) -> None:
    """The message says that the repository is there and the revision is not."""
    assert "no revision 'v9'" in refused(hub, cache, revision="v9")
    assert "no revision" in refused(hub, cache, revision="f" * 40)


def test_a_model_is_not_an_adapter(hub: HubServer, cache: Path) -> None:
    """A repository without adapter_config.json is refused by that name."""
    hub.add_repo("acme/model", {"config.json": b"{}", "model.safetensors": b"x"})

    assert f"has no {CONFIG_NAME}" in refused(hub, cache, "acme/model")


def test_adapters_in_folders_are_found_for_the_message(hub: HubServer, cache: Path) -> None:
    """Who forgot the folder is told which there are, and how to write it."""
    hub.add_repo("acme/many", {f"tax/{name}": content for name, content in adapter_files().items()})

    assert "acme/many:tax" in refused(hub, cache, "acme/many")


def test_pickled_weights_are_refused(hub: HubServer, cache: Path) -> None:
    """A .bin can run code when it is read: it is not even asked for."""
    hub.add_repo("acme/old", {CONFIG_NAME: adapter_files()[CONFIG_NAME], "adapter_model.bin": b"pickle"})

    assert "a pickle, which can run code" in refused(hub, cache, "acme/old")
    assert not any("adapter_model.bin" in line for line in hub.asked())


def test_too_large_files_are_refused_before_they_are_downloaded(hub: HubServer, cache: Path) -> None:
    """Sizes are known from the first answers; no content is requested."""
    hub.add_repo("acme/wordy", {**adapter_files(), CONFIG_NAME: b" " * 2_000_000})

    assert "more than the 100 that are accepted" in refused(hub, cache, max_bytes=100)
    assert CONFIG_NAME in refused(hub, cache, "acme/wordy")
    assert all(request.method == "HEAD" for request in hub.requests)
    assert kept(cache) == []


def test_local_files_only_asks_nobody(hub: HubServer, cache: Path) -> None:
    """No request, whether the files are cached or not; a missing one is an error that says how to get it."""
    assert "local_files_only=True" in refused(hub, cache, local_files_only=True)
    assert hub.asked() == []

    files = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    hub.requests.clear()
    again = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache, local_files_only=True)
    pinned = download_adapter(
        ADAPTER, revision=files.commit, endpoint=hub.endpoint, cache_dir=cache, local_files_only=True
    )
    assert (again, pinned) == (files, files)
    assert "no revision" not in refused(hub, cache, local_files_only=True, revision="v2")
    assert hub.asked() == []


def test_offline_mode_asks_nobody(hub: HubServer, tmp_path: Path) -> None:
    """A process with HF_HUB_OFFLINE=1 loads what an earlier one cached, and refuses the rest; no request is made."""
    code = (
        "from moelora.integrations.hub import *\n"
        f"print(download_adapter({ADAPTER!r}).commit)\n"
        "for call in (download_adapter, remote_header, download_mixture):\n"
        "    try: call('acme/other')\n"
        "    except HubError as error: print(error)\n"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])

    def python(source: str, **variables: str) -> str:
        command = [sys.executable, "-c", source]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout

    online = python("\n".join(code.splitlines()[:2]))
    hub.requests.clear()
    offline = python(code, HF_HUB_OFFLINE="1").splitlines()

    assert offline[0] == online.strip()
    assert len(offline) == 4
    assert all("HF_HUB_OFFLINE is set" in line for line in offline[1:])
    assert hub.asked() == []


def test_the_token_stays_with_the_hub(hub: HubServer, cache: Path) -> None:
    """Sent with every request to the endpoint, and with none to the host that large files are redirected to."""
    hub.add_repo("acme/vault", adapter_files(), private=True)
    download_adapter("acme/vault", token=OWNER, endpoint=hub.endpoint, cache_dir=cache)
    remote_header("acme/vault", token=OWNER, endpoint=hub.endpoint)

    assert {request.token for request in hub.requests if request.host == "hub"} == {OWNER}
    assert {request.headers.get("authorization") for request in hub.requests if request.host == "storage"} == {None}
    assert not any(OWNER.encode() in path.read_bytes() for path in cache.rglob("*") if path.is_file())


def test_nothing_is_written_outside_the_cache(hub: HubServer, tmp_path: Path) -> None:
    """All files appear below cache_dir, and the client's own home does not change."""
    home = Path(os.environ["HF_HOME"])
    before = sorted(home.rglob("*"))
    download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=tmp_path / "here" / "cache")
    remote_header(ADAPTER, endpoint=hub.endpoint)

    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["cache"]
    assert sorted(home.rglob("*")) == before
