"""A mixture goes to a hub and comes back: the real client against a local server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters_on_disk import main_output, peft_model
from huggingface_hub import ModelCard

import moelora
from moelora.testing import tiny
from moelora.testing.hub_server import HubServer

# The hub client's own upload of large files calls its HTTP library in the deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

TOKEN = "hf_ownersecret"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A hub with two adapters; acme may write."""
    for number, name in enumerate(("math", "code")):
        peft_model("gpt2", tmp_path / name, seed=number)
    repos = {f"acme/{name}-lora": tmp_path / name for name in ("math", "code")}
    with HubServer(repos, tokens={TOKEN: "acme"}) as server:
        yield server


def output_of(model) -> torch.Tensor:
    """What the model answers to the same input."""
    with torch.no_grad():
        return main_output(model(**tiny.inputs(model)))


def test_a_pushed_mixture_comes_back_bit_for_bit(hub, tmp_path):
    """Routers and fresh experts go up; the experts of the hub are read at the commits that they were loaded at."""
    place = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    model = tiny.model("gpt2")
    moelora.patch_model(model, ["acme/math-lora", "acme/code-lora@main"], num_experts=1, rank=2, **place)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    commits = {name: hub.repos[f"acme/{name}-lora"].refs["main"] for name in ("math", "code")}

    url = moelora.push_to_hub(
        model, "acme/mix", token=TOKEN, endpoint=hub.endpoint, metrics={"accuracy": 0.5}, commit_message="Mix"
    )

    # main moves on, and what was pushed stays what it was
    hub.repos["acme/math-lora"].commit({"adapter_model.safetensors": b"broken", "adapter_config.json": b"{}"})
    files = hub.repos["acme/mix"].commits[hub.repos["acme/mix"].refs["main"]]
    assert url.startswith(hub.endpoint)
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "experts/002/adapter_config.json",
        "experts/002/adapter_model.safetensors",
        "moelora_config.json",
        "routers.safetensors",
    ]
    hub.requests.clear()
    loaded = moelora.load(
        tiny.model("gpt2"), "acme/mix", endpoint=hub.endpoint, cache_dir=tmp_path / "another cache", token=TOKEN
    )
    assert torch.equal(output_of(loaded), output_of(model))
    asked = [line for line in hub.asked() if "/acme/math-lora/resolve/" in line]
    assert asked
    assert all(commits["math"] in line for line in asked), "only the pinned commit was fetched"

    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "moelora"
    for text in ("acme/math-lora", commits["math"][:12], commits["code"][:12], "expert0", "## Limits", "accuracy"):
        assert text in card.text
    assert "AutoModelForCausalLM" in card.text
    assert not any(TOKEN.encode() in content or b"/tmp" in content for content in files.values())


def test_experts_from_folders_go_up_with_the_mixture(hub, tmp_path):
    """Nobody else could read them; those of a hub stay where they are."""
    place = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    peft_model("gpt2", tmp_path / "secret-home" / "law", seed=3)
    model = tiny.model("gpt2")
    moelora.patch_model(model, {"math": "acme/math-lora", "law": tmp_path / "secret-home" / "law"}, **place)

    moelora.push_to_hub(model, "acme/mix", token=TOKEN, endpoint=hub.endpoint)

    files = hub.repos["acme/mix"].commits[hub.repos["acme/mix"].refs["main"]]
    assert {path.rpartition("/")[0] for path in files} == {"", "experts/001"}, "of the local expert alone"
    assert not any(b"secret-home" in content for content in files.values())
    (tmp_path / "secret-home").rename(tmp_path / "gone")
    loaded = moelora.load(tiny.model("gpt2"), "acme/mix@main", **place)
    assert torch.equal(output_of(loaded), output_of(model))


def test_offline_a_mixture_and_its_experts_come_from_the_cache(hub, tmp_path):
    """The second time, nobody is asked."""
    place = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    model = moelora.patch_model(tiny.model("gpt2"), ["acme/math-lora", "acme/code-lora"], **place)
    moelora.push_to_hub(model, "acme/mix", token=TOKEN, endpoint=hub.endpoint)
    moelora.load(tiny.model("gpt2"), "acme/mix", **place)
    hub.requests.clear()

    again = moelora.load(tiny.model("gpt2"), "acme/mix", local_files_only=True, **place)

    assert not hub.requests
    assert torch.equal(output_of(again), output_of(model))


def test_a_mixture_from_a_hub_does_not_read_this_disk(hub, tmp_path):
    """An expert that is said to lie in a folder, as a plain save writes it, is refused when it comes from a hub."""
    model = moelora.patch_model(tiny.model("gpt2"), [tmp_path / "math", tmp_path / "code"])
    moelora.save(model, tmp_path / "mix")
    hub.add_repo("acme/careless", tmp_path / "mix")

    with pytest.raises(ValueError, match=r"expert 'math' lies on the disk of whoever.*push_to_hub"):
        moelora.load(tiny.model("gpt2"), "acme/careless", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    loaded = moelora.load(
        tiny.model("gpt2"),
        "acme/careless",
        experts={"math": tmp_path / "math", "code": tmp_path / "code"},
        endpoint=hub.endpoint,
        cache_dir=tmp_path / "cache",
    )
    assert torch.equal(output_of(loaded), output_of(model))


def test_pushing_without_the_right_to_is_an_error(hub, tmp_path):
    """It is the hub's own sentence, and the model is as it was."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=2, rank=2)

    with pytest.raises(ValueError, match="acme/mix"):
        moelora.push_to_hub(model, "acme/mix", token="hf_unknown", endpoint=hub.endpoint)
    assert "acme/mix" not in hub.repos
