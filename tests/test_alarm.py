"""mpisign.alarm: what counts while Python stands still, and does not while the process is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpisign import alarm


@pytest.mark.long
@pytest.mark.parametrize("part", ["start", "end"])
def test_a_process_stopped_in_the_start_or_the_end_of_mpi_goes_on(part: str) -> None:
    """A scheduler stops the shell that counts too."""
    times = {
        "start": "with Watchdog(Tracer(), None, 6.0).guard_start():\n    stop()\n",
        "end": "from mpisign.alarm import ring\nshell = ring(6.0, '')\nstop()\nshell.kill()\nshell.wait()\n",
    }
    program = (
        "import time\n"
        "from mpisign.trace import Tracer\n"
        "from mpisign.watchdog import Watchdog\n"
        "def stop():\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(0.5)\n" + times[part] + "print('went on', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, process_group=0)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(8.0)
        os.killpg(process.pid, signal.SIGCONT)
        assert (process.communicate(timeout=240)[0], process.returncode) == ("went on\n", 0)
    finally:
        process.kill()
        process.communicate()


def test_who_uses_the_signal_keeps_it() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        assert alarm.ring(60.0, "") is None
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not show its processes")
def test_it_ends_with_its_process() -> None:
    """A shell that goes on would end whoever gets the number next."""
    program = "from mpisign.alarm import ring\nprint(ring(1000.0, '').pid, flush=True)\nimport os\nos._exit(0)\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{int(ended.stdout)}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # which its new parent need not have noticed
            return
        time.sleep(0.1)
    raise AssertionError("the shell still runs")
