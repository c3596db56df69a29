"""When a rank does not come, the others say for whom they wait and in which phase, and accuse nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mpirun import Job, Result, patient, started, wait_until

LATE_EVERYWHERE = """
import dataclasses, json, logging, sys, threading, time
import torch, torch._dynamo
import mpisign
from mpisign import doctor
from mpisign.memory import ErrorFeedback, Identity
from mpisign.memory.noise import StochasticSign
from mpisign.rules import MajorityVote

WARNING, LATE = 3.0, 7.0
doctor._versions = lambda: iter(())  # it takes long to look for packages, longer on some ranks
mpisign.init(stall_warning=WARNING, stall_timeout=60.0)
rank, said, late = mpisign.rank(), [], None

class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

logging.getLogger("mpisign").addHandler(Listener())

def notice():
    # In `gap`: the longest time for which this process was kept from running.
    global gap
    before = time.monotonic()
    while True:
        time.sleep(0.05)
        now = time.monotonic()
        gap, before = max(gap, now - before), now

gap = 0.0
threading.Thread(target=notice, daemon=True).start()

def come():
    global late
    if late == rank:
        late = None
        time.sleep(LATE)

class SlowToPack(Identity):
    def __call__(self, gradient, *_):
        come()
        return gradient

class SlowToPrepare(StochasticSign):
    def prepare(self, gradients, context):
        come()

class SlowAfterSending(Identity):
    def __call__(self, gradient, *_):
        if gradient.numel() == 3:  # the large one is on its way, and a rank that does not call MPI does not send it
            come()
        return gradient

class SlowToDecide(MajorityVote):
    def decide(self, *arguments):
        come()
        return super().decide(*arguments)

def stepping(exchange="two_phase", method=mpisign.signsgd(), *sizes, **parts):
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes or (100,)]
    method = dataclasses.replace(method, **{name: part() for name, part in parts.items()})
    sgd = torch.optim.SGD(parameters, lr=1.0)
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=method, exchange=exchange, bucket_cap_mb=1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return optimizer.step

def after_coming(act):
    def coming():
        come()
        act()
    return coming

model = torch.nn.Linear(3, 2)
sgd = torch.optim.SGD(model.parameters(), lr=1.0)
folder = sys.argv[1]
trained = mpisign.DistributedSignOptimizer(sgd, method=mpisign.signsgd())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
trained.step()

def in_the_background():
    mpisign.checkpoint.save(folder + "/other", model=model, optimizer=sgd, step=1, asynchronous=True)
    come()
    mpisign.checkpoint.wait()

acts = {
    "step 0, handshake": after_coming(stepping()),
    "step 0, bucket 0, header": stepping(memory=SlowToPack),
    "step 0, maximum": stepping(memory=SlowToPrepare),
    "step 0, bucket 0, phase 1": stepping("allgather", mpisign.mean(), 3, 4 << 20, memory=SlowAfterSending),
    "step 0, bucket 0, phase 2": stepping(rule=SlowToDecide),
    "step 0, count of ties": stepping("allgather", rule=SlowToDecide),
    "barrier()": after_coming(mpisign.barrier),
    "broadcast_object()": after_coming(lambda: mpisign.broadcast_object(1)),
    "allgather_object()": after_coming(lambda: mpisign.allgather_object(1)),
    "broadcast_parameters()": after_coming(lambda: mpisign.broadcast_parameters(model.state_dict())),
    "broadcast_optimizer_state()": after_coming(lambda: mpisign.broadcast_optimizer_state(sgd)),
    "check_consistency()": after_coming(lambda: mpisign.check_consistency(model)),
    "checkpoint.save()": after_coming(lambda: mpisign.checkpoint.save(folder, model=model, optimizer=sgd, step=1)),
    "checkpoint.newest()": after_coming(lambda: mpisign.checkpoint.newest(folder)),
    "checkpoint.load()": after_coming(lambda: mpisign.checkpoint.load(folder, model=model, optimizer=sgd)),
    "step 1, handshake": after_coming(trained.join),
    "agreement()": after_coming(lambda: trained.report.agreement()),
    "checkpoint.wait()": in_the_background,
    "the doctor": after_coming(doctor.examine),
    "timeline()": after_coming(lambda: mpisign.timeline(folder + "/trace.json")),
    "exit": after_coming(mpisign.shutdown),
}
for number, (phase, act) in enumerate(acts.items()):
    missing = late = number % mpisign.size()
    mpisign.barrier()
    said.clear()
    gap = 0.0
    act()
    print(json.dumps([phase, rank, missing, said, gap]), flush=True)
