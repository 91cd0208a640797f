"""torch.compile(fullgraph=True) takes a patched model as it is: in evaluation, in training, under every setting.

Compiled code cannot hold the checks of annotations that tests run with, so each test is a script in a process of its
own, with those checks off.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HEAD = """
import contextlib
import sys
import torch
import moelora
from moelora import AuxLosses, Learned, MoELoRAConfig
from moelora.testing import tiny
from torch._dynamo.utils import counters

torch.set_num_threads(1)
torch.manual_seed(0)


def patched(family="llama", share_router=False, **router):
    config = MoELoRAConfig(
        router=Learned(init_std=0.5, **router),
        losses=AuxLosses(load_balance=0.5, z_loss=0.1),
        share_router=share_router,
    )
    model = moelora.patch_model(tiny.model(family, num_hidden_layers=1), num_experts=4, rank=3, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def graphs():
    return counters["stats"]["unique_graphs"]


def step(called, model, inputs):
    model.zero_grad()
    output = called(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs):
    (output, got), (expected_output, expected) = ours, theirs
    torch.testing.assert_close(output.loss, expected_output.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.aux_loss, expected_output.aux_loss, rtol=1e-5, atol=1e-5)
    assert got.keys() == expected.keys() and len(got) == 12, sorted(got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
"""


def run(script: str) -> None:
    """Run a script behind HEAD in a fresh process, without annotation checks, warnings being errors of ours alone."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {
        "JAXTYPING_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join((root, str(Path(__file__).parent))),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
    }
    finished = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert "Dynamo detected" not in finished.stderr, finished.stderr[-4000:]


def test_settings_switch_within_few_graphs():
    """Every setting gives eager's logits; other weights, other experts and a second turn compile nothing anew."""
    run(
        """
        model = patched()
        inputs = tiny.inputs(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

        def compare(context, new_graphs, inputs=inputs):
            before = graphs()
            with torch.no_grad(), context:
                expected = model(**inputs).logits
                got = compiled(**inputs).logits
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert graphs() - before == new_graphs, graphs() - before
            return got

        routed = compare(contextlib.nullcontext(), 1)
        closed = compare(moelora.disabled(compiled), 1)
        assert not torch.equal(closed, routed)
        fixed = [
            compare(moelora.use_experts(compiled, mixture), number == 0)
            for number, mixture in enumerate(["expert0", "expert1", {"expert2": 0.3}, {"expert2": -0.7}])
        ]
        assert not torch.equal(fixed[2], fixed[3])
        compare(moelora.use_experts(compiled, ["expert0", None]), 1)
        compare(moelora.use_experts(compiled, ["expert3", "expert1"]), 0)
        # back again
        compare(contextlib.nullcontext(), 0)
        compare(moelora.disabled(compiled), 0)
        compare(moelora.use_experts(compiled, "expert3"), 0)

        # one token takes another way through the kernels
        one = {"input_ids": inputs["input_ids"][:1, :1]}
        compare(contextlib.nullcontext(), 1, one)
        """
    )


def test_recordings_and_losses_come_out_of_compiled_code():
    """record() and aux_loss() take the compiled wrapper, and say what eager says."""
    run(
        """
        model = patched()
        inputs = tiny.inputs(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            with moelora.record(model) as expected:
                model(**inputs)
            with moelora.record(compiled) as got:
                compiled(**inputs)
        assert got.keys() == expected.keys() == model._moelora.layers.keys()
        for site, routing in expected.items():
            assert torch.equal(got[site].experts_TK, routing.experts_TK)
            torch.testing.assert_close(got[site].weights_TK, routing.weights_TK)
            assert torch.equal(got.valid(site), expected.valid(site))
        assert moelora.is_patched(compiled) and moelora.expert_names(compiled) == moelora.expert_names(model)

        model.train()
        aux = step(model, model, inputs)[0].aux_loss
        step(compiled, model, inputs)
        torch.testing.assert_close(moelora.aux_loss(compiled).detach(), aux, rtol=1e-5, atol=1e-6)
        """
    )


@pytest.mark.parametrize(
    "options",
    ["", "share_router=True", "top_k=1, combine='unit', balance_bias_speed=0.01"],
    ids=["own", "shared", "balanced"],
)
def test_training_compiles_once(options):
    """Loss, balance loss and gradients are eager's, and later steps compile nothing."""
    run(
        f"""
        def both():
            return patched({options})

        eager, model = both().train(), both().train()
        inputs = tiny.inputs(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        known = None
        for turn in range(5):
            ours, theirs = step(compiled, model, inputs), step(eager, eager, inputs)
            if {"share_router" not in options}:
                assert_same_step(ours, theirs)
            torch.testing.assert_close(ours[0].loss, theirs[0].loss)
            if turn == 1:
                known = graphs()
        assert graphs() == known, (graphs(), known)
        for (name, ours), theirs in zip(model.named_buffers(), eager.buffers()):
            torch.testing.assert_close(ours, theirs, msg=name)
        """
    )


def test_a_compiled_training_step_takes_the_model_in():
    """The model inside a bigger compiled function: hooks and losses become part of one graph."""
    run(
        """
        eager, model = patched().train(), patched().train()
        inputs = tiny.inputs(model)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def forward(**inputs):
            return model(**inputs)

        for turn in range(4):
            assert_same_step(step(forward, model, inputs), step(eager, eager, inputs))
            if turn == 1:
                known = graphs()
        assert graphs() == known, (graphs(), known)
        """
    )


def test_an_interrupted_call_is_over_for_compiled_code():
    """Compiled code takes the whole model for a new call, whatever was left open; gates are refused as ever."""
    run(
        """
        from gated_mixtures import BOTH, Told, patched as gated, stop

        def interrupt(model, inputs):
            hook = model.model.layers[0].mlp.register_forward_hook(stop(KeyboardInterrupt()))
            try:
                model(**inputs)
            except KeyboardInterrupt as error:
                sys.last_value = error
            hook.remove()

        model = patched().eval()
        inputs = tiny.inputs(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            expected = model(**inputs).logits
            for _ in range(2):
                with moelora.disabled(model):
                    interrupt(model, inputs)
                torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        assert graphs() == 1, graphs()

        model = gated()
        moelora.set_gates(model, Told(BOTH))
        with torch.no_grad():
            interrupt(model, inputs)
            try:
                torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
            except Exception as error:
                assert "gates are asked outside of compiled code" in str(error), error
            else:
                raise AssertionError("the gates were not asked")
        """
    )


@pytest.mark.slow
def test_inductor_generates_code_for_it():
    """With real code generation: prefill and one token in evaluation."""
    run(
        """
        model = patched()
        inputs = tiny.inputs(model)
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
            one = {"input_ids": inputs["input_ids"][:1, :1]}
            torch.testing.assert_close(compiled(**one).logits, model(**one).logits, rtol=1e-4, atol=1e-4)
        """
    )


def test_a_site_brings_its_own_weights_into_the_graph_and_nothing_else():
    """Compiled code loads and checks each input at every call: index tensors are shared, also after a move."""
    run(
        """
        def count(layers, patch):
            model = tiny.model("llama", num_hidden_layers=layers).eval()
            sites = 0
            if patch:
                moelora.patch_model(model, num_experts=4, rank=3, config=MoELoRAConfig(router=Learned()))
                moelora.set_trainable(model)
                sites = len(model._moelora.layers)
            # moving to another device makes new tensors, too
            model._apply(torch.clone)
            found = []

            def backend(graph, inputs):
                found.append(sum(isinstance(each, torch.Tensor) for each in inputs))
                return graph.forward

            with torch.no_grad():
                torch.compile(model, fullgraph=True, backend=backend)(**tiny.inputs(model))
            assert len(found) == 1, found
            return found[0], sites

        (one, few), (two, many) = count(1, True), count(2, True)
        base = count(2, False)[0] - count(1, False)[0]
        # A, B and the router
        assert two - one - base == 3 * (many - few), (one, two, base, few, many)
        """
    )


def test_whether_the_kernels_run_is_known_without_looking():
    """On a GPU every layer asks this while it is traced; the search for Triton itself cannot be traced."""
    run(
        """
        from moelora.kernels.fused import operators

        operators()
        compiled = torch.compile(lambda x: x + (operators() is None), fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)) == 1
        """
    )
