"""Saving and loading is the identity: in a fresh process, of everything that can be in a mixture, without a network."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters_on_disk import main_output, peft_model
from safetensors.torch import load_file, save_file

import moelora
from moelora.config import AuxLosses, MoELoRAConfig
from moelora.testing import tiny

FRESH_PROCESS = """
import json, socket, sys
from pathlib import Path

def refuse(*args):
    raise RuntimeError("loading used the network")

socket.socket.connect = refuse
import torch
from safetensors.torch import load_file
import moelora
from moelora.testing import tiny

torch.set_num_threads(1)
for case in json.loads(sys.argv[1]):
    model = tiny.model(case["family"]).to(getattr(torch, case["dtype"]))
    moelora.load(model, case["folder"])
    with torch.no_grad():
        output = model(**tiny.inputs(model))
    output = output["logits"] if "logits" in output else output["last_hidden_state"]
    assert torch.equal(output, load_file(case["expected"])["output"]), case
    print(case["family"], "equal")
"""


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give everything that is trained values as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)


def output_of(model) -> torch.Tensor:
    """What the model answers to the same input."""
    with torch.no_grad():
        return main_output(model(**tiny.inputs(model)))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adapters(family: str, folder: Path) -> dict[str, Path]:
    """Two adapters with mixed ranks, one of them rsLoRA and at every second site."""
    peft_model(family, folder / "plain", seed=1, rank=3)
    peft_model(family, folder / "stabilised", seed=2, rank=4, every=2, use_rslora=True)
    return {"plain": folder / "plain", "stabilised": folder / "stabilised"}


def mixture(case: str, folder: Path) -> tuple[str, str, torch.nn.Module]:
    """A patched and trained model of a kind, with its family and dtype."""
    if case == "gpt2, adapters":
        model = moelora.patch_model(tiny.model("gpt2"), adapters("gpt2", folder))
        family, dtype = "gpt2", "float32"
    elif case == "llama, bf16, shared router, adapters and fresh experts":
        family, dtype = "llama", "bfloat16"
        config = MoELoRAConfig(share_router=True, losses=AuxLosses(z_loss=0.5))
        model = tiny.model(family).bfloat16()
        moelora.patch_model(model, adapters(family, folder), num_experts=2, rank=5, config=config)
    elif case == "bert, fresh experts and a trained part of the base":
        family, dtype = "bert", "float32"
        model = moelora.patch_model(tiny.model(family), num_experts=3, rank=2, top_k=1)
        last = [p for n, p in model.named_parameters() if n.endswith("LayerNorm.weight")][-1]
        last.requires_grad_()
        next(layer for layer in model._moelora.layers.values()).base.weight.requires_grad_()
    elif case == "bloom, balancing bias and noise":
        family, dtype = "bloom", "float32"
        router = moelora.Learned(noisy=True, balance_bias_speed=0.1, combine="softmax")
        model = moelora.patch_model(tiny.model(family), num_experts=4, rank=2, router=router)
        for layer in model._moelora.layers.values():
            layer.router.balance_bias_E.normal_()
    else:
        raise KeyError(case)
    randomise(model)
    return family, dtype, model


CASES = (
    "gpt2, adapters",
    "llama, bf16, shared router, adapters and fresh experts",
    "bert, fresh experts and a trained part of the base",
    "bloom, balancing bias and noise",
)


def test_a_fresh_process_gives_the_same_logits(tmp_path):
    """Bit for bit, in another working directory, without a network."""
    cases = []
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        family, dtype, model = mixture(case, folder)
        moelora.save(model, folder / "mix")
        expected = output_of(model)
        assert not torch.equal(expected, output_of(tiny.model(family).to(expected.dtype))), "the mixture does something"
        save_file({"output": expected.contiguous()}, folder / "expected.safetensors")
        paths = {"folder": str(folder / "mix"), "expected": str(folder / "expected.safetensors")}
        cases.append({"family": family, "dtype": dtype, **paths})

    environment = os.environ | {"PYTHONPATH": str(Path(moelora.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, json.dumps(cases)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("equal") == len(CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("include_experts", [False, True])
def test_saving_what_was_loaded_writes_the_same_bytes(case, include_experts, tmp_path):
    """save, load, save: the identity, without saying again that experts are to be included."""
    family, dtype, model = mixture(case, tmp_path)
    moelora.save(model, tmp_path / "first", include_experts=include_experts)

    again = moelora.load(tiny.model(family).to(getattr(torch, dtype)), tmp_path / "first")
    moelora.save(again, tmp_path / "second")

    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    assert torch.equal(output_of(again), output_of(model))
    assert moelora.expert_names(again) == moelora.expert_names(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


def test_a_saved_mixture_can_be_saved_over_itself(tmp_path):
    """The experts that a mixture was read from are in memory; writing the same folder again loses nothing."""
    _, _, model = mixture("gpt2, adapters", tmp_path)
    moelora.save(model, tmp_path / "mix", include_experts=True)
    before = files_of(tmp_path / "mix")

    moelora.save(moelora.load(tiny.model("gpt2"), tmp_path / "mix"), tmp_path / "mix")

    assert files_of(tmp_path / "mix") == before


def test_a_save_leaves_no_expert_of_an_earlier_one(tmp_path):
    """One that was taken out is gone from the folder; what no mixture has written stays, whatever a manifest says."""
    model = tiny.model("llama")
    moelora.patch_model(model, num_experts=4, rank=2)
    folder = tmp_path / "saved"
    moelora.save(model, folder)
    for place in ("mine", "experts/007", "experts/002"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "notes.txt").write_text("mine")
    write_adapter_files(tmp_path / "beside")
    manifest = json.loads((folder / "moelora_config.json").read_text())
    manifest["experts"] += [{"folder": "../beside"}, {"folder": "mine"}, {"folder": None}]
    (folder / "moelora_config.json").write_text(json.dumps(manifest))
    for name in moelora.expert_names(model)[2:]:
        moelora.remove_expert(model, name)

    moelora.save(model, folder)

    assert sorted(name for name in files_of(folder) if "/" in name) == [
        "experts/000/adapter_config.json",
        "experts/000/adapter_model.safetensors",
        "experts/001/adapter_config.json",
        "experts/001/adapter_model.safetensors",
        "experts/002/notes.txt",
        "experts/007/notes.txt",
        "mine/notes.txt",
    ]
    assert set(files_of(tmp_path / "beside")) == {"adapter_config.json", "adapter_model.safetensors"}
    again = tiny.model("llama")
    moelora.load(again, folder)
    assert torch.equal(output_of(again), output_of(model))


def test_a_damaged_manifest_does_not_stop_a_save(tmp_path):
    """It is replaced."""
    model = tiny.model("llama")
    moelora.patch_model(model, num_experts=2, rank=2)
    for text in ("", "[]", "{}", '{"experts": 3}', '{"experts": [1]}', '{"experts": [{}]}'):
        (tmp_path / "moelora_config.json").write_text(text)
        moelora.save(model, tmp_path)
        moelora.load(tiny.model("llama"), tmp_path)


def write_adapter_files(folder: Path) -> None:
    """Two files with the names of an adapter's."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("mine")


