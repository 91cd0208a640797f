"""Bad days of a hub: busy, gone, damaged, hostile. The real client against a local server."""

import time
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download
from one_adapter_hub import ADAPTER, kept, refused
from one_adapter_hub import cache as cache
from one_adapter_hub import hub as hub

from moelora.integrations.hub import HubError, adapters, download_adapter
from moelora.testing.adapter_files import CONFIG_NAME, WEIGHTS_NAME, adapter_files
from moelora.testing.hub_server import HubServer
from moelora.testing.hub_wire import Fault


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hiccup_is_ridden_out(hub: HubServer, cache: Path, status: int) -> None:
    """Two bad answers, then a good one."""
    hub.fail(Fault(path=CONFIG_NAME, times=2, status=status))

    assert download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache).commit


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_reported_soon(hub: HubServer, cache: Path, status: int) -> None:
    """Three tries and no more; the message has the status."""
    hub.fail(Fault(path="resolve", times=10**6, status=status))
    began = time.monotonic()

    assert str(status) in refused(hub, cache)
    assert len(hub.requests) == 3
    assert time.monotonic() - began < 2


def test_a_long_wait_is_left_to_the_user(hub: HubServer, cache: Path) -> None:
    """A hub that asks for two minutes gets them: the message says so at once."""
    hub.fail(Fault(path="resolve", times=10**6, status=429, retry_after=120))

    assert "try again in 120 seconds" in refused(hub, cache)
    assert len(hub.requests) == 1


def test_a_short_wait_is_kept(hub: HubServer, cache: Path) -> None:
    """Retry-After of a second is waited for, then all is well."""
    hub.fail(Fault(path="resolve", status=429, retry_after=1))
    began = time.monotonic()

    assert download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache).commit
    assert time.monotonic() - began >= 1


def test_a_hub_that_hangs_times_out(hub: HubServer, cache: Path) -> None:
    """The client's time-out (HF_HUB_ETAG_TIMEOUT, two seconds in tests) is the only wait."""
    hub.fail(Fault(path="resolve", hang_s=20.0))
    began = time.monotonic()

    assert "could not be reached" in refused(hub, cache)
    assert time.monotonic() - began < 6


def test_an_address_where_nobody_listens(cache: Path) -> None:
    """The message names the host, without the password that the address may carry."""
    with HubServer() as gone:
        host = gone.endpoint.removeprefix("http://")

    with pytest.raises(HubError, match=f"the hub at {host} could not be reached"):
        download_adapter(ADAPTER, endpoint=f"http://user:pass@{host}", cache_dir=cache)


@pytest.mark.parametrize("fault", [Fault(path="resolve", times=9, status=503), Fault(path="resolve", hang_s=20.0)])
def test_known_files_bridge_an_outage(hub: HubServer, cache: Path, fault: Fault) -> None:
    """A hub that cannot answer is no reason to stop when the branch is cached, but it is said."""
    first = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    fault.times = 9
    hub.fail(fault)

    with pytest.warns(UserWarning, match=f"Going on with commit {first.commit}"):
        assert download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache) == first


def test_a_refusal_is_not_bridged(hub: HubServer, cache: Path) -> None:
    """A repository that went private is an error, also when it is cached."""
    download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    hub.repos[ADAPTER].private = True

    assert "was not found" in refused(hub, cache)


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        ("/large/", {"corrupt": True}, "damaged on the way"),
        (CONFIG_NAME, {"corrupt": True, "method": "GET"}, "damaged on the way"),
        ("/large/", {"truncate_to": 50}, "stopped early"),
        (CONFIG_NAME, {"truncate_to": 5, "method": "GET"}, "stopped early"),
    ],
)
def test_a_damaged_download_leaves_nothing_behind(
    hub: HubServer, cache: Path, path: str, wrong: dict, message: str
) -> None:
    """The damaged file is not in the cache, so the next call gets a good one."""
    hub.fail(Fault(path=path, **wrong))

    assert message in refused(hub, cache)
    assert len(kept(cache)) == (1 if path == "/large/" else 0)
    assert "not complete in the local cache" in refused(hub, cache, local_files_only=True)
    files = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    assert files.config_path.read_bytes() == adapter_files()[CONFIG_NAME]
    assert files.weights_path.read_bytes() == adapter_files()[WEIGHTS_NAME]


