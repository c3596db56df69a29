"""mpisign.ElasticSampler on real ranks, of which one leaves, with votes and with checkpoints."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.data import DataLoader

import mpisign
from mpisign import ElasticSampler

from .regroup import LEAVERS, job_of, part

if TYPE_CHECKING:
    from mpi4py import MPI

SAMPLES, BATCH = 41, 3


def training() -> tuple[ElasticSampler, DataLoader, torch.nn.Linear, mpisign.DistributedSignOptimizer]:
    sampler = ElasticSampler(range(SAMPLES), seed=5)
    loader = DataLoader(range(SAMPLES), batch_size=BATCH, sampler=sampler)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    return sampler, loader, model, mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))


def step(optimizer: mpisign.DistributedSignOptimizer, model: torch.nn.Linear, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(torch.ones(len(batch), 3) * batch[:, None]).sum().backward()
    optimizer.step()


def counts(had: list[int]) -> Counter[int]:
    return Counter(index for its in mpisign.allgather_object(had) for index in its)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("leaver", LEAVERS.values(), ids=LEAVERS)
@pytest.mark.parametrize("within", [False, True], ids=["between two steps", "within a step"])
def test_what_is_left_is_dealt_to_those_who_stay(comm: MPI.Comm, leaver: int, within: bool) -> None:
    sampler, loader, model, optimizer = training()
    had: list[int] = []
    steps = 0
    while not sampler.finished:
        for number, batch in enumerate(loader):
            if within and steps == 2 and not part([leaver]):
                return  # and its third batch has not counted
            step(optimizer, model, batch)
            had += batch.tolist()
            sampler.record_batch(number, BATCH)
            steps += 1
            if not within and steps == 2 and not part([leaver]):
                return
    total = counts(had)
    assert mpisign.size() == comm.size - 1
    assert len(set(range(SAMPLES)) - set(total)) == 2 * BATCH, "what the leaver had in two steps has counted"
    assert total.total() - len(total) < mpisign.size(), "none was repeated, but to fill up"


def test_a_checkpoint_has_the_position(comm: MPI.Comm, folder: Path) -> None:
    sampler, loader, model, optimizer = training()
    had = []
    for number, batch in zip(range(2), loader, strict=False):
        step(optimizer, model, batch)
        had += batch.tolist()
        sampler.record_batch(number, BATCH)
    extra = {"sampler": sampler.state_dict()}
    mpisign.checkpoint.save(folder / "saved", model=model, optimizer=optimizer, step=2, extra=extra)
    first = counts(had)
    rest = [batch.tolist() for batch in loader]
    for ranks in sorted({comm.size, max(1, comm.size - 1)}):
        with job_of(comm, ranks) as here:
            if not here:
                continue
            sampler, loader, model, optimizer = training()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*fresh random numbers")  # on another number of ranks
                resumed = mpisign.checkpoint.load(folder / "saved", model=model, optimizer=optimizer)
            sampler.load_state_dict(resumed.extra["sampler"])
            again = [batch.tolist() for batch in loader]
            assert ranks != comm.size or again == rest
            total = counts([index for its in again for index in its]) + first
            assert set(total) == set(range(SAMPLES))
            assert total.total() - SAMPLES < comm.size
    mpisign.init()
