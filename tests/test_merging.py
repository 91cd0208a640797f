"""A merged model is the mixture it came from, and what cannot be merged is left alone."""

import pytest
import torch
from adapters_on_disk import main_output, peft_model
from torch import nn
from untouched import untouched

import moelora
from moelora import MoELoRAConfig, TaskEmbedding
from moelora.merging import merge
from moelora.testing import tiny

TASKS = ("summary", "dialogue")


def by_task(family="llama", *, dtype=torch.float32, tasks=TASKS, **options):
    """A tiny mixture of three random experts whose gates differ clearly between tasks."""
    config = MoELoRAConfig(router=TaskEmbedding(tasks=tasks, width=4, init_std=1.0), **options)
    model = moelora.patch_model(tiny.model(family).to(dtype), num_experts=3, rank=2, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def adapted(family, folder, *, names="abc", router="given", **options):
    """A tiny mixture of adapters that PEFT has written; the last has factors at every second site only."""
    for seed, name in enumerate(names):
        peft_model(family, folder / name, seed=seed, every=2 if name == "c" else 1, **options)
    return moelora.patch_model(tiny.model(family), [folder / name for name in names], router=router)


def output_of(model):
    """What a model answers to its tiny inputs."""
    with torch.no_grad():
        return main_output(model(**tiny.inputs(model)))


def fixed(model, experts):
    """The same with a fixed mixture."""
    with moelora.use_experts(model, experts):
        return output_of(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert", "mamba"])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_merged(family, task):
    """The plain model answers as the routed one did, for this task and not for the other."""
    model = by_task(family)
    answers = {}
    for name in TASKS:
        with moelora.given_experts(model, name):
            answers[name] = output_of(model)

    assert merge(model, task=task) is model

    assert not moelora.is_patched(model)
    torch.testing.assert_close(output_of(model), answers[task], rtol=1e-4, atol=1e-5)
    other = answers[TASKS[1 - TASKS.index(task)]]
    assert (output_of(model) - other).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", ["b", {"a": 0.5, "b": -2.0, "c": 1.5}])
def test_fixed_weights_are_merged(family, weights, tmp_path):
    """Also where an expert is missing at a site, whatever router there was."""
    model = adapted(family, tmp_path)
    expected = fixed(model, weights)

    merge(model, weights=weights)

    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_the_biases_of_experts_are_merged(tmp_path):
    """They are added to the base's own, scaled as their rows are."""
    model = adapted("gpt2", tmp_path, names="ab", lora_bias=True)
    assert any(layer.bank.bias_frozen_EO is not None for layer in model._moelora.layers.values())
    for layer in model._moelora.layers.values():
        layer.bank.bias_frozen_EO.normal_(generator=torch.Generator().manual_seed(0))
    expected = fixed(model, {"a": 0.5, "b": 2.0})

    merge(model, weights={"a": 0.5, "b": 2.0})

    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-5)


def test_the_weight_is_the_exact_one_rounded_once():
    """In bf16 it is the fp64 sum rounded: no step in between is in bf16."""
    model = by_task(dtype=torch.bfloat16)
    layer = model._moelora.layers["model.layers.0.self_attn.q_proj"]
    gates = layer.router.mixtures()[0].tolist()
    delta_OD = sum(gate * expert.delta_OD() for gate, expert in zip(gates, layer.bank.split(), strict=True))
    exact_OD = layer.base.weight.double() + delta_OD

    merge(model, task=TASKS[0])

    weight_OD = model.model.layers[0].self_attn.q_proj.weight
    assert weight_OD.dtype is torch.bfloat16
    assert torch.equal(weight_OD, exact_OD.to(torch.bfloat16))


def test_experts_that_do_nothing_change_no_bit():
    """Fresh experts have B = 0: the merged model is its base, to the bit, and flags and modules are as before."""
    model = tiny.model("llama")
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    with untouched(model):
        config = MoELoRAConfig(router=TaskEmbedding(tasks=TASKS))
        merge(moelora.patch_model(model, num_experts=2, rank=2, config=config), task="summary")
    assert not frozen.requires_grad
    assert model.model.norm.weight.requires_grad


def test_a_shared_A_and_a_shared_router_are_merged():
    """HydraLoRA's heads behind MOELoRA's gate."""
    model = by_task(shared_A=True, share_router=True)
    with moelora.given_experts(model, "dialogue"):
        expected = output_of(model)

    merge(model, task="dialogue")

    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-5)


