"""A stack goes to a hub and comes back: the real client against a local server. Its card says what a stack is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from small_stacks import REQUESTS, TRAINING, assert_same, made

import moelora
from moelora.continual import ContinualStack, Nearest, UnlearningStack
from moelora.testing import tiny
from moelora.testing.hub_server import HubServer

# The hub client's own upload of large files calls its HTTP library in the deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

TOKEN = "hf_ownersecret"


@pytest.fixture(scope="module")
def stack() -> UnlearningStack:
    """Two requests; nobody changes it."""
    return made(requests=2)


@pytest.fixture(scope="module")
def saved(stack: UnlearningStack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; nobody changes it."""
    folder = tmp_path_factory.mktemp("saved") / "stack"
    stack.save(folder)
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty hub; acme may write."""
    with HubServer(tokens={TOKEN: "acme"}) as server:
        yield server


def test_a_pushed_stack_comes_back_by_id_and_revision(hub, stack, saved, tmp_path):
    """A new repository is private; main moves on to one request, and the tag is what it was; offline too."""
    place: dict[str, Any] = {"endpoint": hub.endpoint, "token": TOKEN}
    url = stack.push_to_hub("acme/stack", metrics={"miss": 0.1}, **place)
    hub.repos["acme/stack"].tag("v1")
    less = UnlearningStack.load(tiny.model("llama"), saved)
    less.revoke("request-2")
    less.push_to_hub("acme/stack", **place)

    assert url.startswith(hub.endpoint)
    assert hub.repos["acme/stack"].private
    place["cache_dir"] = tmp_path / "cache"
    for options in ({"revision": "v1"}, {"revision": "v1", "local_files_only": True}):
        assert_same(UnlearningStack.load(tiny.model("llama"), "acme/stack", **options, **place), stack)
    assert_same(UnlearningStack.load(tiny.model("llama"), "acme/stack@v1", **place), stack)
    assert_same(UnlearningStack.load(tiny.model("llama"), "acme/stack", **place), less)
    assert not any("001" in path for path in files_on(hub)), "the revoked expert"

    # a plain mixture over it leaves nothing of the stack
    mixture = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2)
    moelora.push_to_hub(mixture, "acme/stack", endpoint=hub.endpoint, token=TOKEN)
    assert not any(path.startswith("stack.") for path in files_on(hub))


def files_on(hub: HubServer) -> dict[str, bytes]:
    """The files of the repository's main branch."""
    repo = hub.repos["acme/stack"]
    return repo.commits[repo.refs["main"]]


def test_the_card_says_what_a_stack_is(hub, stack):
    """Access control and not erasure; the rates, and which are not kept; how to load it; what lies in the folder."""
    stack.push_to_hub("acme/stack", endpoint=hub.endpoint, token=TOKEN, private=False)

    files = files_on(hub)
    card = ModelCard(files["README.md"].decode())
    assert not hub.repos["acme/stack"].private
    assert {"unlearning", "moelora"} <= set(card.data.to_dict()["tags"])
    for text in (
        "This is access control, not erasure.",
        "from moelora.continual import UnlearningStack",
        'stack = UnlearningStack.load(model, "acme/stack")',
        "## What the gates promise",
        f"| request-1 | {stack.requests[0].certificate.miss.bound:.3g} (not kept) |",
        "holds statistics of the texts",
        "does not run",
    ):
        assert text in card.text
    assert "a router picks" not in card.text.lower()
    assert "moelora.load(model" not in card.text
    assert not any(TOKEN.encode() in content or b"/tmp" in content for content in files.values())

    made(detector=Nearest()).push_to_hub(
        "acme/stack", include_features=True, endpoint=hub.endpoint, token=TOKEN, commit_message="Features"
    )
    assert "features of single texts" in files_on(hub)["README.md"].decode()


def test_the_card_of_a_continual_stack(hub):
    """It promises nothing where nothing was calibrated, and says nothing of unlearning."""
    stack = ContinualStack(tiny.model("llama"), rank=2, routing="sum")
    stack.learn(REQUESTS[0], training=TRAINING)
    stack.push_to_hub("acme/stack", endpoint=hub.endpoint, token=TOKEN)

    card = ModelCard(files_on(hub)["README.md"].decode())
    assert "ContinualStack.load" in card.text
    assert "What the gates promise" not in card.text
    assert "stack.safetensors" not in card.text
    assert "does not run" in card.text
    assert "unlearning" not in [*card.data.to_dict()["tags"], *card.text.lower().split()]