def test_included_experts_need_no_source_and_tell_no_path(tmp_path):
    """The folder can be moved to another machine, and says nothing of this one."""
    experts = adapters("gpt2", tmp_path / "secret-home")
    model = moelora.patch_model(tiny.model("gpt2"), experts)
    model.name_or_path = str(tmp_path / "secret-home" / "base")
    expected = output_of(model)
    moelora.save(model, tmp_path / "mix", include_experts=True)
    for folder in experts.values():
        folder.rename(folder.with_name(f"{folder.name}-moved"))
    (tmp_path / "mix").rename(tmp_path / "elsewhere")

    assert not any(b"secret-home" in content for content in files_of(tmp_path / "elsewhere").values())
    assert torch.equal(output_of(moelora.load(tiny.model("gpt2"), tmp_path / "elsewhere")), expected)


def test_included_experts_are_plain_peft_folders(tmp_path):
    """The tensors are the adapters' own, under the same names."""
    experts = adapters("gpt2", tmp_path)
    moelora.save(moelora.patch_model(tiny.model("gpt2"), experts), tmp_path / "mix", include_experts=True)

    for number, source in enumerate(experts.values()):
        ours = load_file(tmp_path / "mix" / "experts" / f"{number:03d}" / "adapter_model.safetensors")
        theirs = load_file(source / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_experts_that_have_moved_are_named(tmp_path):
    """Their old place is gone: the error says how to name the new one, and the new one is remembered."""
    experts = adapters("gpt2", tmp_path)
    model = moelora.patch_model(tiny.model("gpt2"), experts)
    expected = output_of(model)
    moelora.save(model, tmp_path / "mix")
    experts["plain"].rename(tmp_path / "new place")

    with pytest.raises(ValueError, match=r"which is not there.*experts=\{'plain': \.\.\.\}.*include_experts=True"):
        moelora.load(tiny.model("gpt2"), tmp_path / "mix")
    with pytest.raises(ValueError, match=r"no experts \['plane'\]"):
        moelora.load(tiny.model("gpt2"), tmp_path / "mix", experts={"plane": tmp_path / "new place"})

    moved = moelora.load(tiny.model("gpt2"), tmp_path / "mix", experts={"plain": tmp_path / "new place"})
    assert torch.equal(output_of(moved), expected)
    moelora.save(moved, tmp_path / "again")
    assert torch.equal(output_of(moelora.load(tiny.model("gpt2"), tmp_path / "again")), expected)


def test_experts_from_relative_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    """What was named relative to one working directory is found from another."""
    adapters("gpt2", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    moelora.save(moelora.patch_model(tiny.model("gpt2"), ["./plain", "stabilised"]), tmp_path / "mix")

    monkeypatch.chdir(tmp_path)
    assert moelora.expert_names(moelora.load(tiny.model("gpt2"), tmp_path / "mix")) == ["plain", "stabilised"]


def test_experts_that_were_trained_are_saved_even_if_they_are_frozen_again(tmp_path):
    """Their folders hold what they were before."""
    model = moelora.patch_model(tiny.model("gpt2"), adapters("gpt2", tmp_path))
    moelora.set_trainable(model, experts=["stabilised"])
    randomise(model)
    moelora.set_trainable(model, experts=False)
    expected = output_of(model)

    moelora.save(model, tmp_path / "mix")

    assert torch.equal(output_of(moelora.load(tiny.model("gpt2"), tmp_path / "mix")), expected)
    assert not (tmp_path / "mix" / "experts" / "000").exists(), "the other expert has not changed"


def test_experts_in_memory_are_included(tmp_path):
    """A live PeftModel and a state dict leave no place to read them from again."""
    live = peft_model("gpt2", tmp_path / "a", seed=1)
    state_dict = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    model = moelora.patch_model(tiny.model("gpt2"), {"live": live, "state": (state_dict, config)})

    moelora.save(model, tmp_path / "mix")

    loaded = moelora.load(tiny.model("gpt2"), tmp_path / "mix")
    assert torch.equal(output_of(loaded), output_of(model))


def test_saving_touches_no_network_and_writes_no_token(tmp_path, monkeypatch):
    """Saving asks nobody, and a token that was used for loading is nowhere in the folder."""
    secret = "hf_averysecrettoken"
    model = moelora.patch_model(tiny.model("gpt2"), adapters("gpt2", tmp_path), token=secret)

    def refuse(*args):
        raise AssertionError("saving used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    moelora.save(model, tmp_path / "mix", include_experts=True)

    assert not any(secret.encode() in content for content in files_of(tmp_path / "mix").values())


def test_a_mixture_of_given_ids_has_no_tensors_and_loads(tmp_path):
    """routers.safetensors is empty then."""
    model = moelora.patch_model(tiny.model("gpt2"), adapters("gpt2", tmp_path), router="given")
    moelora.save(model, tmp_path / "mix")
    loaded = moelora.load(tiny.model("gpt2"), tmp_path / "mix")

    with moelora.given_experts(model, "plain"), moelora.given_experts(loaded, "plain"):
        assert torch.equal(output_of(loaded), output_of(model))


def test_plain_save_pretrained_says_what_to_call(tmp_path):
    """It writes nothing; after unpatching it is the model's own again."""
    model = moelora.patch_model(tiny.model("gpt2"), num_experts=2, rank=2)

    with pytest.raises(ValueError, match=r"moelora\.save\(model, .*moelora\.unpatch_model"):
        model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"moelora\.push_to_hub\(model, 'acme/mix'\)"):
        model.push_to_hub("acme/mix")
    assert not (tmp_path / "plain").exists()

    moelora.unpatch_model(model)
    model.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_changed_since_it_was_patched(tmp_path):
    """Experts added and removed, some sites left without any: what is saved is what is there."""
    model = moelora.patch_model(tiny.model("gpt2"), adapters("gpt2", tmp_path), top_k=1)
    moelora.add_expert(model, name="new", rank=3)
    randomise(model)
    moelora.remove_expert(model, "plain")
    moelora.remove_expert(model, "new")
    moelora.save(model, tmp_path / "mix")

    loaded = moelora.load(tiny.model("gpt2"), tmp_path / "mix")

    assert moelora.expert_names(loaded) == ["stabilised"]
    assert torch.equal(output_of(loaded), output_of(model))
