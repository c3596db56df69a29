"""mpisign.preemption at one rank: which signals are noted, and which still end the process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mpirun import environment, started

import mpisign


@pytest.fixture
def former() -> Iterator[list[int]]:
    """Handlers of the user's own; the signals that they get."""
    got: list[int] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, lambda it, _: got.append(it))
    yield got
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("asked", "noted"),
    [((), {signal.SIGUSR1, signal.SIGTERM}), ((signal.SIGUSR2,), {signal.SIGUSR2})],
    ids=["default", "SIGUSR2"],
)
def test_signals_are_noted_until_shutdown(former: list[int], asked: tuple[int, ...], noted: set[int]) -> None:
    mpisign.stop_on_signal(*asked)
    assert not mpisign.stop_requested()
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.raise_signal(number)
    assert set(former) == {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM} - noted
    assert not mpisign.stop_requested(), "the ranks have not talked since"
    mpisign.barrier()
    assert mpisign.stop_requested()
    mpisign.barrier()
    assert mpisign.stop_requested()

    mpisign.shutdown()
    former.clear()
    for number in noted:
        signal.raise_signal(number)
    assert set(former) == noted
    mpisign.init()
    mpisign.barrier()
    assert not mpisign.stop_requested(), "another job"


@pytest.mark.usefixtures("world")
def test_asking_twice_keeps_the_former_handlers(former: list[int]) -> None:
    for _ in range(2):
        mpisign.stop_on_signal(signal.SIGUSR1)
    mpisign.shutdown()
    signal.raise_signal(signal.SIGUSR1)
    assert former == [signal.SIGUSR1]


@pytest.mark.usefixtures("world")
def test_handlers_set_later_are_left_alone(former: list[int]) -> None:
    mpisign.stop_on_signal()
    later: Any = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGTERM, later)
    mpisign.shutdown()
    assert signal.getsignal(signal.SIGTERM) is later


@pytest.mark.usefixtures("world")
def test_signals_that_cannot_be_caught() -> None:
    with pytest.raises(mpisign.OptionError, match=r"SIGKILL.* cannot be caught"):
        mpisign.stop_on_signal(signal.SIGKILL)


def test_before_init() -> None:
    for call in (mpisign.stop_on_signal, mpisign.stop_requested):
        with pytest.raises(mpisign.NotInitializedError, match=r"stop_\w+\(\) .*mpisign\.init\(\)"):
            call()


def test_the_requeue_code_is_no_other_program_s() -> None:
    """Not a signal's 128 + n, not SIGKILL's, and what the batch scripts know."""
    assert mpisign.REQUEUE_EXIT_CODE == 85


def run(program: str) -> subprocess.CompletedProcess[str]:
    prelude = "import os, signal, time, mpisign\nfrom mpisign import preemption\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(program)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)


def test_a_second_sigterm_ends_the_process() -> None:
    ended = run("""
        mpisign.init()
        mpisign.stop_on_signal()
        preemption.ECHO_SECONDS = 60.0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # passed on twice
        print("goes on", flush=True)
        preemption.ECHO_SECONDS = 0.01
        time.sleep(0.02)
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.02)
        signal.raise_signal(signal.SIGUSR1)  # may be sent as often as one likes
        print("still", flush=True)
        signal.raise_signal(signal.SIGTERM)
        print("not reached", flush=True)
    """)
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout == "goes on\nstill\n"


def test_a_second_interrupt_is_one() -> None:
    ended = run("""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
        mpisign.init(abort_on_exception=False)
        mpisign.stop_on_signal(signal.SIGINT)
        preemption.ECHO_SECONDS = 0.01
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGUSR1, 7)])
def test_forked_children_can_be_terminated_and_are_not_killed_by_warnings(number: int, code: int) -> None:
    """A DataLoader's workers inherit the handlers, and a queue sends its warning to all processes of a job."""
    ended = run(f"""
        mpisign.init()
        mpisign.stop_on_signal()
        child = os.fork()
        if child == 0:
            signal.raise_signal({int(number)})
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        mpisign.barrier()
        print(mpisign.stop_requested())
    """)
    assert ended.stdout == f"{code}\nFalse\n", ended.stderr


@pytest.mark.long
def test_in_the_middle_of_a_wait() -> None:
    """The handler runs while a rank waits for others, and does not end that."""
    ended = run("""
        import numpy, threading
        from mpisign.session import current
        mpisign.init()
        mpisign.stop_on_signal()
        session = current()
        def warn():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            session.group.comm.Send(numpy.ones(1), dest=0)
        threading.Timer(0.2, warn).start()
        session.wait(session.post(session.group.comm.Irecv(numpy.empty(1), source=0)))
        mpisign.barrier()
        print(mpisign.stop_requested())
    """)
    assert ended.stdout == "True\n", ended.stderr


@pytest.mark.long
def test_a_signal_to_mpirun_stops_all_ranks_at_one_step(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            import torch
            import mpisign

            mpisign.init()
            mpisign.stop_on_signal()
            parameter = torch.nn.Parameter(torch.zeros(5))
            optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0))
            print(f"rank {mpisign.rank()} trains", flush=True)
            step = 0
            while not mpisign.stop_requested():
                parameter.grad = torch.ones(5)
                optimizer.step()
                step += 1
            print(f"rank {mpisign.rank()} stops", *set(mpisign.allgather_object(step)), flush=True)
            sys.exit(mpisign.REQUEUE_EXIT_CODE)
        """)
    )
    with started(3, script) as job:
        for rank in range(3):
            job.wait_for(f"rank {rank} trains")
        job.process.send_signal(signal.SIGUSR1)
        result = job.wait(timeout=60.0)
        assert job.orphans() == []
    assert result.returncode == mpisign.REQUEUE_EXIT_CODE, result.text
    assert len(re.findall(r"rank \d stops \d+\n", result.text)) == 3, result.text
