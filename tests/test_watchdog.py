"""mpisign.watchdog at one rank: long waits say so, too long ones end the job, a stopped process has not waited."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

import mpisign
from mpisign.errors import ConsistencyError
from mpisign.presence import Presence
from mpisign.session import current
from mpisign.trace import Tracer
from mpisign.watchdog import Watchdog


@pytest.fixture
def outside() -> Iterator[None]:
    mpisign.shutdown()
    yield
    mpisign.shutdown()


class Late:
    """A request that is over when somebody says so."""

    def __init__(self) -> None:
        self.over = False

    def Test(self) -> bool:  # noqa: N802 - mpi4py's name
        return self.over


class Nobody:
    """A communicator of one rank to which nobody sends."""

    rank, size = 0, 1

    def Iprobe(self, *_: object) -> bool:  # noqa: N802
        return False


def watchdog(warning: float | None = None, timeout: float | None = None) -> tuple[Watchdog, Presence, Tracer]:
    tracer = Tracer()
    return Watchdog(tracer, warning, timeout), Presence(Nobody()), tracer


def run(program: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=timeout)


def test_a_long_wait_says_so_each_time_it_has_doubled(caplog: pytest.LogCaptureFixture) -> None:
    dog, presence, tracer = watchdog(warning=0.02)
    request, moments = Late(), [time.monotonic()]

    def note(record: logging.LogRecord) -> bool:
        moments.append(time.monotonic())
        request.over = len(moments) == 4  # the third warning
        return True

    logger = logging.getLogger("mpisign.watchdog")
    logger.addFilter(note)
    try:
        with tracer.stepping(17), tracer.span("phase 1", 3), caplog.at_level(logging.WARNING, "mpisign.watchdog"):
            dog.wait(dog.post(request), presence)
    finally:
        logger.removeFilter(note)
    for message in caplog.messages:
        assert re.match(r"rank 0 of 1 has waited 0\.\d+ s in step 17, bucket 3, phase 1; ", message)
    assert len(caplog.messages) == 3
    for moment, due in zip(moments[1:], (0.02, 0.04, 0.08), strict=True):
        assert moment - moments[0] >= due


def test_without_limits_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    dog, presence, _ = watchdog()
    request = Late()
    threading.Timer(0.2, lambda: setattr(request, "over", True)).start()
    dog.wait(dog.post(request), presence)
    assert caplog.messages == []


def test_too_long_a_wait_ends_the_job() -> None:
    ended = run(
        "import mpi4py.MPI, mpisign, numpy; from mpisign.session import current\n"
        "mpisign.init()\n"
        "session = current()\n"
        "session.watchdog.stall_timeout = 0.1\n"
        "with session.tracer.stepping(3), session.tracer.span('phase 1', 0):\n"
        "    session.wait(session.post(session.group.comm.Irecv(numpy.empty(1), source=0)))\n"
    )
    assert ended.returncode != 0
    assert re.search(
        r"rank 0 of 1 has waited [\d.]+ s in step 3, bucket 0, phase 1; .*stall_timeout=0\.1 is over", ended.stderr
    )
    assert "aborting the job" in ended.stderr


def test_a_call_that_blocks_is_watched_too() -> None:
    ended = run(
        "import mpi4py.MPI, mpisign, numpy; from mpisign.session import current\n"
        "mpisign.init(stall_warning=0.1)\n"
        "session = current()\n"
        "session.watchdog.stall_timeout = 0.5\n"
        "with session.watchdog.guard('a test'):\n"
        "    session.group.comm.Recv(numpy.empty(1), source=0)\n"
    )
    assert ended.returncode != 0
    assert re.search(r"rank 0 of 1 has waited [\d.]+ s in a test\n", ended.stderr)
    assert re.search(r"rank 0 of 1 has waited [\d.]+ s in a test; stall_timeout=0\.5 is over", ended.stderr)


def test_a_guard_ends_with_its_block() -> None:
    dog, _, _ = watchdog(warning=0.05)
    before = threading.active_count()
    with dog.guard("a test"):
        assert threading.active_count() == before + 1
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.long
@pytest.mark.parametrize("blocking", [False, True], ids=["nonblocking", "blocking"])
def test_a_stopped_process_has_not_waited(blocking: bool) -> None:
    """A scheduler may suspend a job for longer than its stall_timeout."""
    wait = (
        "with session.watchdog.guard('a test'):\n    session.group.comm.Recv(numpy.empty(1), source=0)\n"
        if blocking
        else "session.wait(session.post(session.group.comm.Irecv(numpy.empty(1), source=0)))\n"
    )
    program = (
        "import mpi4py.MPI, mpisign, numpy, threading; from mpisign.session import current\n"
        "mpisign.init(stall_warning=None, stall_timeout=5.0)\n"
        "session = current()\n"
        "threading.Timer(0.8, lambda: session.group.comm.Send(numpy.ones(1), dest=0)).start()\n"
        "print('waiting', flush=True)\n" + wait + "print('went on', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(6.0)
        os.kill(process.pid, signal.SIGCONT)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (0, "went on\n"), err


def test_the_start_of_mpi_is_watched() -> None:
    """Where Python itself stands still."""
    ended = run(
        "import sys, time\n"
        "from mpisign.trace import Tracer\n"
        "from mpisign.watchdog import Watchdog\n"
        "with Watchdog(Tracer(), None, 2.0).guard_start():\n"
        "    time.sleep(60)\n",
        timeout=120,
    )
    assert ended.returncode == -signal.SIGALRM
    assert "MPI has not started within 2 s; stall_timeout is over" in ended.stderr
    assert 'File "<string>", line 5 in <module>' in ended.stderr


def test_a_wait_in_which_the_process_was_stopped_lasts_as_much_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are neither stopped nor continued at one moment; but who never comes is told in any case."""
    now, ended = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 30.0 if 3.0 < now < 3.1 else 0.05

    monkeypatch.setattr("mpisign.watchdog.time.monotonic", lambda: now)
    monkeypatch.setattr("mpisign.watchdog.time.sleep", sleep)
    monkeypatch.setattr("mpisign.watchdog._yield", lambda: sleep(0.0))
    dog, presence, _ = watchdog(timeout=5.0)
    request = Late()

    def give_up(reason: str) -> None:
        ended.append(now)
        request.over = True

    monkeypatch.setattr(dog, "abort", give_up)
    monkeypatch.setattr(presence, "listen", lambda where: None)
    dog.wait(dog.post(request), presence)
    assert ended == [pytest.approx(30.0 + 2 * 5.0, abs=0.2)]