"""
PART_OF_IT_ARRIVES = "step 0, bucket 0, phase 1"  # so that a rank may have all that it needs


@pytest.mark.long
@pytest.mark.timeout(1700)
def test_every_phase_names_who_is_missing(tmp_path: Path) -> None:
    """Over TCP, where a large message does not arrive while its sender does something else."""
    path = tmp_path / "late.py"
    path.write_text(LATE_EVERYWHERE)
    for _ in range(3):
        with started(3, path, tmp_path, env={"OMPI_MCA_btl": "self,tcp"}) as job:
            result = job.wait(timeout=400.0)
        assert result.returncode == 0, result.text
        told = [json.loads(line) for line in result.text.splitlines() if line.startswith('["')]
        assert len(told) == 3 * 21
        wrong = wrong_phases(told)
        disturbed = {phase for phase, rank, missing, _, gap in told if rank != missing and gap > 1.0}
        assert wrong.keys() <= disturbed, "where no other rank was kept from coming"
        if not wrong:
            return
    raise AssertionError(f"this machine is too busy: {wrong}")


def wrong_phases(told: list[Any]) -> dict[str, list[Any]]:
    """What ranks have said in those phases in which it is not all of the one that is missing, and of nobody else."""
    by_phase: dict[str, list[Any]] = {}
    for phase, *its in told:
        by_phase.setdefault(phase, []).append(its)

    def right(phase: str) -> bool:
        waits = rf"rank {{}} of 3 has waited [\d.]+ s in {re.escape(phase)}; not heard from yet: ranks \[{{}}\]"
        named = all(
            re.fullmatch(waits.format(rank, missing), message)
            for rank, missing, said, _ in by_phase[phase]
            for message in said
        )
        saying = sum(bool(said) for _, _, said, _ in by_phase[phase])
        return named and saying in ((1, 2) if phase == PART_OF_IT_ARRIVES else (2,))

    return {phase: its for phase, its in by_phase.items() if not right(phase)}


# --------------------------------------------------------------------------------- a rank that never comes


PRELUDE = """
import os, signal, sys, time
import torch, torch._dynamo  # which optimizers import, seconds one after the other
import mpisign
from mpisign.memory import Identity

def hang():
    print("rank 1 stays away", flush=True)
    while True:
        time.sleep(1)

def stop():
    print("rank 1 stays away", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

first = int(os.environ["OMPI_COMM_WORLD_RANK"])
times = {"stall_warning": 4.0, "stall_timeout": 10.0}
"""

NEVER = {
    "before init()": (
        "init()",
        """
            from mpi4py import MPI
            if MPI.COMM_WORLD.rank == 1:
                hang()
            mpisign.init(**times)
        """,
    ),
    "in packing": (
        "step 0, bucket 0, header",
        """
            class Stopping(Identity):
                def __call__(self, gradient, *_):
                    if mpisign.rank() == 1:
                        stop()
                    return gradient

            from mpi4py import MPI  # which takes its time where others compute
            mpisign.init(**times)
            parameter = torch.nn.Parameter(torch.zeros(100))
            method = mpisign.Method(Stopping(), mpisign.signsgd().codec, mpisign.signsgd().rule)
            optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0), method=method)
            parameter.grad = torch.ones(100)
            optimizer.step()
        """,
    ),
    "in saving": (
        "checkpoint.save()",
        """
            class Hanging(torch.nn.Linear):
                def state_dict(self, *arguments, **options):
                    if mpisign.rank() == 1:
                        hang()
                    return super().state_dict(*arguments, **options)

            from mpi4py import MPI
            mpisign.init(**times)
            model = Hanging(3, 2)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            mpisign.checkpoint.save("checkpoints", model=model, optimizer=optimizer, step=1)
        """,
    ),
    "before shutdown()": (
        "exit",
        """
            from mpi4py import MPI
            mpisign.init(**times)
            if mpisign.rank() == 1:
                stop()
            mpisign.shutdown()
        """,
    ),
    "before its end": (
        "exit",
        """
            from mpi4py import MPI
            mpisign.init(**times)
            if mpisign.rank() == 1:
                hang()
        """,
    ),
}


def run(tmp_path: Path, body: str) -> Result:
    """A job of three ranks that must end by itself, though not well, and leave nothing."""
    path = tmp_path / "job.py"
    path.write_text(PRELUDE + textwrap.dedent(body))
    with started(3, path, cwd=tmp_path) as job:
        result = job.wait(timeout=150.0)
        assert job.orphans() == []
    assert result.returncode != 0, result.text
    return result


@pytest.mark.long
@pytest.mark.parametrize("where", NEVER)
def test_a_rank_that_never_comes_is_named_and_the_job_ends(tmp_path: Path, where: str) -> None:
    phase, body = NEVER[where]
    result = run(tmp_path, body)
    waits = rf"rank ([02]) of 3 has waited [\d.]+ s in {re.escape(phase)}; not heard from yet: ranks \[1\]"
    assert set(re.findall(waits, result.text)) == {"0", "2"}, result.text
    assert len(re.findall(waits, result.text)) == result.text.count("has waited"), "and nobody else is"
    assert re.search(waits + "; stall_timeout=10 is over: aborting the job", result.text)


@pytest.mark.long
def test_a_rank_that_never_exits_does_not_keep_the_others(tmp_path: Path) -> None:
    """They have left the job together, and wait in MPI_Finalize, where nothing can be said any more."""
    result = run(
        tmp_path,
        """
            from mpi4py import MPI
            mpisign.init(**times)
            mpisign.shutdown()
            if first == 1:
                hang()
        """,
    )
    assert "rank 1 stays away" in result.text
    assert "MPI has not ended within 10 s; stall_timeout is over" in result.text
    assert "Alarm clock" in result.text


# --------------------------------------------------------------------------------- a rank that fails before init()


@pytest.mark.long
@pytest.mark.parametrize(
    ("end", "told"),
    [
        (
            "hang()",
            r'MPI has not started within 10 s; stall_timeout is(?s:.)*session\.py", line \d+ in init\n(?s:.)*job\.py"',
        ),
        ("raise ValueError('no data')", "ValueError: no data"),
        # mpirun only minds a process that leaves when another one has begun to start MPI; else stall_timeout does
        ("sys.exit(0)", 'did not call "init" before exiting|MPI has not started within 10 s; stall_timeout is over'),
        (
            "from mpi4py import MPI; raise ValueError('no data')",
            r"in init\(\); not heard from yet: ranks \[1\]; stall_timeout=10 is over: aborting the job",
        ),
    ],
    ids=["hangs", "raises", "exits", "raises when MPI has started"],
)
def test_a_rank_that_fails_before_init_ends_the_job(tmp_path: Path, end: str, told: str) -> None:
    result = run(tmp_path, f"if first == 1:\n    {end}\nmpisign.init(**times)\n")
    assert re.search(told, result.text), result.text


# --------------------------------------------------------------------------------- who was stopped and continued


TRAINING = """
mpisign.init(stall_warning=1.0, stall_timeout=20.0)
parameter = torch.nn.Parameter(torch.zeros(100))
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))
for step in range(3):
    if step == 1 and mpisign.rank() == 1:
        print("rank 1 is slow:", os.getpid(), flush=True)
        time.sleep(5.0)
    parameter.grad = torch.ones(100)
    optimizer.step()
