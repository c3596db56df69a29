"""The flags that the training scripts share: methods, options, and answers to what is wrong, on a world of one."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import arguments
from torch import nn

import mpisign

# ----------------------------------------------------------------------------------------------------- methods


def test_every_method_of_the_library_can_be_named(flags: ModuleType) -> None:
    makers = {name for name in mpisign.methods.__all__ if name.islower()}
    assert set(flags.METHODS) == makers
    for name in makers:
        needed = [p for p in inspect.signature(flags.METHODS[name]).parameters.values() if p.default is p.empty]
        if not needed:
            assert flags.method(name) == flags.METHODS[name]()


@pytest.mark.parametrize(
    "text, method",
    [
        ("signum:momentum=0.95", mpisign.signum(0.95)),
        ("signum:momentum=0", mpisign.signum(0)),
        ("lion:beta1=0.95,beta2=0.98", mpisign.lion(0.95, 0.98)),
        ("lion: beta2 = .9", mpisign.lion(beta2=0.9)),
        ("signsgd:", mpisign.signsgd()),
    ],
)
def test_arguments_of_a_method(flags: ModuleType, text: str, method: mpisign.Method) -> None:
    assert flags.method(text) == method


def test_arguments_of_any_kind_reach_a_method(flags: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods to come have others than numbers."""
    given = {}
    monkeypatch.setitem(flags.METHODS, "new", lambda **arguments: given.update(arguments) or mpisign.mean())
    flags.method("new:share=0.01,f=1,mask=False,attack=sign_flip,scale=None,name='a b'")
    assert given == {"share": 0.01, "f": 1, "mask": False, "attack": "sign_flip", "scale": None, "name": "a b"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("adam", r"'adam' is not a method: choose from .*lion\(beta1=0.9, beta2=0.99, vote=True\).*signsgd\(\)"),
        (
            "signum:beta=0.9",
            r"unexpected keyword argument 'beta'. It is signum\(momentum=0.9\): write --method signum:",
        ),
        ("signum:momentum=1", r"momentum=1 must be in \[0, 1\)"),
        ("signum:momentum", r"momentum='' must be in \[0, 1\)"),
        ("signum:momentum=high", r"momentum='high' must be in \[0, 1\)"),
    ],
)
def test_a_method_that_is_none(flags: ModuleType, text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        flags.method(text)


# ------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "options, said",
    [
        (("--epochs", "0"), "'0' is not a whole number from 1 up, such as 20"),
        (("--save-every", "often"), "'often' is not a whole number"),
        (("--precision", "fp8"), "invalid choice: 'fp8'"),
        (("--tensorboard",), "add --log-dir, such as --log-dir out/log"),
        (("--checkpoint-dir", Path(__file__) / "a"), "Not a directory; name a file in a folder that can be made"),
        (("--log-dir", Path(__file__) / "a"), "Not a directory; name a file in a folder that can be made"),
    ],
)
def test_bad_input_is_answered_with_what_to_type(
    flags: ModuleType, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        arguments(flags, *options)
    assert said in capsys.readouterr().err


def test_an_exchange_that_the_method_cannot_use_ends_the_job(
    training: ModuleType, flags: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(2, 2)
    args = arguments(flags)
    args.exchange = "pigeon"
    with pytest.raises(SystemExit, match="2"):
        training.distribute(args, model, torch.optim.SGD(model.parameters(), 0.1), mpisign.signum(), 0)
    assert "exchange='pigeon' is not known" in capsys.readouterr().err


def test_a_problem_on_a_rank_ends_the_job(flags: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    flags.end_if_any(None)
    with pytest.raises(SystemExit, match="2"):
        flags.end_if_any("no such folder")
    assert "rank 0 on " in (said := capsys.readouterr().err)
    assert said.endswith(": no such folder\n")
