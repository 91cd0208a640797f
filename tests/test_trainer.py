"""transformers.Trainer, as it comes: it trains, accumulates, checkpoints, evaluates and resumes a patched model."""

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import moelora
from moelora import AuxLosses, Learned, MoELoRAConfig
from moelora.testing import tiny

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

# transformers 5.17 knows the old name only, later versions warn of it
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
PARTS = {"routers": (True, False), "experts": (False, True), "both": (True, True)}


def patched(family="llama", *, routers=True, experts=True, losses=None, router=None):
    """A tiny model with four random experts."""
    config = MoELoRAConfig(router=router or Learned(top_k=2, init_std=0.5), losses=losses or AuxLosses())
    model = moelora.patch_model(tiny.model(family), num_experts=4, rank=2, config=config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    moelora.set_trainable(model, routers=routers, experts=experts)
    return model


class Rows(list[dict], Dataset[dict]):
    """A dataset in memory."""


def rows(count=16, length=8, *, ragged=False):
    """Token rows that are easy to learn, with a column that no model knows."""
    generator = torch.Generator().manual_seed(0)
    made = Rows()
    for number in range(count):
        ids = torch.randint(3, 20, (length,), generator=generator)
        labels = ids.clone()
        if ragged:
            labels[: number % 4] = -100
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "note": number})
    return made


def trainer(model, folder, dataset=None, **options):
    """Plain Trainer."""
    defaults = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        **(defaults | options),
    )
    dataset = rows() if dataset is None else dataset
    return Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=Rows(dataset[:6]))


def _checkpointed(*, reentrant):
    return {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if value.numel()}


class KeepGradients(TrainerCallback):
    """The gradients that the optimiser's first step sees."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.gradients:
            named = kwargs["model"].named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def _first_gradients(model, folder, dataset, **options):
    keep = KeepGradients()
    run = trainer(model, folder, dataset, max_steps=1, max_grad_norm=0, **options)
    run.add_callback(keep)
    run.train()
    return keep.gradients


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("part", PARTS)
def test_trainer_trains(part, checkpointing, tmp_path):
    """Routers alone, experts alone, both: the loss goes down, the rest stands still, no warning of lost gradients."""
    routers, experts = PARTS[part]
    model = patched(routers=routers, experts=experts)
    before = _weights(model)
    options = {"max_steps": 24, "per_device_train_batch_size": 16, "lr_scheduler_type": "constant"}
    if checkpointing is not None:
        options |= _checkpointed(reentrant=checkpointing)
    run = trainer(model, tmp_path, **options)

    run.train()

    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    for name, value in _weights(model).items():
        trained = (routers and ".router." in name) or (experts and ".bank." in name)
        assert torch.equal(value, before[name]) != trained, name


@pytest.mark.parametrize("family", ["gpt2", "t5", "jamba"])
def test_trainer_trains_other_families(family, tmp_path):
    """Conv1D, an encoder-decoder, a hybrid; all trainable tensors move."""
    model = patched(family)
    before = _weights(model)
    run = trainer(model, tmp_path, max_steps=3)

    run.train()

    after = _weights(model)
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(after[name], before[name])]
    assert still == []


def test_checkpointing_trains_to_the_same_weights(tmp_path):
    """Plain, reentrant and non-reentrant runs end at equal weights, to rounding."""
    ends = []
    for name, options in {
        "plain": {},
        "reentrant": _checkpointed(reentrant=True),
        "other": _checkpointed(reentrant=False),
    }.items():
        model = patched(losses=AuxLosses(load_balance=0.5, z_loss=0.1))
        trainer(model, tmp_path / name, max_steps=4, optim="sgd", learning_rate=0.1, **options).train()
        ends.append(_weights(model))

    for end in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(end[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_accumulated_batches_are_one_batch(ragged, tmp_path):
    """Four micro-batches give the gradient of one batch: of the language loss exactly, and the balance counts once.

    z-loss is a mean over tokens. In even batches it accumulates exactly too; with labels of different number it is
    weighed by labels, so there only the language loss is compared.
    """
    losses = AuxLosses(load_balance=0.0, z_loss=0.0 if ragged else 1.0)
    dataset = rows(8, ragged=ragged)
    whole = _first_gradients(patched(losses=losses), tmp_path / "whole", dataset, per_device_train_batch_size=8)
    parts = _first_gradients(
        patched(losses=losses),
        tmp_path / "parts",
        dataset,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )

    assert whole.keys() == parts.keys()
    assert any(".router." in name for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_balance_loss_counts_once_under_accumulation(tmp_path):
    """The balance loss of a step is the mean of its micro-batches' losses, whatever their number."""
    dataset, batches = rows(8), []
    silent, loud = AuxLosses(load_balance=0.0), AuxLosses(load_balance=2.0)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    language = _first_gradients(patched(losses=silent, experts=False), tmp_path / "silent", dataset, **options)
    model = patched(losses=loud, experts=False)
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    both = _first_gradients(model, tmp_path / "loud", dataset, **options)

    assert len(batches) == 4
    alone = patched(losses=loud, experts=False).train()
    for batch in batches:
        alone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        (moelora.aux_loss(alone) / 4).backward()
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(both[name] - language[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_evaluation_gathers_logits_and_nothing_else(tmp_path):
    """evaluate() and predict(): the loss is the language model's own, predictions are one array of logits."""
    model = patched(losses=AuxLosses(load_balance=5.0))
    run = trainer(model, tmp_path, max_steps=1, per_device_eval_batch_size=3)
    run.train()

    metrics = run.evaluate()
    predicted = run.predict(rows(6))

    assert isinstance(predicted.predictions, np.ndarray)
    assert predicted.predictions.shape == (6, 8, 99)
    assert not any("aux" in name or "routing" in name for name in metrics)
    assert not model._moelora.tape.records
    inputs = {key: torch.stack([row[key] for row in rows()[:6]]) for key in ("input_ids", "labels", "attention_mask")}
    with torch.no_grad():
        language = model.eval()(**inputs).loss
    assert metrics["eval_loss"] == pytest.approx(language.item(), rel=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(part, tmp_path, caplog):
    """Save in the middle, resume in a model patched anew: equal weights bit for bit, and no complaint of lost keys."""
    routers, experts = PARTS[part]
    whole = trainer(patched(routers=routers, experts=experts), tmp_path / "a", save_strategy="steps", save_steps=4)
    whole.train()
    assert (tmp_path / "a/checkpoint-4/moelora_config.json").is_file()

    again = trainer(patched(routers=routers, experts=experts), tmp_path / "b", save_steps=4)
    with caplog.at_level(logging.WARNING), _transformers_logs():
        again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))

    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text
    assert again.state.global_step == 8
    expected = _weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(again.model).items())


