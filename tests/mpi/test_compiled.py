"""A training step that torch.compile has compiled: the library runs as it is, and gives the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign
from mpisign import attacks, checkpoint

if TYPE_CHECKING:
    from mpi4py import MPI

# Dynamo warns of much that it meets.
pytestmark = [pytest.mark.mpi, pytest.mark.few, pytest.mark.filterwarnings("default")]
Train = Callable[[], object]
compiled = functools.partial(torch.compile, backend="eager")  # which needs no compiler, and traces all the same


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> None:
    torch.compiler.reset()


class Loop:
    """A small model and its optimizer, the same each time but for the data, which are the rank's own."""

    def __init__(self, rank: int, method: mpisign.Method | None = None) -> None:
        random = torch.Generator().manual_seed(rank)
        self.inputs = torch.randn(6, 4, generator=random)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
        with torch.no_grad():
            for at, parameter in enumerate(self.model.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape) * (1 + at))
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.optimizer = mpisign.DistributedSignOptimizer(sgd, self.model.named_parameters(), method=method)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)  # it replaces step()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def loss(self) -> torch.Tensor:
        return self.model(self.inputs).pow(2).sum()

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self) -> torch.Tensor:
        loss = self.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def train_by_closure(self) -> None:
        self.optimizer.step(self.backward)

    def train_in_two(self) -> None:
        self.backward()
        self.optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with self.optimizer.skip_synchronize():
            self.optimizer.step()

    def train_scaled(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.loss()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def train_epoch(self) -> None:
        self.optimizer.set_epoch(self.scheduler.last_epoch)
        self.train()
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def train_unevenly(self) -> None:
        for _ in range(1 + mpisign.rank()):
            self.train()
        self.optimizer.join()

    def bits(self) -> bytes:
        memory = self.optimizer.state_dict()["mpisign"]["memory"]
        kept = [field for place in sorted(memory) for field in memory[place].values()]
        return b"".join(t.detach().numpy().tobytes() for t in (*self.model.parameters(), *kept))


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["train", "train_by_closure", "train_in_two", "train_scaled", "train_epoch", "train_unevenly"],
)
def test_a_compiled_training_step(comm: MPI.Comm, name: str) -> None:
    usual, its = Loop(comm.rank), Loop(comm.rank)
    hooked: list[str] = []
    its.optimizer.register_step_pre_hook(lambda *args: hooked.append("before"))
    its.optimizer.register_step_post_hook(lambda *args: hooked.append("after"))
    train = compiled(getattr(its, name))
    for _ in range(3):
        getattr(usual, name)()
        train()
    assert its.bits() == usual.bits()
    assert len(hooked) >= 6
    assert hooked == ["before", "after"] * (len(hooked) // 2)


@pytest.mark.parametrize("make", [mpisign.double_squeeze, mpisign.top_k, mpisign.mean, lambda: mpisign.monna(0)])
def test_a_compiled_step(comm: MPI.Comm, make: Callable[[], mpisign.Method]) -> None:
    usual, its = Loop(comm.rank, make()), Loop(comm.rank, make())
    step = compiled(its.optimizer.step)
    for _ in range(3):
        usual.train()
        its.backward()
        step()
        its.scheduler.step()
    assert its.bits() == usual.bits()


def test_a_step_is_one_graph_break_and_compiled_once(comm: MPI.Comm) -> None:
    its = Loop(comm.rank)
    traced: list[torch.fx.Graph] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        traced.append(graph.graph)
        return graph

    def step(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        its.optimizer.step()
        return y * 2

    function = torch.compile(step, backend=note)
    for at in range(5):
        its.backward()
        assert function(torch.full((2,), float(at))).tolist() == [2.0 * at + 2] * 2
    assert len(traced) == 2, "what is before, and what is after"


def test_functions_in_compiled_code(comm: MPI.Comm, folder: Path) -> None:
    its = Loop(comm.rank)
    its.train()
    rank, size = comm.rank, comm.size
    calls: dict[str, tuple[Callable[[], object], object]] = {
        "rank": (lambda: (mpisign.rank(), mpisign.size(), mpisign.local_rank(), mpisign.num_nodes()), None),
        "device": (lambda: mpisign.device().type, None),
        "stop_requested": (mpisign.stop_requested, False),
        "barrier": (mpisign.barrier, None),
        "allgather_object": (lambda: mpisign.allgather_object(rank), list(range(size))),
        "broadcast_object": (lambda: mpisign.broadcast_object({"a": rank}), {"a": 0}),
        "broadcast_parameters": (lambda: mpisign.broadcast_parameters(its.model.state_dict()), None),
        "broadcast_optimizer_state": (lambda: mpisign.broadcast_optimizer_state(its.optimizer), None),
        "check_consistency": (lambda: mpisign.check_consistency(its.model, its.optimizer), None),
        "agreement": (its.optimizer.report.agreement, None),
        "save": (lambda: str(checkpoint.save(folder, model=its.model, optimizer=its.optimizer, step=1)), None),
        "newest": (lambda: str(checkpoint.newest(folder)), None),
        "load": (lambda: checkpoint.load(folder, model=its.model, optimizer=its.optimizer).step, 1),
        "wait": (checkpoint.wait, None),
        "timeline": (lambda: mpisign.timeline(folder / "timeline.json"), None),
    }
    expected = {name: call() for name, (call, _) in calls.items()}
    for name, (call, known) in calls.items():
        torch.compiler.reset()

        def around(x: torch.Tensor, call: Train = call) -> tuple[torch.Tensor, object]:
            y = x + 1
            return y * 2, call()

        y, found = compiled(around)(torch.ones(2))
        assert y.tolist() == [4.0, 4.0]
        assert found == expected[name], name
        assert known is None or found == known, name
    if size > 1:
        its.backward()
        adversary = attacks.Adversary(attacks.SignFlip(True), [0], comm, i_know_this_is_an_attack=True)
        compiled(adversary.corrupt)(list(its.model.parameters()))
