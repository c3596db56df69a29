"""mpisign.dead_man: who was stopped for too long does nothing any more; who goes on, or is released, goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

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

LIMIT = 4.0
"""Seconds: longer than a busy machine leaves a process that wants to go on waiting."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a timer of Linux's")


def begin(seconds: float, go_on: str = "switch.put_off()", release: str = "") -> subprocess.Popen[str]:
    text = PROGRAM.format(limit=LIMIT, seconds=seconds, go_on=go_on, release=release)
    command = [sys.executable, "-c", text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def test_who_puts_it_off_or_is_released_goes_on() -> None:
    end = LIMIT + 1.5
    processes = begin(end), begin(end, go_on="pass", release="switch.release()")
    outcomes = [(*process.communicate(timeout=60.0), process.returncode) for process in processes]
    assert outcomes == [("goes on\n", "", 0)] * 2


def test_who_does_not_is_ended() -> None:
    process = begin(30.0, go_on="pass")
    said, errors = process.communicate(timeout=25.0)
    assert process.returncode == -signal.SIGRTMAX
    assert said == errors == ""


BUSY = f"""
import threading
def work(depth):
    if depth:
        return work(depth - 1)
    while True:
        time.sleep(0.001)
        if time.monotonic() - begun > {LIMIT + 0.5}:
            os.write(1, b"still here")
begun = time.monotonic()
for _ in range(12):
    threading.Thread(target=work, args=(80,), daemon=True).start()
"""


def test_no_thread_of_one_that_was_stopped_does_anything_more() -> None:
    """They would say that they are there, as their time was over when they were stopped."""
    process = begin(30.0, release="import os" + BUSY)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(LIMIT + 1.0)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGCONT)
    said, _ = process.communicate(timeout=25.0)
    assert (process.returncode, said) == (-signal.SIGRTMAX, "")
