"""kill -9 of any rank at any moment, again and again: what is saved stays good, and training ends where it would have.

``MPISIGN_TEST_KILLS`` says how often (default 4).
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from mpirun import Job, started

pytestmark = pytest.mark.long

KILLS = int(os.environ.get("MPISIGN_TEST_KILLS", "4"))
RANKS = 3
HERE = Path(__file__).parent

SCRIPT = """
import os, sys
from pathlib import Path

sys.path.insert(0, sys.argv.pop())
import mpisign
from resumable import Job, digest

path, how, until = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
mpisign.init()
rank = mpisign.rank()
log = os.open(path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # what is written there outlives this process

def tell(text):
    os.write(log, (text + "\\n").encode())

tell(f"rank {rank} is process {os.getpid()}")
job = Job()
if how != "straight":
    if mpisign.checkpoint.newest(path / "checkpoints"):
        job.load(path / "checkpoints")
    if rank == 0:
        tell(f"goes on from {job.step}")
while job.step < until:
    job.train(job.step + 1)
    if how != "straight":
        job.save(path / "checkpoints", asynchronous=how == "background")
        if rank == 0:
            tell(f"has {job.step - (how == 'background')}")
print(f"rank {rank} ends with {digest(job.everything())}", flush=True)
"""


def numbers(path: Path, pattern: str) -> list[int]:
    text = (path / "log").read_text() if (path / "log").exists() else ""
    return [int(number) for number in re.findall(pattern, text)]


def kill_a_rank(job: Job, path: Path, dice: random.Random) -> None:
    """After as many saves as the dice say, none included: at any moment, or in the middle of the next save."""
    saves, moment, rank = dice.randrange(8), dice.choice([None, dice.uniform(0, 0.06)]), dice.randrange(RANKS)

    def due() -> bool:
        joined, saved = numbers(path, r"is process (\d+)"), numbers(path, r"has (\d+)")
        return len(joined) == RANKS and len(saved) >= saves and (moment is not None or saving(path))

    deadline = time.monotonic() + 90
    while not due():
        assert time.monotonic() < deadline, job.text()
        assert job.process.poll() is None, job.text()
        time.sleep(0.002)
    time.sleep(moment or 0)
    os.kill(numbers(path, rf"rank {rank} is process (\d+)")[0], signal.SIGKILL)


def saving(path: Path) -> bool:
    return any((path / "checkpoints").glob("*.tmp"))


@pytest.mark.timeout(600 + 60 * KILLS)
def test_killed_again_and_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    dice = random.Random(KILLS)
    had = torn = 0
    for kill in range(KILLS):
        (tmp_path / "log").unlink(missing_ok=True)
        how = ("at once", "background")[kill % 2]
        with started(RANKS, script, tmp_path, how, 10**9, HERE) as job:
            kill_a_rank(job, tmp_path, dice)
            result = job.wait(timeout=60.0)
            assert job.orphans() == []
        assert result.returncode != 0
        assert re.search(r"rank \d .*signal 9", result.text, re.DOTALL), result.text
        for start in numbers(tmp_path, r"goes on from (\d+)"):
            assert had <= start <= had + 2, "what it had, or what was written when it was killed"
            had = start
        had = max([had, *numbers(tmp_path, r"has (\d+)")])
        torn += saving(tmp_path)
    assert had > KILLS
    assert torn, "no save was interrupted, so this has shown little"

    ends = []
    for how in ("at once", "straight"):
        with started(RANKS, script, tmp_path, how, had + 5, HERE) as job:
            result = job.wait(timeout=240.0)
        assert result.returncode == 0, result.text
        ends.append(sorted(re.findall(r"rank \d ends with \w+", result.text)))
    assert len(ends[0]) == RANKS
    assert ends[0] == ends[1]
    assert not saving(tmp_path), "what was left half-written is gone"
