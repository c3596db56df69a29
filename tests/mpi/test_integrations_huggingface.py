"""mpisign.integrations.huggingface on real ranks, with the real Trainer and Accelerate."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from resumable import assert_equal
from torch import nn

import mpisign
from mpisign.checkpoint.state import random_state

from .frameworks import data, framework

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few, pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def hub(job: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, after its init(); the launcher's variables come back."""
    framework("accelerate")
    framework("transformers")
    before = dict(os.environ)
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # as in a script for DDP
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    from accelerate.state import AcceleratorState, PartialState

    from mpisign.integrations import huggingface

    assert any(name.startswith("OMPI_COMM_WORLD") for name in before), "this must run under mpirun"
    AcceleratorState._reset_state(reset_partial_state=True)
    huggingface.init()
    assert not [name for name in os.environ if name.startswith((*huggingface.PREFIXES, "MASTER", "WORLD"))]
    yield huggingface
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert PartialState._shared_state == {}


class Net(nn.Module):
    """With dropout and noise from three generators, so that the random numbers of a rank count."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
        if norm:
            self.layers.insert(1, nn.BatchNorm1d(16))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1) if self.training else 0.0  # noqa: NPY002
        logits = self.layers(x + noise)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trained(
    hub: Any,
    folder: Path,
    steps: int,
    resume: bool = False,
    local: dict[str, Any] | None = None,
    norm: bool = False,
    asked: Sequence[int] = (),
    **options: Any,
) -> tuple[Any, Any]:
    """A trainer, and the optimizer, after so many steps of a training of 12, of which 6 are an epoch.

    Args:
        local: options of local steps by AdamW; None for votes.
        asked: after which steps another callback wants a checkpoint.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Told(TrainerCallback):  # type: ignore[misc]
        """What a callback that logs gets."""

        def __init__(self) -> None:
            self.told: list[dict[str, float]] = []

        def on_log(self, *_: Any, logs: dict[str, float], **more: Any) -> None:
            self.told.append(dict(logs))

    class Asks(TrainerCallback):  # type: ignore[misc]
        """For a save, after all other callbacks."""

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_save = control.should_save or state.global_step in asked

    class Ends(TrainerCallback):  # type: ignore[misc]
        """All that training would have gone on with."""

        def on_train_end(self, *_: Any, model: nn.Module, **more: Any) -> None:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state()}
            self.end = copy.deepcopy(states)

    net = Net(norm)
    kind: Any = torch.optim.SGD if local is None else torch.optim.AdamW
    optimizer = mpisign.DistributedSignOptimizer(
        kind(net.parameters(), lr=0.01), net.named_parameters(), **(local or {})
    )
    mpisign.broadcast_parameters(net.state_dict())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer.wrapped, 1.0, 0.1, 12)
    examples = [{"x": x, "labels": y} for x, y in data(48 * mpisign.size())]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **{"save_steps": 5, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 1, **options},
    )
    callbacks = [Ends(), hub.MpisignCallback(optimizer), Told(), Asks()]
    trainer = Trainer(
        net,
        arguments,
        train_dataset=hub.shard(examples),
        eval_dataset={"a": examples[:8], "b": examples[8:12]},
        optimizers=(optimizer, schedule),
        callbacks=callbacks,
        compute_metrics=lambda _: {"same": 1.0},
    )
    torch.manual_seed(100 + mpisign.rank())
    np.random.seed(200 + mpisign.rank())  # noqa: NPY002
    random.seed(300 + mpisign.rank())
    trainer.train(resume_from_checkpoint=resume)
    return trainer, optimizer


def heard(trainer: Any, what: str) -> Any:
    """What a callback of a trainer has kept."""
    (found,) = [getattr(its, what) for its in trainer.callback_handler.callbacks if hasattr(its, what)]
    return found


def test_resuming_is_exact_and_rank_0_alone_saves(comm: MPI.Comm, folder: Path, hub: Any) -> None:
    trainer, whole = trained(hub, folder / "whole", 12)
    mpisign.check_consistency(trainer.model, whole)
    assert trainer.is_world_process_zero() == (comm.rank == 0)
    assert type(trainer.model_wrapped) is Net, "nobody has wrapped it"
    half, _ = trained(hub, folder / "halves", 5)
    mpisign.barrier()
    names = {path.name for path in (folder / "halves" / "checkpoint-5").iterdir()}
    assert {f"mpisign-rank-{rank:05d}.pt" for rank in range(1, comm.size)} <= names
    assert {"optimizer.pt", "rng_state.pth"} <= names
    again, optimizer = trained(hub, folder / "halves", 12, resume=True)
    assert_equal(again.model.state_dict(), trainer.model.state_dict())
    assert_equal(optimizer.state_dict(), whole.state_dict())
    assert comm.size == 1 or len({its.layers[0].weight.sum().item() for its in [half.model, again.model]}) == 2
    assert [row["mpisign_voters"] for row in heard(trainer, "told") if "loss" in row] == [comm.size] * 12