def test_a_connection_that_breaks_is_taken_up_again(hub: HubServer, cache: Path) -> None:
    """The client asks a second time; what it puts together has the right hash."""
    hub.fail(Fault(path="/large/", hang_up_after=100))

    files = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    assert files.weights_path.read_bytes() == adapter_files()[WEIGHTS_NAME]
    assert [request.method for request in hub.requests if request.host == "storage"] == ["GET", "GET"]


@pytest.mark.parametrize("token", ["hf_secret\nX-Evil: 1", "hf_sécret", "", "hf secret"])
def test_a_token_that_is_none_is_not_sent(hub: HubServer, cache: Path, token: str) -> None:
    """Line ends and the like are refused before a request is made."""
    assert "bare token" in refused(hub, cache, token=token)
    assert hub.asked() == []


BAD_NAMES = [
    {"repo_id": "../../etc"},
    {"repo_id": "/acme/law"},
    {"repo_id": "acme/law/lora"},
    {"repo_id": "acme/la w"},
    {"repo_id": "acme--law"},
    {"subfolder": "../other"},
    {"subfolder": "a/../../b"},
    {"subfolder": "/a"},
    {"subfolder": "a/"},
    {"subfolder": "a\\..\\b"},
    {"subfolder": "."},
    {"revision": "../../../outside"},
    {"revision": "/main"},
    {"revision": "a//b"},
    {"revision": "main\n"},
    {"revision": "a b"},
    {"endpoint": "ftp://hub"},
    {"endpoint": "file:///etc"},
]


@pytest.mark.parametrize("bad", BAD_NAMES, ids=str)
def test_names_that_could_leave_the_cache_are_refused(hub: HubServer, cache: Path, bad: dict[str, str]) -> None:
    """Repository, folder, revision and endpoint are checked before anything is asked or written."""
    options = {"endpoint": hub.endpoint, "cache_dir": cache, "local_files_only": False, **bad}

    with pytest.raises(HubError):
        download_adapter(options.pop("repo_id", ADAPTER), **options)
    assert hub.asked() == []
    assert not cache.exists()


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (CONFIG_NAME, {"drop_headers": ("ETag",)}),
        (CONFIG_NAME, {"drop_headers": ("X-Repo-Commit",)}),
        (WEIGHTS_NAME, {"drop_headers": ("X-Linked-Size",)}),
        (CONFIG_NAME, {"drop_headers": ("Content-Length",)}),
        (CONFIG_NAME, {"add_headers": {"ETag": '"../../../../outside"'}}),
        (CONFIG_NAME, {"add_headers": {"X-Repo-Commit": "../../outside"}}),
        (CONFIG_NAME, {"status": 418}),
    ],
)
def test_a_server_that_is_no_hub_is_refused(
    hub: HubServer, cache: Path, tmp_path: Path, path: str, wrong: dict
) -> None:
    """Commit, ETag and size must come, and commit and ETag become file names: nothing else is taken for them."""
    hub.fail(Fault(path=path, times=10**6, **wrong))

    assert "does not behave like a model hub" in refused(hub, cache)
    assert kept(tmp_path) == []


def test_a_branch_that_moves_during_the_download(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of two commits are never handed out together: the call is refused, and the next one gets the new commit."""
    new = {**adapter_files(seed=1), CONFIG_NAME: b'{"peft_type": "LORA", "r": 4}'}
    with monkeypatch.context() as patch:

        def push_then_download(*args, **options):
            hub.repos[ADAPTER].commit(new)
            return hf_hub_download(*args, **options)

        patch.setattr(adapters, "hf_hub_download", push_then_download)
        assert "got a new commit" in refused(hub, cache)

    files = download_adapter(ADAPTER, endpoint=hub.endpoint, cache_dir=cache)
    assert files.weights_path.read_bytes() == new[WEIGHTS_NAME]
    assert files.config_path.read_bytes() == new[CONFIG_NAME]


def test_a_login_that_is_missing_is_named(hub: HubServer, cache: Path) -> None:
    """`token=True` asks for the stored token; without one the message says how to log in."""
    assert "hf auth login" in refused(hub, cache, token=True)
    assert hub.asked() == []
