"""What the tests of the hub room share: a hub with one adapter, an empty cache, and how a refusal reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from moelora.integrations.hub import HubError, client, download_adapter
from moelora.testing.adapter_files import adapter_files
from moelora.testing.hub_server import HubServer

ADAPTER = "acme/law-lora"
OWNER, STRANGER = "hf_ownersecret", "hf_strangersecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one adapter; retries do not wait."""
    monkeypatch.setattr(client, "RETRY_PAUSES", (0.01, 0.01))
    with HubServer({ADAPTER: adapter_files()}, tokens={OWNER: "acme", STRANGER: "bob"}) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache."""
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    """The names of all real files in the cache that hold content."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and "blobs" in path.parts)


def refused(hub: HubServer, cache: Path, repo_id: str = ADAPTER, **options) -> str:
    """The message with which a download is refused; no token may be in it, nor in what it was caused by."""
    with pytest.raises(HubError) as caught:
        download_adapter(repo_id, endpoint=hub.endpoint, cache_dir=cache, **options)
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in str(error)
        error = error.__cause__ or error.__context__
    return str(caught.value)
