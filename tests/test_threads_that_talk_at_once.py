"""mpisign.turns at one rank: who waits for another thread says so, and what threads may not do is an error."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading

import pytest

import mpisign
from mpisign.session import current, operation
from mpisign.trace import Tracer
from mpisign.turns import Turns
from mpisign.watchdog import Watchdog


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)


def test_who_waits_for_another_thread_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer()
    turn = Turns(Watchdog(tracer, 0.1, None))
    inside, leave, ended = threading.Event(), threading.Event(), []

    def stay() -> None:
        with turn("step()"), tracer.stepping(3), tracer.span("phase 1", 0), turn("barrier()"):
            inside.set()
            assert leave.wait(60.0)
            ended.append("step()")

    def note(record: logging.LogRecord) -> bool:
        leave.set()
        return True

    logger = logging.getLogger("mpisign.watchdog")
    logger.addFilter(note)
    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    try:
        assert inside.wait(60.0)
        with caplog.at_level(logging.WARNING, "mpisign.watchdog"), turn("barrier()"):
            ended.append("barrier()")
    finally:
        logger.removeFilter(note)
        thread.join()
    assert ended == ["step()", "barrier()"]
    assert re.fullmatch(
        r"rank 0 of 1 has waited [\d.]+ s in barrier\(\), for another thread of this process, which is in step 3, "
        r"bucket 0, phase 1",
        caplog.messages[0],
    )


def test_an_operation_that_does_not_end_ends_the_job() -> None:
    ended = run(
        "import threading, mpi4py.MPI, mpisign\n"
        "from mpisign.session import operation\n"
        "mpisign.init(stall_timeout=0.5)\n"
        "inside = threading.Event()\n"
        "def stay():\n"
        "    with operation('step()'):\n"
        "        inside.set()\n"
        "        threading.Event().wait()\n"
        "threading.Thread(target=stay, daemon=True).start()\n"
        "inside.wait()\n"
        "mpisign.barrier()\n"
    )
    assert ended.returncode != 0
    assert re.search(r"s in barrier\(\), for another thread of .*; stall_timeout=0.5 is over: aborting", ended.stderr)


@pytest.mark.usefixtures("world")
def test_who_comes_when_another_thread_has_left_the_job_is_told() -> None:
    session, told = current(), []

    def come() -> None:
        with pytest.raises(mpisign.NotInitializedError, match=r"barrier\(\): another thread has left the job"):
            mpisign.barrier()
        told.append(True)

    with session.turn("a test"):
        thread = threading.Thread(target=come, daemon=True)
        thread.start()
        while session.turn._lock.acquire(blocking=False):  # nested: this thread has it
            session.turn._lock.release()
            if thread_waits(thread):
                break
        mpisign.shutdown()
    thread.join(60.0)
    assert told == [True]


def thread_waits(thread: threading.Thread) -> bool:
    """Whether it is where one waits for the turn."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "wait_for_thread":
        frame = frame.f_back
    return frame is not None


@pytest.mark.usefixtures("world")
def test_an_operation_within_another_is_one() -> None:
    with operation("a test"), operation("a part of it"):
        mpisign.barrier()


@pytest.mark.long
@pytest.mark.parametrize(("level", "may"), [("single", False), ("funneled", False), ("serialized", True)])
def test_mpi_for_one_thread_is_for_one_thread(level: str, may: bool) -> None:
    ended = run(
        "import threading\n"
        "import mpi4py\n"
        f"mpi4py.rc.thread_level = {level!r}\n"
        "import mpisign\n"
        "mpisign.init()\n"
        "def talk():\n"
        "    try:\n"
        "        mpisign.barrier()\n"
        "        print('may')\n"
        "    except mpisign.LaunchError as error:\n"
        "        print(error)\n"
        "for act in (talk, mpisign.shutdown):\n"
        "    thread = threading.Thread(target=act)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "talk() if mpisign.is_initialized() else print('left')\n"
    )
    assert ended.returncode == 0, ended.stderr
    if may:
        assert ended.stdout == "may\nleft\n"
    else:
        assert re.fullmatch(r"barrier\(\) in another thread .*thread_level = 'multiple'.*\nmay\n", ended.stdout)
        assert "LaunchError: shutdown() in another thread" in ended.stderr
