"""Padding, unused positions, unused experts: rows that never have a gradient do not walk, by any method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from methods_table import Make, walk_exchanges
from torch import nn

import mpisign
from mpisign.memory import ClippedNoise
from mpisign.rules import BallotRule, PieceRule

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few]

RATE = 1e-3
STEPS = 100
WIDTH = 64


class Experts(nn.Module):
    """Words and places are looked up, and one of three experts goes on with them. The last is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, WIDTH, padding_idx=0)
        self.places = nn.Embedding(8, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))

    def forward(self, ids: torch.Tensor, expert: int) -> torch.Tensor:
        hidden = self.words(ids) + self.places.weight[: ids.shape[1]]
        out: torch.Tensor = self.experts[expert](hidden.mean(1))
        return out

    def unused(self) -> list[torch.Tensor]:
        words, places = self.words.weight.detach(), self.places.weight.detach()
        return [words[0], words[6:], places[5:], *(p.detach() for p in self.experts[2].parameters())]


def moved(comm: MPI.Comm, method: mpisign.Method, exchange: str, steps: int = STEPS) -> tuple[float, float]:
    """How far the rows without gradient have got at most, and a word that is used."""
    torch.manual_seed(0)
    model = Experts()
    start = Experts()
    start.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = mpisign.DistributedSignOptimizer(sgd, model.named_parameters(), method=method, exchange=exchange)
    optimizer.set_epoch(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there from the beginning, also of what is not asked
    random = torch.Generator().manual_seed(comm.rank)
    for at in range(steps):
        optimizer.zero_grad(set_to_none=False)
        for expert in model.experts.parameters():
            expert.grad = torch.zeros_like(expert) if expert.grad is None else expert.grad
        ids = torch.randint(1, 6, (4, 5), generator=random)
        ids[:, 4] = 0
        model(ids, at % 2).pow(2).sum().backward()
        optimizer.step()
    pairs = zip(model.unused(), start.unused(), strict=True)
    used = (model.words.weight - start.words.weight)[1:6].abs().max()
    return max(float((now - then).abs().max()) for now, then in pairs), float(used.detach())


@walk_exchanges(lambda method: isinstance(method.rule, BallotRule) and not isinstance(method.memory, ClippedNoise))
def test_votes(comm: MPI.Comm, make: Make, exchange: str) -> None:
    """They move by one step at most, the first, in which nobody knows yet that there are such rows."""
    unused, used = moved(comm, make(comm.size), exchange)
    assert unused <= 1.001 * RATE
    assert used > unused


@walk_exchanges(lambda m: m.memory.feedback or m.codec.random or m.name == "mean" or isinstance(m.rule, PieceRule))
def test_means(comm: MPI.Comm, make: Make, exchange: str) -> None:
    """They stay where they are, exactly, also where signs and a scale are sent."""
    unused, used = moved(comm, make(comm.size), exchange, 20)
    assert unused == 0.0
    assert used > 0.0


def test_private_noise_walks(comm: MPI.Comm) -> None:
    """What abstained would tell which rows a rank has data of: the documentation says so."""
    for method in (mpisign.dp_sign(1.0, 0.1), mpisign.ternary_vote(1.0, 1.0, private=True)):
        unused, _ = moved(comm, method, "auto", 20)
        assert unused > 2 * RATE