# --- refusals: the model is as it was ---------------------------------------------------------------------------------


def refused(model, message, **options):
    """Merging raises, and nothing has changed."""
    with untouched(model), pytest.raises(ValueError, match=message):
        merge(model, **options)
    assert moelora.is_patched(model)


def test_only_what_is_the_same_for_every_token():
    """A router that looks at the token cannot be folded into a weight."""
    model = moelora.patch_model(tiny.model("llama"), num_experts=2, rank=2)
    refused(model, r"only a mixture that is the same for every token can be merged.*Learned")
    refused(model, r"only a mixture that is the same for every token can be merged", task="summary")


def test_what_is_asked_for_must_be_clear():
    """One mixture, of names and finite weights that exist."""
    model = by_task()
    refused(model, "there is no task None; .*'summary', 'dialogue'")
    refused(model, "there is no task 'summarize'", task="summarize")
    refused(model, "pass either task= or weights=", task="summary", weights="expert0")
    refused(model, "there is no expert 'math'", weights="math")
    refused(model, "weights must be finite", weights={"expert0": float("nan")})
    refused(model, "no expert has a weight", weights={"expert0": 0.0})


class Quantised(nn.Linear):
    """Stands for a projection whose weight is packed."""


def test_a_base_that_is_no_plain_linear():
    """Quantised ones, and those whose output somebody changes with a hook."""
    model = by_task()
    base = model._moelora.layers["model.layers.1.self_attn.o_proj"].base
    base.__class__ = Quantised
    refused(model, r"'model.layers.1.self_attn.o_proj' is a test_merging.Quantised", task="summary")
    base.__class__ = nn.Linear
    handle = base.register_forward_hook(lambda module, args, output: output * 2)
    refused(model, "carries hooks", task="summary")
    handle.remove()
    base.weight = nn.Parameter(base.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"the weight of .* on meta; expected an ordinary tensor"):
        merge(model, task="summary")


@pytest.mark.parametrize("view", [False, True])
def test_a_tied_weight(view):
    """Another module that reads the same memory would change too, as a parameter or as a view."""
    model = by_task()
    layers = model._moelora.layers
    weight = layers["model.layers.0.self_attn.q_proj"].base.weight
    other = layers["model.layers.1.self_attn.q_proj"].base
    other.weight = nn.Parameter(weight.data[:], requires_grad=False) if view else weight
    refused(model, "is tied: .*q_proj.* and .*q_proj.* are the same memory", task="summary")


def test_a_tied_head():
    """The embedding of a model with tied weights is no projection, and would change with its head."""
    model = tiny.model("llama", tie_word_embeddings=True)
    config = MoELoRAConfig(router=TaskEmbedding(tasks=TASKS))
    moelora.patch_model(model, num_experts=2, rank=2, targets=["lm_head"], config=config)
    refused(model, "'lm_head' is tied", task="summary")


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_a_bias_without_a_place(tmp_path):
    """A base without a bias cannot take an expert's."""
    model = adapted("llama", tmp_path, names="ab", lora_bias=True)
    refused(model, "has a bias, and the base has none", weights="a")


def test_an_overflow_is_found_before_anything_changes():
    """An expert with a huge weight does not fit fp16."""
    model = by_task(dtype=torch.float16)
    refused(model, "is not finite in torch.float16", weights={"expert0": 1e9})