def test_what_was_posted_lives_until_it_is_waited_for() -> None:
    dog, presence, _ = watchdog()
    buffers = [np.zeros(3), np.zeros(3)]
    alive = [weakref.ref(buffer) for buffer in buffers]
    request = Late()
    pending = dog.post(request, *buffers)
    del buffers
    gc.collect()
    assert all(ref() is not None for ref in alive)
    request.over = True
    dog.wait(pending, presence)
    del pending
    gc.collect()
    assert all(ref() is None for ref in alive), "and no longer"


def test_what_was_posted_outlives_an_exception() -> None:
    """MPI may still write there."""
    dog, _, _ = watchdog()
    buffer = np.zeros(3)
    alive = weakref.ref(buffer)

    def interrupted(buffer: np.ndarray) -> None:
        with dog.unbroken("step 3"):
            dog.post(Late(), buffer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(buffer)
    del buffer
    gc.collect()
    assert alive() is not None
    assert dog.broken == "step 3"


def test_mpis_own_errors_are_named() -> None:
    from mpi4py import MPI

    class Failing:
        def Test(self) -> bool:  # noqa: N802
            raise MPI.Exception(MPI.ERR_TRUNCATE)

    dog, presence, tracer = watchdog()
    with (
        pytest.raises(ConsistencyError, match=r"rank 0 of 1: MPI has failed in barrier\(\): .*TRUNC"),
        tracer.span("barrier()"),
    ):
        dog.wait(dog.post(Failing()), presence)
    assert dog.broken == "barrier()"


@pytest.mark.usefixtures("outside")
def test_an_interrupted_rank_says_where_when_it_goes_on() -> None:
    mpisign.init()
    with pytest.raises(RuntimeError), current().watchdog.unbroken("step 3"):
        raise RuntimeError
    with pytest.raises(ConsistencyError, match="rank 0 was interrupted in step 3"):
        mpisign.barrier()
