"""mpisign.telemetry: spans that the profiler sees, and a report of the step."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time

import pytest
import torch

import mpisign
from mpisign import DistributedSignOptimizer, MpisignError, StepReport
from mpisign.telemetry import PHASES, Stopwatch


def stepped(**options: object) -> tuple[DistributedSignOptimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0), **options)
    parameter.grad = torch.randn(100_000)
    optimizer.step()
    return optimizer, parameter


def report_of(optimizer: DistributedSignOptimizer) -> StepReport:
    assert optimizer.report is not None
    return optimizer.report


def test_a_stopwatch_adds_up_also_when_something_fails() -> None:
    watch = Stopwatch()
    assert watch.seconds == dict.fromkeys(PHASES, 0.0)
    with watch.span("pack"):
        time.sleep(0.01)
    first = watch.seconds["pack"]
    with pytest.raises(TypeError), watch.span("pack"):
        time.sleep(0.01) + 1
    assert 0.01 <= first <= watch.seconds["pack"] - 0.01
    assert watch.seconds["decide"] == 0


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
    with pytest.raises(MpisignError, match=r"step 0 are gone .*latest is 1"):
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