LOCAL = {"every": 4, "method": mpisign.scaled_vote(0.5)}


@pytest.mark.parametrize("local", [None, LOCAL, {**LOCAL, "delay": 2}], ids=["votes", "windows", "undecided"])
@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "epoch"},
        {"save_steps": 5, "eval_strategy": "steps", "eval_steps": 5},
        {"save_steps": 8},  # where a window ends
        {"save_strategy": "no", "asked": [7]},
    ],
    ids=["after an epoch", "after an evaluation", "within an epoch", "asked for by another callback"],
)
def test_resuming_is_exact(
    comm: MPI.Comm, folder: Path, hub: Any, options: dict[str, Any], local: dict[str, Any] | None
) -> None:
    options = {"local": local, "norm": True, **options}

    whole, _ = trained(hub, folder / "whole", 11, **options)
    trained(hub, folder / "halves", options.get("save_steps", 7 if "asked" in options else 6), **options)
    mpisign.barrier()
    again, optimizer = trained(hub, folder / "halves", 11, resume=True, **options)
    end = heard(again, "end")
    assert_equal(end, heard(whole, "end"))
    weights = comm.allgather(end["model"]["layers.0.weight"].sum().item())
    assert comm.size == 1 or (len(set(weights)) > 1) == (local is not None), "11 steps are within a window"
    mpisign.check_consistency(again.model, optimizer, buffers=False)
    assert (local is None) == torch.equal(again.model.layers[0].weight, end["model"]["layers.0.weight"])


@pytest.mark.parametrize("local", [None, LOCAL], ids=["votes", "windows"])
def test_the_best_model_is_loaded_on_all_ranks(
    comm: MPI.Comm, folder: Path, hub: Any, local: dict[str, Any] | None
) -> None:
    """Rank 0 alone saves, and so knows where it is. Of equal ones the first is best."""
    from safetensors.torch import load_file

    options = {"load_best_model_at_end": True, "metric_for_best_model": "a_same", "eval_strategy": "steps"}
    trainer, _ = trained(hub, folder, 11, local=local, norm=True, **options, eval_steps=5)
    mpisign.barrier()
    assert_equal(dict(trainer.model.state_dict()), load_file(folder / "checkpoint-5" / "model.safetensors"))


def test_bf16_evaluation_and_schedules(comm: MPI.Comm, folder: Path, hub: Any) -> None:
    trainer, optimizer = trained(hub, folder, 12, bf16=True, max_grad_norm=0.5)
    mpisign.check_consistency(trainer.model, optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    metrics = trainer.evaluate([{"x": x, "labels": y} for x, y in data()])
    assert len(set(comm.allgather(metrics["eval_loss"]))) == 1


def test_accelerate(comm: MPI.Comm, hub: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.is_main_process == (comm.rank == 0)
    net = nn.Sequential(nn.Linear(6, 2))
    mpisign.broadcast_parameters(net.state_dict())
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(net.parameters(), lr=0.01))
    loader = torch.utils.data.DataLoader(hub.shard(data()), batch_size=4)
    model, prepared, loader = accelerator.prepare(net, optimizer, loader)
    assert model is net
    before = copy.deepcopy(net.state_dict())
    for x, y in loader:
        prepared.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
    mpisign.check_consistency(net, optimizer)
    assert not torch.equal(net.state_dict()["0.weight"], before["0.weight"])


def test_what_is_refused(comm: MPI.Comm, folder: Path, hub: Any) -> None:
    from transformers import Trainer, TrainingArguments

    with pytest.raises(mpisign.OptionError, match="SGD is none"):
        hub.MpisignCallback(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(Net().parameters(), lr=0.1))
    best = {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}
    with pytest.raises(mpisign.OptionError, match=f"rank {comm.rank}: with save_strategy='best' each rank saves"):
        trained(hub, folder, 1, **best)
    arguments = TrainingArguments(str(folder), use_cpu=True, max_steps=1, report_to=[])
    examples = [{"x": x, "labels": y} for x, y in data()]
    trainer = Trainer(Net(), arguments, train_dataset=examples, callbacks=[hub.MpisignCallback(optimizer)])
    with pytest.raises(mpisign.OptionError, match="another model"):
        trainer.train()


def test_parts_of_the_data(comm: MPI.Comm, hub: Any) -> None:
    with pytest.raises(mpisign.OptionError, match="generator has none: of a streaming dataset take datasets"):
        hub.shard(it for it in range(4))
    parts = comm.allgather([int(x) for x in hub.shard(range(4 * comm.size + comm.size - 1))])
    assert parts == [[rank + comm.size * at for at in range(4)] for rank in range(comm.size)]
