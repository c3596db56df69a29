"""mpisign.dead_man: who was stopped for too long does nothing any more; who goes on, or is released, goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROGRAM = """\
import sys, time
from mpisign.dead_man import Switch
switch = Switch({limit})
switch.put_off()
{release}
print("begins", flush=True)
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    {go_on}
    time.sleep(0.01)
print("goes on", flush=True)
"""

LIMIT = 8.0
"""Seconds: longer than a busy machine leaves a process that wants to go on waiting."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a timer of Linux's")


@contextmanager
def begun(
    seconds: float, go_on: str = "switch.put_off()", release: str = "", limit: float = LIMIT
) -> Iterator[subprocess.Popen[str]]:
    text = PROGRAM.format(limit=limit, seconds=seconds, go_on=go_on, release=release)
    command = [sys.executable, "-c", text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
            yield process
        finally:
            process.kill()


@pytest.mark.long
def test_who_puts_it_off_or_is_released_goes_on() -> None:
    end = LIMIT + 1.5
    with begun(end) as one, begun(end, go_on="pass", release="switch.release()") as other:
        for process in (one, other):
            assert (*process.communicate(timeout=240.0), process.returncode) == ("goes on\n", "", 0)


def test_who_does_not_is_ended() -> None:
    with begun(30.0, go_on="pass", limit=LIMIT / 2) as process:
        said, errors = process.communicate(timeout=100.0)
        assert process.returncode == -signal.SIGRTMAX
        assert said == errors == ""


BUSY = f"""
import threading
def work(depth):
    if depth:
        return work(depth - 1)
    while True:
        time.sleep(0.001)
        if time.monotonic() - begun > {LIMIT + 2.5}:
            os.write(1, b"still here")
begun = time.monotonic()
for _ in range(12):
    threading.Thread(target=work, args=(80,), daemon=True).start()
"""


@pytest.mark.long
def test_no_thread_of_one_that_was_stopped_does_anything_more() -> None:
    """They would say that they are there, as their time was over when they were stopped."""
    with begun(30.0, release="import os" + BUSY) as process:
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(LIMIT + 3.0)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGCONT)
        said, _ = process.communicate(timeout=100.0)
        assert (process.returncode, said) == (-signal.SIGRTMAX, "")
