"""The router that draws its experts: its choices, its weights, and what it keeps along a conversation."""

import copy
import warnings
from typing import Any

import pytest
import torch
from generating import PLAIN, cache_name, left_padded, prompt

import moelora
from moelora import RLOO, AuxLosses, MoELoRAConfig
from moelora.bank import Expert, ExpertBank
from moelora.latch import Latch, Turn
from moelora.metrics import effective_support
from moelora.routing import active_tokens
from moelora.tape import Tape
from moelora.testing import tiny
from moelora.testing.router_contract import router_contract

ALL_ACT = pytest.mark.filterwarnings("ignore:a site has .* experts and all of them act")


def bank_of(ranks, scales=None, width=12):
    """A bank of random experts."""
    scales = [2.0] * len(ranks) if scales is None else scales
    experts = [
        Expert(torch.randn(rank, width), torch.randn(rank, 5), scale) for rank, scale in zip(ranks, scales, strict=True)
    ]
    return ExpertBank.stack(experts, in_features=width, out_features=5)


def built(config, ranks, scales=None, width=12):
    """A router with wide scores, started from such a bank."""
    router = config.build(width, [rank > 0 for rank in ranks], torch.Generator().manual_seed(0))
    torch.nn.init.normal_(router.weight_ED)
    router.start_from([bank_of(ranks, scales, width)], range(len(ranks)))
    return router


def patched(family="llama", *, granularity: Any = "token", weight: Any = "rslora", **options):
    """A tiny model with four random experts and routers that decide clearly."""
    router = RLOO(granularity=granularity, weight=weight, init_std=0.5)
    config = MoELoRAConfig(router=router, losses=AuxLosses(load_balance=0.0), **options)
    model = moelora.patch_model(tiny.model(family), num_experts=4, rank=3, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


# --- choices and weights ----------------------------------------------------------------------------------------------


@ALL_ACT
@pytest.mark.parametrize("weight", ["rslora", "lora", "mean", "sum"])
@pytest.mark.parametrize("top_k", [1, 2, 99])
def test_it_keeps_the_contract(weight, top_k):
    """Draws in training, the k best in evaluation."""

    def build(in_features, available):
        return built(RLOO(top_k=top_k, weight=weight), [4 if here else 0 for here in available], width=in_features)

    router_contract(build, deterministic=False, weight_sum=1.0 if weight == "mean" else None, examples=10)


@pytest.mark.parametrize("training", [False, True])
def test_equal_weights_support_k_experts(training):
    """Effective support of what is applied is k for every token, whatever the scores: no collapse."""
    router = built(RLOO(top_k=3, weight="mean"), [4] * 6).train(training)
    routing = router(torch.randn(50, 12), Tape())

    assert torch.equal(effective_support(routing.weights_TK), torch.full((50,), 3.0, dtype=torch.float64))
    assert routing.logits_TE is not None
    assert effective_support(routing.logits_TE.softmax(-1)).min() < 2


@pytest.mark.parametrize(
    ("weight", "omega"),
    [("rslora", 2 / (3 * 8) ** 0.5), ("lora", 2 / (3 * 8)), ("mean", None), ("sum", None)],
)
def test_the_weight_takes_the_place_of_the_scale(weight, omega):
    """g_e s_e is omega for "lora" and "rslora", s_e / k for "mean", s_e for "sum"."""
    scales = [0.5, 2.0, -1.5, 4.0]
    router = built(RLOO(top_k=3, weight=weight), [8] * 4, scales)
    routing = router(torch.randn(20, 12), Tape())
    applied_TK = routing.weights_TK * torch.tensor(scales)[routing.experts_TK]

    expected = torch.tensor(scales)[routing.experts_TK] / (3 if weight == "mean" else 1)
    torch.testing.assert_close(applied_TK, expected if omega is None else torch.full_like(applied_TK, omega))


def test_a_site_with_fewer_experts_shares_among_them():
    """k is the number of those that act, also in omega; it is warned of, since nothing is left to choose."""
    with pytest.warns(UserWarning, match="a site has 2 experts and all of them act, top_k=3; there logQ carries no"):
        router = built(RLOO(top_k=3), [0, 4, 4, 0])

    weights_TK = router(torch.randn(5, 12), Tape()).weights_TK
    torch.testing.assert_close(weights_TK, torch.full((5, 2), 2 / (2 * 4) ** 0.5 / 2.0))


def test_the_input_is_detached():
    """No gradient of a routing reaches what is in front of the router."""
    router = built(RLOO(), [4] * 4)
    x_TD = torch.randn(5, 12, requires_grad=True)
    routing = router.train()(x_TD, Tape())
    assert routing.log_prob_T is not None
    (routing.log_prob_T.sum() + routing.logits_TE.sum()).backward()

    assert x_TD.grad is None
    assert router.weight_ED.grad is not None
    assert router.weight_ED.grad.any()
    assert not routing.weights_TK.requires_grad


def test_draws_come_from_the_tapes_generator():
    """The same generator, the same draws, whatever torch's own does; another one, others."""
    router, x_TD = built(RLOO(), [4] * 6).train(), torch.randn(40, 12)
    draws = [router(x_TD, Tape(generator=torch.Generator().manual_seed(seed))).experts_TK for seed in (1, 1, 2)]

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_evaluation_is_deterministic_and_takes_the_best():
    """argtop-k of q."""
    router, x_TD = built(RLOO(top_k=2), [4] * 6).eval(), torch.randn(40, 12)
    first, second = router(x_TD, Tape()), router(x_TD, Tape())

    assert torch.equal(first.experts_TK, second.experts_TK)
    assert torch.equal(first.experts_TK, first.logits_TE.topk(2).indices)
    assert first.log_prob_T is None


@pytest.mark.parametrize(("weight", "combine"), [("mean", "constant"), ("sum", "unit"), ("rslora", None)])
@torch.no_grad()
def test_the_kernels_gate_is_this_router_in_evaluation(weight, combine):
    """Where weights are 1/K or 1 the gate says the same; in training, where experts are drawn, there is none."""
    router, x_TD = built(RLOO(weight=weight), [4] * 5).eval(), torch.randn(30, 12)
    gate = router.linear_gate()
    assert router.train().linear_gate() is None
    if combine is None:
        assert gate is None
        return

    routing = router.eval()(x_TD, Tape())
    assert gate is not None
    assert gate.combine == combine
    assert torch.equal((x_TD @ gate.weight_ED.T / gate.temperature).topk(gate.top_k).indices, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, torch.full((30, 2), 0.5 if combine == "constant" else 1.0))


def test_a_straight_through_gate_has_a_gradient_that_this_router_has_not():
    """So it is not offered where gradients are recorded."""
    assert built(RLOO(weight="sum"), [4] * 5).eval().linear_gate() is None


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"weight": "alpha"}, r"unknown weight 'alpha'; expected one of \('rslora', 'lora', 'mean', 'sum'\)"),
        ({"granularity": "sentence"}, "unknown granularity 'sentence'"),
        ({"init_std": -1.0}, "init_std must not be negative"),
    ],
)
def test_bad_options_are_refused(options, message):
    """When the configuration is made. Under the checks of these tests a wrong word is a TypeError before that."""
    with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check error"):
        RLOO(**options)


