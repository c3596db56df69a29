"""mpisign.report: what a step tells of itself."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
import time

import pytest
import torch

import mpisign
from mpisign import DistributedSignOptimizer, MpisignError, StepReport
from mpisign.trace import PHASES


def stepped(**options: object) -> tuple[DistributedSignOptimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0), **options)
    parameter.grad = torch.randn(100_000)
    optimizer.step()
    return optimizer, parameter


def report_of(optimizer: DistributedSignOptimizer) -> StepReport:
    assert optimizer.report is not None
    return optimizer.report


@pytest.mark.usefixtures("world")
def test_the_profiler_sees_every_phase() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stepped()
    seen = {event.key for event in profile.key_averages()}
    assert {f"mpisign::{phase}" for phase in PHASES} <= seen


@pytest.mark.usefixtures("world")
def test_report() -> None:
    began = time.perf_counter()
    optimizer, parameter = stepped()
    elapsed = time.perf_counter() - began
    report = report_of(optimizer)
    assert report.step == 0
    assert report.method == "signum"
    assert report.exchange == ("allgather",)
    assert report.bytes_sent == report.header_bytes == 0, "there is nobody to send to"
    assert report.voters == (0,)
    assert report.abstentions == {}
    assert report.skipped is False
    assert report.ties == 0
    assert set(report.seconds) == set(PHASES)
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert sum(report.seconds.values()) < elapsed
    assert report.agreement() == [1.0], "this rank decides alone"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.step = 1

    parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    report = report_of(optimizer)
    assert report.step == 1
    assert report.voters == ()
    assert report.abstentions == {0: "non-finite gradient"}
    assert report.skipped is True

    parameter.grad = None
    optimizer.step()
    report = report_of(optimizer)
    assert report.abstentions == {0: "no gradient"}
    assert report.skipped is True
    assert math.isnan(report.agreement()[0]), "a rank that did not vote agreed on nothing"


@pytest.mark.usefixtures("world")
def test_agreement_does_not_count_who_abstained() -> None:
    optimizer, parameter = stepped(zeros="abstain", method=mpisign.signsgd())
    parameter.grad = torch.tensor([1.0, 0.0]).repeat(50_000)
    optimizer.step()
    assert report_of(optimizer).agreement() == [1.0]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    (share,) = report_of(optimizer).agreement()
    assert math.isnan(share)


@pytest.mark.usefixtures("world")
def test_agreement_is_of_the_latest_step_only() -> None:
    optimizer, parameter = stepped()
    old = report_of(optimizer)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(MpisignError, match=r"step 0 are gone: ask for agreement\(\) before"):
        old.agreement()
    assert report_of(optimizer).agreement() == [1.0]


def test_agreement_after_shutdown() -> None:
    """In a process of its own: to ask a communicator that is gone kills it."""
    program = (
        "import mpisign, torch\n"
        "mpisign.init()\n"
        "p = torch.nn.Parameter(torch.zeros(3))\n"
        "optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([p], lr=1.0))\n"
        "p.grad = torch.ones(3)\n"
        "optimizer.step()\n"
        "mpisign.shutdown()\n"
        "optimizer.report.agreement()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert "NotInitializedError" in ended.stderr


@pytest.mark.usefixtures("world")
def test_a_mean_has_neither_ties_nor_agreement() -> None:
    report = report_of(stepped(method=mpisign.mean())[0])
    assert report.ties is None
    with pytest.raises(MpisignError, match="'mean' casts no votes"):
        report.agreement()


@pytest.mark.usefixtures("world")
def test_a_report_can_be_pickled_and_copied() -> None:
    optimizer, _ = stepped()
    report = report_of(optimizer)
    for copied in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert copied == report
        assert copied.as_dict() == report.as_dict()
        with pytest.raises(MpisignError, match="this is a copy of the report"):
            copied.agreement()
    assert report.agreement() == [1.0], "the original still can"


@pytest.mark.usefixtures("world")
def test_flat_numbers() -> None:
    optimizer, parameter = stepped()
    flat = report_of(optimizer).as_dict()
    assert list(flat) == [
        *("step", "bytes_sent", "header_bytes", "voters", "abstentions", "ended_at", "skipped", "ties"),
        *(f"seconds_{phase}" for phase in PHASES),
        *("exposed_seconds", "waited_for", "waited_share", "generation", "members", "recovery_seconds"),
    ]
    assert all(type(value) in (int, float) for value in flat.values())
    assert (flat["step"], flat["voters"], flat["abstentions"], flat["skipped"], flat["ties"]) == (0, 1, 0, 0, 0)
    assert flat["seconds_pack"] == report_of(optimizer).seconds["pack"]
    parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    flat = report_of(optimizer).as_dict()
    assert (flat["step"], flat["voters"], flat["abstentions"], flat["skipped"]) == (1, 0, 1, 1)
    assert math.isnan(report_of(stepped(method=mpisign.mean())[0]).as_dict()["ties"])


def test_every_field_is_documented() -> None:
    fields = [field.name for field in dataclasses.fields(StepReport) if not field.name.startswith("_")]
    assert StepReport.__doc__ is not None
    assert [name for name in fields if f"        {name}: " not in StepReport.__doc__] == []