print("rank", mpisign.rank(), "has trained", flush=True)
"""


def train(tmp_path: Path, job_of: Callable[[Job], list[int]], seconds: float) -> Result:
    """Stop some processes of a job for so long, in the middle of a wait."""
    path = tmp_path / "job.py"
    path.write_text(PRELUDE + TRAINING)
    with started(3, path) as job:
        job.wait_for("rank 1 is slow: ", timeout=120.0)
        time.sleep(0.3)
        stopped = job_of(job)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in stopped:
                os.kill(process, number)
            if number == signal.SIGSTOP:
                time.sleep(seconds)
        return job.wait(timeout=120.0)


@pytest.mark.long
def test_a_job_that_was_stopped_and_continued_is_not_stalled(tmp_path: Path) -> None:
    result = train(tmp_path, Job.processes, seconds=22.0)
    assert result.returncode == 0, result.text
    assert result.text.count("has trained") == 3


@pytest.mark.long
def test_a_rank_that_was_stopped_for_less_than_the_timeout_goes_on(tmp_path: Path) -> None:
    def slow(job: Job) -> list[int]:
        return [int(re.findall(r"rank 1 is slow: (\d+)", job.text())[0])]

    result = train(tmp_path, slow, seconds=8.0)
    assert result.returncode == 0, result.text
    assert result.text.count("has trained") == 3
    assert re.search(
        r"rank 0 of 3 has waited [\d.]+ s in step 1, handshake; not heard from yet: ranks \[1\]", result.text
    )


SUSPENDED = """
print("a rank starts", flush=True)
if first == 1:
    time.sleep(1.0)  # the other waits in the start of MPI, and is stopped there
mpisign.init(stall_warning=None, stall_timeout=20.0)
parameter = torch.nn.Parameter(torch.zeros(100_000))
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))
print("rank trains", flush=True)
end = time.monotonic() + 3.0
while not any(mpisign.allgather_object(time.monotonic() > end)):
    parameter.grad = torch.ones(100_000)
    optimizer.step()
mpisign.shutdown()
print("rank has trained", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("launcher", [True, False], ids=["all of it", "the ranks alone"])
def test_a_job_that_a_scheduler_suspends_goes_on(tmp_path: Path, launcher: bool) -> None:
    """Again and again for longer than its limit: in the start of MPI, in training and at its end; one after another."""
    path = tmp_path / "job.py"
    path.write_text(PRELUDE + SUSPENDED)
    with started(2, path) as job:
        wait_until(lambda: job.text().count("a rank starts") == 2, patient(60.0))
        assert job.text().count("a rank starts") == 2, job.text()
        for pause in (0.6, 1.0, 0.2):
            time.sleep(pause)
            stopped = [process for process in job.processes() if launcher or process != job.process.pid]
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for process in stopped:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, number)
                    time.sleep(0.05)
                time.sleep(21.0 if number == signal.SIGSTOP else 0.0)
        result = job.wait(timeout=120.0)
    assert result.returncode == 0, result.text
    assert result.text.count("rank has trained") == 2
