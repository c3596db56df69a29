"""What the library does between ranks, to be played by a hostile rank, and what must come of it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import parts
import pytest
import torch
from resumable import Job

import mpisign
from mpisign import MpisignError, checkpoint, doctor

from . import hostile

if TYPE_CHECKING:
    from mpi4py import MPI

SHAPES = ((40,), (3, 5))
Operation = Callable[[], object]
Prepare = Callable[[Path], Operation]


def bombs(folder: Path) -> bytes:
    return hostile.bomb(folder / "executed")


# ------------------------------------------------------------------------------------------- whole operations


def a_step(method: mpisign.Method, **options: Any) -> Prepare:
    def prepare(folder: Path) -> Operation:
        tensors = parts.parameters(*SHAPES)
        parts.give(tensors, parts.draw_normal(tensors, mpisign.rank()))
        optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=0.1), method=method, **options)
        optimizer.set_epoch(0)

        def operation() -> None:
            optimizer.step()
            parts.give(tensors, parts.draw_normal(tensors, mpisign.rank()))
            optimizer.step()

        return operation

    return prepare


def a_step_of_different_models(folder: Path) -> Operation:
    tensors = parts.parameters((3,), (4 + (mpisign.rank() == mpisign.size() - 1),))
    parts.give(tensors, parts.draw_normal(tensors))
    return mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=0.1)).step


def ranks_that_join(folder: Path) -> Operation:
    tensors = parts.parameters(*SHAPES)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=0.1, momentum=0.5))

    def operation() -> None:
        if mpisign.rank() == 0:
            parts.give(tensors, parts.draw_normal(tensors))
            optimizer.step()
        optimizer.join()

    return operation


def the_agreement(folder: Path) -> Operation:
    tensors = parts.parameters(*SHAPES)
    parts.give(tensors, parts.draw_normal(tensors, mpisign.rank()))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(tensors, lr=0.1))
    optimizer.step()
    assert optimizer.report is not None
    return optimizer.report.agreement


def broadcast_parameters(root: int) -> Prepare:
    tensors = {"flags": torch.zeros(3, dtype=torch.bool), "weight": torch.zeros(5, 7), "half": torch.zeros(3).half()}
    return lambda folder: lambda: mpisign.broadcast_parameters(tensors, root_rank=root % mpisign.size())


def broadcast_state(root: int, stepped: bool = True, **options: Any) -> Prepare:
    def prepare(folder: Path) -> Operation:
        tensors = parts.parameters(*SHAPES)
        adam = torch.optim.AdamW(tensors, lr=0.1)
        parts.give(tensors, parts.draw_normal(tensors))
        if stepped:
            adam.step()
        optimizer = mpisign.DistributedSignOptimizer(adam, method=mpisign.mean(), **options)
        return lambda: mpisign.broadcast_optimizer_state(optimizer, root_rank=root % mpisign.size())

    return prepare


def a_check(equal: bool) -> Prepare:
    def prepare(folder: Path) -> Operation:
        torch.manual_seed(0 if equal else int(mpisign.rank() == mpisign.size() - 1))
        model = torch.nn.Linear(3, 2)
        return lambda: mpisign.check_consistency(model)

    return prepare


def a_save(asynchronous: bool) -> Prepare:
    def prepare(folder: Path) -> Operation:
        job = Job().train(1)

        def operation() -> None:
            job.save(folder, asynchronous=asynchronous)
            checkpoint.wait()

        return operation

    return prepare


def a_load(folder: Path) -> Operation:
    job = Job().train(1)
    job.save(folder)
    return lambda: job.load(folder)


def the_newest(folder: Path) -> Operation:
    Job().train(1).save(folder)
    return lambda: checkpoint.newest(folder)


def leaving_with_a_save_and_a_timeline(folder: Path) -> Operation:
    Job().train(1).save(folder, asynchronous=True)
    return mpisign.shutdown


def the_doctor(folder: Path) -> Operation:
    def operation() -> None:
        with pytest.MonkeyPatch.context() as patch:  # it takes long to look for packages, and tells nobody
            patch.setattr(doctor, "_versions", lambda: iter(()))
            doctor.examine()

    return operation


OPERATIONS: dict[str, Prepare] = {
    "step, all-gather": a_step(mpisign.signum(), exchange="allgather"),
    "step, two-phase": a_step(mpisign.signsgd(), exchange="two_phase", zeros="abstain", ties="zero"),
    "step, hierarchical": a_step(mpisign.signsgd(), exchange="hierarchical", zeros="abstain", ties="zero"),
    "step of different models": a_step_of_different_models,
    "step with a maximum": a_step(mpisign.sto_sign()),
    "step of indices": a_step(mpisign.top_k(0.1)),
    "local steps and their exchanges": a_step(mpisign.scaled_vote(), every=1, average_buffers=torch.nn.BatchNorm1d(3)),
    "step that mixes models": a_step(mpisign.mean(), exchange="allgather"),
    "join": ranks_that_join,
    "agreement": the_agreement,
    "broadcast_parameters, from rank 0": broadcast_parameters(0),
    "broadcast_parameters, from the last": broadcast_parameters(-1),
    "broadcast_optimizer_state, from rank 0": broadcast_state(0),
    "broadcast_optimizer_state, from the last": broadcast_state(-1),
    "broadcast_optimizer_state of local steps": broadcast_state(0, every=2),
    "check_consistency": a_check(True),
    "check_consistency of different models": a_check(False),
    "barrier": lambda folder: mpisign.barrier,
    "save": a_save(False),
    "save in the background": a_save(True),
    "load": a_load,
    "newest": the_newest,
    "timeline": lambda folder: lambda: mpisign.timeline(folder / "timeline.json"),
    "shutdown": leaving_with_a_save_and_a_timeline,
    "doctor": the_doctor,
    "init": lambda folder: lambda: mpisign.init(stall_timeout=60.0),
}


def fill(pattern: bytes) -> hostile.Change:
    def change(message: np.ndarray) -> None:
        message[:] = np.resize(np.frombuffer(pattern, np.uint8), message.size)

    return change


def random_bytes(message: np.ndarray) -> None:
    message[:] = np.random.default_rng(message.size).integers(0, 256, message.size, np.uint8)


def fillings(folder: Path) -> dict[str, hostile.Change]:
    """Of the length that is expected."""
    return {
        "random": random_bytes,
        "-1": fill(b"\xff"),
        "2**62": fill(struct.pack("<q", 2**62)),
        "-2**63": fill(struct.pack("<q", -(2**63))),
        "a pickle": fill(bombs(folder) + b"\0"),
        "JSON": fill(b"[null,[null,"),
    }


FILLINGS = 6


def assert_named(met: list[BaseException | None], evil: int, where: str) -> None:
    """The others went on or raised an error of the library's, which says something."""
    for rank, error in enumerate(met):
        if rank != evil and error is not None:
            assert isinstance(error, (MpisignError, hostile.AloneError)), (where, rank, repr(error))
            said = isinstance(error, hostile.AloneError) or "rank" in str(error) or "checkpoint." in str(error)
            assert said, (where, rank, repr(error))


def fuzz(comm: MPI.Comm, folder: Path, name: str, evil: int, chosen: Callable[[int, int], bool]) -> None:
    """Every send of an operation, with those of the fillings that are ``chosen`` by both their numbers."""
    joining = name == "init"

    def play(number: int, change: hostile.Change) -> tuple[list[BaseException | None], list[str]]:
        operation = OPERATIONS[name](folder)
        patience = hostile.PATIENCE if number >= 0 else hostile.LONG
        played = hostile.attack(comm, evil, operation, number, change, joining, patience)
        hostile.start_anew(comm)
        return played

    met, sends = play(-1, random_bytes)
    assert sends, "there is nothing to attack"
    if "different" not in name:
        assert met == [None] * comm.size, met
    for number, how in enumerate(sends):
        for at, (filling, change) in enumerate(fillings(folder).items()):
            if chosen(number, at):
                met, _ = play(number, change)
                assert_named(met, evil, f"{name}: rank {evil} sends {filling} in its send {number}, {how}")