@pytest.mark.parametrize("weight", ["rslora", "lora"])
def test_experts_of_unequal_rank_need_their_own_scales(weight):
    """One omega stands for one rank; "mean" takes any."""
    with pytest.raises(
        ValueError, match=r"the ranks are \[4, 8\]; take experts of one rank, or weight='mean' or 'sum'"
    ):
        built(RLOO(weight=weight), [4, 8, 0, 4])
    assert built(RLOO(weight="mean"), [4, 8, 0, 4]).gain_E is None


def test_a_scale_of_zero_cannot_be_replaced():
    """omega / 0."""
    with pytest.raises(ValueError, match=r"expert 1 has \[0.0\]"):
        built(RLOO(), [4, 4, 4], [1.0, 0.0, 1.0])


def test_a_refused_model_is_as_it_was(tmp_path):
    """Patching with adapters of unequal rank, and adding such an expert later, leave no trace."""
    base = tiny.model("llama")
    tiny.adapter(base, tmp_path / "a", seed=1, rank=4)
    tiny.adapter(base, tmp_path / "b", seed=2, rank=4)
    tiny.adapter(base, tmp_path / "c", seed=3, rank=4)
    tiny.adapter(base, tmp_path / "odd", seed=4, rank=2)
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    with pytest.raises(ValueError, match=r"the ranks are \[2, 4\]"):
        moelora.patch_model(base, [*folders, str(tmp_path / "odd")], router=RLOO())
    assert not moelora.is_patched(base)

    model, inputs = moelora.patch_model(base, folders, router=RLOO(init_std=0.5)).eval(), tiny.inputs(base)
    with torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(ValueError, match=r"the ranks are \[2, 4\]"):
            moelora.add_expert(model, str(tmp_path / "odd"))
        assert torch.equal(model(**inputs).logits, before)
    assert moelora.expert_names(model) == ["a", "b", "c"]
    assert all(len(layer.bank) == layer.router.num_experts == 3 for layer in model._moelora.layers.values())


@pytest.mark.parametrize("granularity", ["token", "prompt"])
def test_a_saved_mixture_comes_back(granularity, tmp_path):
    """The ranks and scales that the weights replace are saved with the router; no warning, no new start."""
    model, inputs = patched(granularity=granularity), tiny.inputs(tiny.model("llama"))
    moelora.save(model, tmp_path)
    again = moelora.load(tiny.model("llama"), tmp_path)

    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    assert again._moelora.config.router == RLOO(granularity=granularity, init_std=0.5)


