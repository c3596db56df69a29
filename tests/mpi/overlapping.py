"""One small training with messages that leave while backward runs, beside the same without: nothing may differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign
from mpisign.session import current

if TYPE_CHECKING:
    from mpi4py import MPI

STEPS = 6
WINDOWS = 4  # steps after which "auto" begins: one without hooks, and three that it looks at
A_PARAMETER_A_MESSAGE = 1e-6
NAN = float("nan")
BOTH = pytest.mark.parametrize("overlap", [True, "auto"])
METHODS = pytest.mark.parametrize("name", ["signum", "ef_signsgd", "double_squeeze"])


def last(comm: MPI.Comm) -> bool:
    """Whether this is the rank on which a program does something that others do not."""
    return bool(comm.rank == comm.size - 1)


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The same on every rank and in each call."""
    layers = torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)
    model = torch.nn.Sequential(*layers)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return model.to(dtype)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


class Training:
    """A model, its optimizer and what became of them, step by step.

    Attributes:
        early: by step, the messages that this rank had sent before it.
        heard: the library's warnings.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        overlap: bool | str,
        model: Callable[[], torch.nn.Module] = network,
        inner: Callable[[Any], torch.optim.Optimizer] = sgd,
        **options: Any,
    ) -> None:
        self.rank, self.size, self.overlap, self.options = comm.rank, comm.size, overlap, options
        self.model, self.inner = model(), inner
        self.inputs = next(self.model.parameters()).shape[-1]
        self.early: list[set[int]] = []
        self.heard: list[str] = []
        self.trace: list[Any] = []
        self.at = 0  # the step for which data are drawn
        self.wrap(self.model)

    def wrap(self, model: torch.nn.Module) -> None:
        """Another optimizer, of the same options."""
        options = {"bucket_cap_mb": A_PARAMETER_A_MESSAGE, "overlap": self.overlap, **self.options}
        self.optimizer = mpisign.DistributedSignOptimizer(
            self.inner([p for p in model.parameters() if p.requires_grad]),
            [(name, p) for name, p in model.named_parameters() if p.requires_grad],
            **options,
        )
        self.optimizer.set_epoch(0)
        self._mark = current().tracer.mark()

    def loss(self, draw: int = 0) -> torch.Tensor:
        """Of a batch of this rank's own; another for each ``draw``."""
        random = torch.Generator().manual_seed(1000 * self.at + 10 * draw + self.rank)
        dtype = next(self.model.parameters()).dtype
        batch = torch.randn(5, self.inputs, generator=random).to(dtype)
        loss: torch.Tensor = self.model(batch).square().sum()
        return loss

    def backward(self, draw: int = 0) -> None:
        self.loss(draw).backward()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The library's warnings inside are kept in ``heard``."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                self.heard += [str(one.message) for one in caught]

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """What is done inside is a step, and is written down."""
        self.early.append(self.sent())
        with self.listening():
            yield
        report = self.optimizer.report
        assert report is not None
        told = report.step, report.voters, dict(report.abstentions), dict(report.ended_at), report.skipped, report.ties
        self.trace.append((*told, [p.detach().clone() for p in self.model.parameters()]))
        self._mark = current().tracer.mark()
        self.at += 1

    def sent(self) -> set[int]:
        """The messages that have left for the step that comes."""
        spans, number = current().tracer.spans(self._mark), self.optimizer._exchanges
        return {span.message for span in spans if span.name == "send" and span.step == number}

    def step(self) -> None:
        with self.stepping():
            self.optimizer.step()

    def usual(self, steps: int = 1) -> None:
        """Steps as nearly all programs make them."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.backward()
            self.step()

    def kept(self) -> Any:
        """What a checkpoint holds, without pieces in which nothing was ever kept."""
        state = self.optimizer.state_dict()
        ours = state.pop("mpisign")
        pieces = {
            place: {lo: piece for lo, piece in parts.items() if piece.any()} for place, parts in ours["pieces"].items()
        }
        return [
            state,
            ours["memory"],
            {place: its for place, its in pieces.items() if its},
            ours["rates"],
            ours["rows"],
        ]

    def messages(self) -> set[int]:
        """All that a step has."""
        plan = self.optimizer._plan
        assert plan is not None
        return set(range(len(plan.layout.buckets)))


def same(ours: Any, theirs: Any) -> bool:
    """Whether all in two nested containers is equal, NaN to NaN."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


Program = Callable[[Training], None]


def beside(comm: MPI.Comm, program: Program, overlap: bool | str = True, **options: Any) -> Training:
    """Run a program with overlap and without; parameters, reports and states must be the same. **Collective.**"""
    theirs = Training(comm, False, **options)
    program(theirs)
    ours = Training(comm, overlap, **options)
    program(ours)
    assert not any(theirs.early), "nothing leaves before a step without overlap"
    for at, (mine, expected) in enumerate(zip(ours.trace, theirs.trace, strict=True)):
        assert mine[:-1] == expected[:-1], f"what the report of step {at} says"
        assert same(mine[-1], expected[-1]), f"parameters after step {at}"
    assert same(ours.kept(), theirs.kept())
    if not ours.optimizer.method.exchanges_models:  # which leaves replicas that differ
        assert_alike(comm, ours.model)
    return ours


def assert_alike(comm: MPI.Comm, model: torch.nn.Module) -> None:
    """All ranks have the same parameters."""
    theirs: Sequence[Any] = comm.allgather([p.detach().double().numpy() for p in model.parameters()])
    for parameters in theirs:
        assert all((one == other).all() for one, other in zip(parameters, theirs[0], strict=True))


def first(overlap: bool | str) -> int:
    """The first step of which messages leave early."""
    return 1 if overlap is True else WINDOWS


def assert_early(training: Training, since: int | None = None, until: int | None = None) -> None:
    """All messages have left before their step, from the first in which they may on; none on a rank alone."""
    since = first(training.overlap) if since is None else since
    everything = training.messages() if training.size > 1 else set()
    assert len(training.messages()) > 1
    assert not any(training.early[:since])
    assert training.early[since:until] == [everything] * len(training.early[since:until])


def usual(training: Training) -> None:
    training.usual(STEPS)
