"""Two processes over gloo: DDP and FSDP2 train a patched model as one process does with the joint batch."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from random_mixture import random_mixture
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import moelora
from moelora import AuxLosses
from moelora.testing import tiny

WORLD = 2


def _batch():
    ids = torch.randint(3, 99, (4, 8), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def _named_gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Rows(list[dict], Dataset[dict]):
    """A dataset in memory."""


class KeepGradients(TrainerCallback):
    """The gradients that the optimiser's first step sees."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = {name.removeprefix("module."): g for name, g in _named_gradients(kwargs["model"]).items()}


def trainer_gradients(folder, **options):
    """Of the first step of Trainer on the batch, with a loss on routings that is a mean over tokens."""
    ids = _batch()["input_ids"]
    keep = KeepGradients()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=1,
        max_grad_norm=0,
        save_steps=1,
        ddp_find_unused_parameters=False,
        **options,
    )
    Trainer(
        model=random_mixture(experts=True, losses=AuxLosses(load_balance=0.0, z_loss=1.0)),
        args=arguments,
        train_dataset=Rows({"input_ids": row, "labels": row} for row in ids),
        callbacks=[keep],
    ).train()
    return keep.gradients


def sharded_step(rank):
    """The gradients of a model under fully_shard, and what saving it says."""
    model = random_mixture(**CASES["z_loss"])
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**{key: value.chunk(WORLD)[rank] for key, value in _batch().items()}).loss.backward()
    gradients = {name: gradient.full_tensor() for name, gradient in _named_gradients(model).items()}
    try:
        moelora.save(model, "nowhere")
    except ValueError as error:
        return {"gradients": gradients, "saving": str(error)}
    return {"gradients": gradients, "saving": "saved"}


def work(rank, port, folder, cases):
    """One process: each case on its half of the batch; its gradients and what DDP sent around go to a file."""
    torch.set_num_threads(1)
    # as torchrun does, for Trainer
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    answers = {}
    for name, case in cases.items():
        model = random_mixture(**case)
        if rank:
            # DDP sends rank 0's trainable values around, and leaves alone what never changes
            for key, value in model.state_dict().items():
                if ".router." in key:
                    value.add_(1.0)
        parallel = DistributedDataParallel(model)
        rows = {key: value.chunk(WORLD)[rank] for key, value in _batch().items()}
        parallel(**rows).loss.backward()
        model.zero_grad()
        # this fails where the first step left a trainable tensor without gradient
        output = parallel(**rows)
        output.loss.backward()
        with moelora.disabled(parallel), torch.no_grad():
            closed = parallel(**rows).loss
        answers[name] = {
            "gradients": _named_gradients(model),
            "aux": output.get("aux_loss"),
            "closed": closed,
            "sent": [key for key, _ in model.named_buffers() if key not in parallel.parameters_to_ignore],
        }
    answers["sharded"] = sharded_step(rank)
    for accumulation in (1, 2):
        options = {"per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
        answers[f"trainer{accumulation}"] = trainer_gradients(Path(folder) / f"trainer{accumulation}", **options)
    dist.barrier()
    checkpoint = Path(folder) / "trainer1/checkpoint-1"
    answers["checkpoint"] = sorted(path.name for path in checkpoint.iterdir())
    torch.save(answers, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


CASES = {
    "routers": {"experts": False, "losses": AuxLosses(load_balance=0.0)},
    "both": {"experts": True, "losses": AuxLosses(load_balance=0.0)},
    "some": {"experts": ["expert1", "expert3"], "losses": AuxLosses(load_balance=0.0)},
    "z_loss": {"experts": True, "losses": AuxLosses(load_balance=0.0, z_loss=1.0)},
    "balance": {"experts": False, "losses": AuxLosses(load_balance=1.0)},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each process says of each case."""
    folder = tmp_path_factory.mktemp("distributed")
    spawn(work, (_free_port(), str(folder), CASES), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", ["routers", "both", "some", "z_loss"])
def test_gradients_are_those_of_the_joint_batch(answers, case):
    """Without find_unused_parameters; every trainable tensor has a gradient, the same on both sides."""
    model = random_mixture(**CASES[case])
    model(**_batch()).loss.backward()
    expected = _named_gradients(model)

    ours, theirs = (answer[case]["gradients"] for answer in answers)
    assert ours.keys() == theirs.keys() == expected.keys()
    assert set(ours) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, gradient in expected.items():
        assert torch.equal(ours[name], theirs[name])
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_balance_loss_is_the_mean_over_processes(answers):
    """Each process balances its own tokens; DDP averages: the gradient is that of the mean, counted once."""
    case = CASES["balance"]
    model = random_mixture(**case)
    for rows in zip(*(value.chunk(WORLD) for value in _batch().values()), strict=True):
        (model(**dict(zip(_batch(), rows, strict=True))).loss / WORLD).backward()

    for name, gradient in _named_gradients(model).items():
        torch.testing.assert_close(answers[0]["balance"]["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    assert answers[0]["balance"]["aux"] != answers[1]["balance"]["aux"]


def test_a_sharded_model_has_the_same_gradients(answers):
    """fully_shard of every block and the whole: gathered, the gradients of the joint batch; shards are not saved."""
    for answer in answers:
        assert answer["sharded"]["gradients"].keys() == answer["z_loss"]["gradients"].keys()
        for name, gradient in answer["z_loss"]["gradients"].items():
            torch.testing.assert_close(answer["sharded"]["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
        assert "gather the full parameters first" in answer["sharded"]["saving"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_over_processes_is_trainer_over_one(answers, accumulation, tmp_path):
    """Trainer's first gradients, with its count of tokens over all processes and calls: the losses count once."""
    expected = trainer_gradients(tmp_path, per_device_train_batch_size=4)

    for answer in answers:
        got = answer[f"trainer{accumulation}"]
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_is_written_once(answers):
    """By the first process, whole."""
    assert answers[0]["checkpoint"] == answers[1]["checkpoint"]
    assert "moelora_config.json" in answers[0]["checkpoint"]


def test_frozen_banks_are_not_sent_around(answers):
    """DDP broadcasts buffers before every forward; a bank's never change, so none of them is among these."""
    for answer in answers:
        assert answer["routers"]["sent"], "the model has buffers that are sent"
        assert not any(".bank." in name for name in answer["routers"]["sent"])


def test_settings_reach_through_the_wrapper(answers):
    """moelora.disabled on the DDP model: the base's loss on each half."""
    base = tiny.model("llama").train()
    for rank, answer in enumerate(answers):
        rows = {key: value.chunk(WORLD)[rank] for key, value in _batch().items()}
        torch.testing.assert_close(answer["both"]["closed"], base(**rows).loss.detach())