def test_a_checkpoint_of_something_else_is_noticed(tmp_path, caplog):
    """A checkpoint that lacks trained tensors is complained of, as ever."""
    trainer(patched(experts=False), tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=2).train()
    model = patched()
    model.lm_head.requires_grad_()
    run = trainer(model, tmp_path / "b", max_steps=3)

    with caplog.at_level(logging.WARNING), _transformers_logs():
        run._load_from_checkpoint(str(tmp_path / "a/checkpoint-2"))

    assert "missing keys" in caplog.text
    assert "lm_head.weight" in caplog.text


def test_loss_free_balancing_resumes(tmp_path):
    """The balancing bias is saved as the last call has moved it, and moved on from there."""
    router = Learned(top_k=1, combine="unit", balance_bias_speed=0.01)
    options = {"losses": AuxLosses(load_balance=0.0), "router": router}
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(patched(**options), tmp_path / "a", **saving)
    whole.train()
    again = trainer(patched(**options), tmp_path / "b", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))

    expected = _weights(whole.model)
    biases = [name for name in expected if name.endswith("balance_bias_E")]
    assert biases
    assert any(expected[name].any() for name in biases)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(again.model).items())


def test_the_best_checkpoint_comes_back_and_old_ones_go(tmp_path):
    """load_best_model_at_end with save_total_limit: the model is that of the best evaluation, and loads elsewhere."""
    model = patched()
    run = trainer(
        model,
        tmp_path,
        max_steps=6,
        greater_is_better=True,  # so that the best is not the last
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    run.train()

    evaluated = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = max(evaluated, key=evaluated.__getitem__)
    assert best < 6
    assert str(run.state.best_model_checkpoint).endswith(f"checkpoint-{best}")
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)

    loaded = moelora.load(tiny.model("llama"), tmp_path / f"checkpoint-{best}")
    inputs = tiny.inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_the_final_save_is_a_mixture(tmp_path):
    """trainer.save_model writes what moelora.load reads, beside the tensors that Trainer itself resumes from."""
    model = patched()
    run = trainer(model, tmp_path, max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))

    loaded = moelora.load(tiny.model("llama"), tmp_path / "final")
    inputs = tiny.inputs(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert {"moelora_config.json", "routers.safetensors", "model.safetensors"} <= {
        path.name for path in (tmp_path / "final").iterdir()
    }


def test_a_trainable_tensor_without_gradient_is_named(tmp_path):
    """After the first step of Trainer, one warning with the name."""
    model = patched()
    model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(3)))

    with pytest.warns(UserWarning, match="1 trainable tensors got no gradient .* forgotten") as caught:
        trainer(model, tmp_path, max_steps=4).train()

    assert sum("got no gradient" in str(warning.message) for warning in caught) == 1


def test_tying_weights_again_gives_no_site_anothers_router():
    """zamba2 ties whole blocks by a pattern of names; routers and experts of its sites stay their own."""
    model = patched("zamba2")
    before = _weights(model)
    shared = model.get_input_embeddings().weight is model.lm_head.weight

    model.tie_weights()

    assert all(torch.equal(value, before[name]) for name, value in _weights(model).items())
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == shared
    routers = [layer.router.weight_ED.data_ptr() for layer in model._moelora.layers.values()]
    assert len(set(routers)) == len(routers)


class _transformers_logs:
    """Let caplog see transformers' messages, which do not propagate by default."""

    def __enter__(self):
        self.logger = logging.getLogger("transformers")
        self.before, self.logger.propagate = self.logger.propagate, True

    def __exit__(self, *exception):
        self.logger.propagate = self.before
