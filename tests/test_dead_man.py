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
switch = Switch(1.0)
switch.put_off()
{release}
print("begins", flush=True)
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    {go_on}
    time.sleep(0.01)
print("goes on", flush=True)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a timer of Linux's")


def begin(seconds: float, go_on: str = "switch.put_off()", release: str = "") -> subprocess.Popen[str]:
    text = PROGRAM.format(seconds=seconds, go_on=go_on, release=release)
    command = [sys.executable, "-c", text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def test_who_puts_it_off_or_is_released_goes_on() -> None:
    for process in (begin(2.0), begin(2.0, go_on="pass", release="switch.release()")):
        said, errors = process.communicate(timeout=60.0)
        assert (process.returncode, said, errors) == (0, "goes on\n", "")


def test_who_does_not_is_ended_and_shows_where_it_was() -> None:
    process = begin(30.0, go_on="pass")
    said, errors = process.communicate(timeout=25.0)
    assert process.returncode == -signal.SIGRTMAX
    assert said == ""
    assert "most recent call first" in errors


def test_who_was_stopped_does_nothing_any_more() -> None:
    """It would say that it goes on, as its time was over when it was stopped."""
    process = begin(1.0)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.0)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGCONT)
    said, _ = process.communicate(timeout=25.0)
    assert (process.returncode, said) == (-signal.SIGRTMAX, "")
