"""A hostile rank that says other things than it should where ranks tell each other JSON: texts, lies, states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mpisign
from mpisign import MpisignError

from . import hostile

if TYPE_CHECKING:
    from mpi4py import MPI

from .operations import OPERATIONS, Operation, assert_named, bombs, broadcast_state, random_bytes

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.usefixtures("nothing_runs_and_memory_stays")]


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


@pytest.mark.long
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

    met, _ = hostile.attack(comm, evil, spoken, -1, random_bytes, patience=hostile.LONG)
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
    return f'{{"state":{told},"step":{step},"epoch":null,"shapes":{shapes}}}'.encode()


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
    if comm.size > 4:
        pytest.skip("ranks that are through let no others' messages pass, and one is taken for lost")
    message, expected = STATES[what]
    operation = broadcast_state(-1)(folder)

    def spoken() -> None:
        with hostile.says(comm.rank == comm.size - 1, 0, message):
            operation()

    patience = 3.0 if comm.rank == comm.size - 1 else hostile.LONG  # it alone may wait in vain, where it is refused
    met, _ = hostile.attack(comm, comm.size - 1, spoken, -1, random_bytes, patience=patience)
    hostile.start_anew(comm)
    for error in met[:-1]:
        assert isinstance(error, mpisign.ConsistencyError), repr(error)
        assert expected in str(error)


def test_a_state_as_it_should_be_is_taken(comm: MPI.Comm, folder: Path) -> None:
    """What the lies are told of."""
    operation = broadcast_state(-1, stepped=comm.rank < comm.size - 1)(folder)  # it sends no tensors, as it says

    def spoken() -> None:
        with hostile.says(comm.rank == comm.size - 1, 0, state()):
            operation()

    met, _ = hostile.attack(comm, comm.size - 1, spoken, -1, random_bytes, patience=hostile.LONG)
    hostile.start_anew(comm)
    assert met[:-1] == [None] * (comm.size - 1)