def test_experts_come_and_go_with_their_scales():
    """A new expert gets its weight, and those that stay keep theirs."""
    model = patched()
    moelora.add_expert(model, name="late", rank=3)
    moelora.remove_expert(model, "expert0")
    for layer in model._moelora.layers.values():
        torch.testing.assert_close(layer.router.gain_E, torch.full((4,), 2 / 3**0.5 / 2.0))


# --- one choice for a prompt ------------------------------------------------------------------------------------------


def answered(ids, known):
    """Labels of which the first `known` tokens of each row have none."""
    labels = ids.clone()
    labels[:, :known] = -100
    return labels


def choices(recording, rows=2):
    """Each site's experts of each row and token."""
    return {site: routing.experts_TK.unflatten(0, (rows, -1)) for site, routing in recording.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("share_router", [False, True], ids=["own", "shared"])
@torch.no_grad()
def test_all_tokens_of_a_row_have_one_choice(training, share_router):
    """Prompt, answer and padding; rows differ."""
    model = patched(granularity="prompt", share_router=share_router).train(training)
    ids = prompt(4, 7)
    with moelora.record(model) as recording:
        model(input_ids=ids, labels=answered(ids, 3))

    found = choices(recording, 4)
    assert all(torch.equal(experts_BLK, experts_BLK[:, :1].expand_as(experts_BLK)) for experts_BLK in found.values())
    assert any(len({tuple(row) for row in experts_BLK[:, 0].tolist()}) > 1 for experts_BLK in found.values())


@torch.no_grad()
def test_an_answer_does_not_choose_its_experts():
    """Other answer tokens, other turns after it: the same choice. Another prompt: another one, somewhere."""
    model = patched(granularity="prompt").eval()
    ids = prompt(2, 8)
    labels = answered(ids, 4)
    labels[:, 6] = -100  # a later turn of the user is no prompt of the answer before it
    found = []
    for change in (None, 4, 6, 7, 1):
        changed = ids.clone()
        if change is not None:
            changed[:, change] = 98 - changed[:, change]
        with moelora.record(model) as recording:
            model(input_ids=changed, labels=labels)
        found.append(recording)

    for other in found[1:4]:
        for site in found[0]:
            assert torch.equal(choices(other)[site], choices(found[0])[site])
    # at the first layer nothing but the prompt's own tokens is seen
    first = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(found[3][first].logits_TE, found[0][first].logits_TE)
    assert not torch.allclose(found[4][first].logits_TE, found[0][first].logits_TE)


@torch.no_grad()
def test_without_labels_all_that_is_real_is_prompt():
    """Padding is none of it, on either side."""
    model, first = patched(granularity="prompt").eval(), "model.layers.0.self_attn.q_proj"
    seen = []
    layer = model.get_submodule(first)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = left_padded([prompt(1, 4)[0], prompt(1, 7)[0]])
    with moelora.record(model) as recording:
        model(**inputs)
    handle.remove()

    mean_BD = torch.stack([seen[0][0, 3:].mean(0), seen[0][1].mean(0)])
    expected_BE = mean_BD @ layer.router.weight_ED.T
    logits_TE = recording[first].logits_TE
    assert logits_TE is not None
    got_BE = logits_TE.unflatten(0, (2, -1))[:, 0]
    torch.testing.assert_close(got_BE, expected_BE, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba", "jamba", "zamba2"])
def test_decoding_step_by_step_equals_one_call_with_labels(family):
    """What the prompt's call has chosen holds for the answer: the same experts and logits as in training's one call."""
    model = patched(family, granularity="prompt").eval()
    ids, key = prompt(2, 8), cache_name(model)
    with moelora.record(model) as whole:
        expected = model(input_ids=ids, labels=answered(ids, 4), use_cache=False).logits

    with moelora.record(model) as steps:
        output = model(input_ids=ids[:, :4], use_cache=True)
        logits = [output.logits]
        for place in range(4, 8):
            output = model(input_ids=ids[:, place : place + 1], use_cache=True, **{key: output[key]})
            logits.append(output.logits)

    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
    for site in whole:
        # a block that a model uses several times chooses each time
        firsts = [call.experts_TK.unflatten(0, (2, -1))[:, 0] for call in whole.calls(site)]
        for place, call in enumerate(steps.calls(site)):
            experts_BLK = call.experts_TK.unflatten(0, (2, -1))
            assert torch.equal(experts_BLK, firsts[place % len(firsts)][:, None].expand_as(experts_BLK)), site


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beams", "samples"],
)
def test_generation_keeps_the_choice_of_its_prompt(family, options):
    """In every step, for every beam: each row of a batch is continued as it is alone."""
    model = patched(family, granularity="prompt").eval()
    rows = prompt(2, 6)
    options = PLAIN | {"max_new_tokens": 5, "top_k": 1} | options
    if "do_sample" not in options:
        options.pop("top_k")
    with moelora.record(model) as recording:
        together = model.generate(rows, **options)

    repeats = together.shape[0] // 2
    for site in recording:
        calls = [call.experts_TK for call in recording.calls(site)]
        batch = calls[-1].shape[0]
        first_BK = calls[0].unflatten(0, (batch, -1))[:, 0]
        assert all(torch.equal(later.unflatten(0, (batch, -1))[:, 0], first_BK) for later in calls[1:])
        assert torch.equal(first_BK, first_BK[:: batch // 2].repeat_interleave(batch // 2, 0)), "beams share a choice"
    for number in range(2):
        alone = model.generate(rows[number : number + 1], **options)
        assert torch.equal(together[repeats * number : repeats * (number + 1)], alone)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_static_cache_begins_anew_with_every_prompt(static):
    """It is one object, emptied in between; two prompts in a row are continued as in a fresh model."""
    options = PLAIN | {"max_new_tokens": 4} | ({"cache_implementation": "static"} if static else {})
    model, fresh = patched(granularity="prompt").eval(), patched(granularity="prompt").eval()
    first, second = prompt(2, 6), prompt(2, 6).flip(1)
    model.generate(first, **options)

    assert torch.equal(model.generate(second, **options), fresh.generate(second, **PLAIN, max_new_tokens=4))


@torch.no_grad()
def test_a_conversation_goes_on_with_its_choice():
    """A second turn with the same cache, and with a copy of it, keeps the first turn's experts."""
    model = patched(granularity="prompt").eval()
    ids = prompt(1, 9)
    output = model(input_ids=ids[:, :4], use_cache=True)
    key = cache_name(model)
    kept = copy.deepcopy(output[key])
    turns = []
    for cache in (output[key], kept):
        with moelora.record(model) as recording:
            turns.append(model(input_ids=ids[:, 4:], use_cache=True, **{key: cache}).logits)
        whole = model(input_ids=ids, labels=answered(ids, 4), use_cache=False).logits[:, 4:]
        torch.testing.assert_close(turns[-1], whole, rtol=1e-4, atol=1e-4)
        assert all(active_tokens(routing).all() for routing in recording.values())
    assert torch.equal(*turns)


@torch.no_grad()
def test_a_cache_of_unknown_beginning_is_refused():
    """Filled while the mixture was off, or by another model: nothing is chosen silently."""
    model, base = patched(granularity="prompt").eval(), tiny.model("llama")
    ids, key = prompt(1, 6), cache_name(model)
    strange = base(input_ids=ids[:, :4], use_cache=True)[key]
    with pytest.raises(ValueError, match="this call goes on from a DynamicCache that this model has not filled"):
        model(input_ids=ids[:, 4:], **{key: strange})

    with moelora.disabled(model):
        idle = model(input_ids=ids[:, :4], use_cache=True)[key]
    with pytest.raises(ValueError, match="did not take part in its first call"):
        model(input_ids=ids[:, 4:], **{key: idle})
    assert model._moelora.tape.depth == 0
    model(input_ids=ids)


def test_a_turn_repeats_rows_and_refuses_others():
    """Three rows may go on as six, each twice; not as four."""
    latch = Latch()
    Turn(latch, first=True).keep(7, (torch.tensor([[1], [2], [3]]),))

    recalled = Turn(latch, first=False).recall(7, rows=6)
    assert recalled is not None
    assert recalled[0][:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="began with 3 rows and goes on with 4"):
        Turn(latch, first=False).recall(7, rows=4)
    assert Turn(latch, first=True).recall(7, rows=3) is None


def test_prompts_need_a_decoder_and_its_own_call(monkeypatch):
    """Encoder-decoders, a part of a model, and a compiled one are refused with what to do."""
    t5 = patched("t5", granularity="prompt").eval()
    with pytest.raises(ValueError, match="which are for decoder models of tokens"):
        t5(**tiny.inputs(t5))
    model = patched(granularity="prompt").eval()
    with pytest.raises(ValueError, match=r"call model\(\.\.\.\), not a part of it"):
        model.model(input_ids=prompt())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="which a compiled model cannot"):
        model(input_ids=prompt())


def test_other_routers_pay_nothing():
    """No conversation is opened for them, and nothing is put on their caches."""
    model = patched().eval()
    with warnings.catch_warnings(), torch.no_grad():
        output = model(input_ids=prompt(), use_cache=True)

    assert not any(name.startswith("_moelora") for name in vars(output[cache_name(model)]))
    assert model._moelora.tape.turn is None
