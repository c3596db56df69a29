"""A rank that sends arbitrary bytes wherever the library talks to itself: the others raise a named error, or go on.

Where that is: the calls with which everything begins (the handshake, ``meet``), the sizes and bytes of what is told,
the headers, the messages and decisions of both exchanges, the maximum, the count of ties, broadcast
tensors, the clocks, the forming of a group, the doctor's vote, and notices of presence. For messages, decisions and
tensors any bits are legal; so a rank may go on, with those votes.
"""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import parts
import pytest
import torch
from methods_table import exchanges
from resumable import Job

import mpisign
from mpisign import MpisignError, checkpoint, doctor

from . import hostile

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)

SHAPES = ((40,), (3, 5))
Operation = Callable[[], object]
Prepare = Callable[[Path], Operation]


@pytest.fixture
def folder(comm: MPI.Comm, tmp_path: Path) -> Path:
    """The same on all ranks."""
    shared: Path = comm.bcast(tmp_path)
    return shared


@pytest.fixture(autouse=True)
def nothing_runs_and_memory_stays(folder: Path) -> Any:
    """No byte that was sent is executed, and no number makes a rank take much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert not (folder / "executed").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "in KiB"


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


def broadcast_state(root: int) -> Prepare:
    def prepare(folder: Path) -> Operation:
        tensors = parts.parameters(*SHAPES)
        adam = torch.optim.AdamW(tensors, lr=0.1)
        parts.give(tensors, parts.draw_normal(tensors))
        adam.step()
        optimizer = mpisign.DistributedSignOptimizer(adam, method=mpisign.mean())
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
    "step of different models": a_step_of_different_models,
    "step with a maximum": a_step(mpisign.sto_sign()),
    "step of indices": a_step(mpisign.top_k(0.1)),
    "step that mixes models": a_step(mpisign.mean(), exchange="allgather"),
    "join": ranks_that_join,
    "agreement": the_agreement,
    "broadcast_parameters, from rank 0": broadcast_parameters(0),
    "broadcast_parameters, from the last": broadcast_parameters(-1),
    "broadcast_optimizer_state, from rank 0": broadcast_state(0),
    "broadcast_optimizer_state, from the last": broadcast_state(-1),
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
        played = hostile.attack(comm, evil, operation, number, change, joining)
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


@pytest.mark.parametrize("evil", [-1, 0], ids=["the last", "rank 0"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_other_bytes_in_every_message(comm: MPI.Comm, folder: Path, name: str, evil: int) -> None:
    """One filling for each message, in turn."""
    fuzz(comm, folder, name, evil % comm.size, lambda number, at: (number + evil) % FILLINGS == at)


@pytest.mark.long
@pytest.mark.parametrize("evil", [-1, 0], ids=["the last", "rank 0"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_all_other_bytes_in_every_message(comm: MPI.Comm, folder: Path, name: str, evil: int) -> None:
    fuzz(comm, folder, name, evil % comm.size, lambda number, at: True)


@pytest.mark.long
@parts.each_method
def test_all_other_bytes_in_a_step_of_every_method(comm: MPI.Comm, folder: Path, name: str) -> None:
    method = parts.methods_for(comm.size)[name]
    if not parts.runs_with(method, comm.size):
        pytest.skip("needs more ranks")
    for exchange in ("allgather", "two_phase"):
        if exchange in exchanges(method):
            OPERATIONS[name] = a_step(method, exchange=exchange)
            fuzz(comm, folder, name, comm.size - 1, lambda number, at: True)


# ------------------------------------------------------------------------------------------- what is told as JSON


def texts(folder: Path) -> dict[str, bytes]:
    """That are no JSON, or none that anybody expects, or what an attacker would like to be taken for a name."""
    return {
        "pickle": bombs(folder),
        "nothing": b"",
        "no UTF-8": b'"\xff\xfe\x80"',
        "half": b'{"a":',
        "deep": b"[" * 100_000,
        "deep tree": b'["list",[' * 900 + b"1" + b"]]" * 900,
        "number": b"9" * 4300,
        "long number": b"9" * 100_000,
        "NaN": b"NaN",
        "null": b"null",
        "no problem": b"[null,null]",
        "a problem": b'["\\u001b[31m\\ud800",null]',
        "text": b'"\\u001b[31m\\ud800"',
        "twice": b'{"problem":null,"problem":"x"}',
        "up": b'[null,"../../../../tmp"]',
        "root": b'[null,"/dev"]',
    }


@pytest.mark.parametrize("evil", [-1, 0], ids=["the last", "rank 0"])
@pytest.mark.parametrize(
    "name",
    [
        "step of different models",
        "broadcast_optimizer_state, from rank 0",
        "broadcast_optimizer_state, from the last",
        "check_consistency of different models",
        "save",
        "load",
        "newest",
        "timeline",
        "doctor",
        "init",
    ],
)
def test_other_texts(comm: MPI.Comm, folder: Path, name: str, evil: int) -> None:
    """Of any length, in turn for each thing that is told in an operation."""
    evil %= comm.size
    for at, (text, message) in enumerate(texts(folder).items()):
        for number in (0, 1 + at % 3):
            operation = OPERATIONS[name](folder)

            def spoken(operation: Operation = operation, number: int = number, message: bytes = message) -> None:
                with hostile.says(comm.rank == evil, number, message):
                    operation()

            met, _ = hostile.attack(comm, evil, spoken, -1, random_bytes, name == "init")
            hostile.start_anew(comm)
            assert_named(met, evil, f"{name}: rank {evil} says {text} as number {number}")
            for error in met:
                assert "\x1b" not in str(error)


FILE = '{"bytes":1,"crc32":0}'


def manifest(ranks: str = "1", files: str = f'"shared.pt":{FILE},"rank-00000.pt":{FILE}', step: str = "1") -> str:
    return f'{{"step":{step},"ranks":{ranks},"serial":1,"files":{{{files}}}}}'


def found(name: str, content: str, unreadable: str = "") -> bytes:
    return f'[null,[false,[["{name}","{unreadable}",{content}]]]]'.encode()


LIES = {
    "a name above": ("load", 0, found("../step-1", manifest()), "'../step-1' for the name of a checkpoint"),
    "an absolute name": ("load", 0, found("/dev/step-1", manifest()), "for the name of a checkpoint, which it cannot"),
    "a device for a file": (
        "load",
        0,
        found("step-1", manifest(files=f'"shared.pt":{FILE},"/dev/zero":{FILE}')),
        "a manifest that is none",
    ),
    "a file above": (
        "load",
        0,
        found("step-1", manifest(files=f'"shared.pt":{FILE},"../../passwd":{FILE}')),
        "a manifest that is none",
    ),
    "very many ranks": ("load", 0, found("step-1", manifest(ranks=str(10**12))), "a manifest that is none"),
    "no ranks": ("load", 0, found("step-1", manifest(ranks="-1", files="")), "a manifest that is none"),
    "a step before the first": ("load", 0, found("step-1", manifest(step="-1")), "a manifest that is none"),
    "neither good nor bad": ("load", 0, found("step-1", "null"), "step-1 is unreadable"),
    "nothing to load": ("load", 0, b"[null,null]", "rank 0 has not said what there is to load"),
    "a number for a rank's options": (
        "save",
        -1,
        b'[null,[{"step":1,"keep":3,"asynchronous":1,"the optimizer\'s steps":1},null]]',
        "no message of mpisign's",
    ),
    "no options": ("save", -1, b"[null,null]", "has said nothing, and no problem either"),
    "a folder above": (
        "save",
        0,
        b'[null,[{"step":1,"keep":3,"asynchronous":false,"the optimizer\'s steps":1},"../step-1.00000000.tmp"]]',
        "for the name of a new folder, which it cannot be",
    ),
    "the newest above": ("newest", 0, b'[null,"../../step-1"]', "for the name of a checkpoint"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_checkpoints(comm: MPI.Comm, folder: Path, lie: str) -> None:
    name, evil, message, expected = LIES[lie]
    evil %= comm.size
    operation = OPERATIONS[name](folder)

    def spoken() -> None:
        skipped = {"load": 1, "save": 0, "newest": 0}[name] - 1
        with hostile.says(comm.rank == evil, max(0, skipped), message):
            operation()

    met, _ = hostile.attack(comm, evil, spoken, -1, random_bytes)
    hostile.start_anew(comm)
    for rank, error in enumerate(met):
        if rank != evil:
            assert isinstance(error, MpisignError), (rank, repr(error))
            assert expected in str(error)


STATE = (
    '["dict",[["state",["dict",[]]],["param_groups",["list",[["dict",[["params",["list",[0,1]]],["lr",{lr}],'
    '["betas",["tuple",[0.9,0.999]]],["eps",1e-8],["weight_decay",0.01],["amsgrad",false],["maximize",false],'
    '["foreach",null],["capturable",false],["differentiable",false],["fused",null],'
    '["decoupled_weight_decay",true]]]]]]]]'
)


def state(step: str = "1", shapes: str = "[]", lr: str = "0.1", tree: str | None = None) -> bytes:
    told = STATE.replace("{lr}", lr) if tree is None else tree
    return f'{{"problem":null,"state":{told},"step":{step},"epoch":null,"shapes":{shapes}}}'.encode()


STATES = {
    "the step": (state(step=str(2**64)), "says that it is at step"),
    "a step before the first": (state(step="-1"), "says that it is at step"),
    "a tensor beyond memory": (state(shapes=f'[[[{2**62}],"uint8"]]'), "tensors that cannot be made here"),
    "many tensors beyond memory": (state(shapes=str([[[2**39], "uint8"]] * 9).replace("'", '"')), "cannot be made"),
    "a negative size": (state(shapes='[[[-1],"uint8"]]'), "tensors that cannot be made here"),
    "a size beyond numbers": (state(shapes=f'[[[{10**30}],"uint8"]]'), "tensors that cannot be made here"),
    "a type that is none": (state(shapes='[[[1],"load"]]'), "tensors that cannot be made here"),
    "a type that cannot be copied": (state(shapes='[[[1],"quint8"]]'), "tensors that cannot be made here"),
    "a word for a rate": (state(lr='"x"'), "'lr' is 'x', and here"),
    "no groups": (state(tree='["dict",[["state",["dict",[]]],["param_groups",3]]]'), "does not fit this rank's"),
    "no tree": (state(tree='["code","print()"]'), "does not fit this rank's"),
}


@pytest.mark.parametrize("what", STATES)
def test_lies_about_an_optimizers_state(comm: MPI.Comm, folder: Path, what: str) -> None:
    message, expected = STATES[what]
    operation = broadcast_state(-1)(folder)

    def spoken() -> None:
        with hostile.says(comm.rank == comm.size - 1, 0, message):
            operation()

    met, _ = hostile.attack(comm, comm.size - 1, spoken, -1, random_bytes)
    hostile.start_anew(comm)
    for error in met[:-1]:
        assert isinstance(error, mpisign.ConsistencyError), repr(error)
        assert expected in str(error)


def test_a_state_as_it_should_be_is_taken(comm: MPI.Comm, folder: Path) -> None:
    """What the lies are told of."""
    operation = broadcast_state(-1)(folder)

    def spoken() -> None:
        with hostile.says(comm.rank == comm.size - 1, 0, state()):
            operation()

    met, _ = hostile.attack(comm, comm.size - 1, spoken, -1, random_bytes)
    hostile.start_anew(comm)
    assert met[:-1] == [None] * (comm.size - 1)


# ----------------------------------------------------------------------------------------- notices


def test_a_notice_of_another_length(comm: MPI.Comm) -> None:
    """In a long wait, or at the end."""
    from mpisign.presence import TAG

    if comm.rank == comm.size - 1:
        for rank in range(comm.size - 1):
            mpisign.session.current().group.comm.Send(np.zeros(7, np.uint8), rank, TAG)
    comm.Barrier()
    if comm.rank < comm.size - 1:
        with pytest.raises(
            mpisign.ConsistencyError, match=rf"rank {comm.size - 1} has sent 7 bytes that are no notice"
        ):
            mpisign.session.current()._presence.listen("a test")
    hostile.start_anew(comm)
