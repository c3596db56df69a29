"""A directory of checkpoints is one job's: another that runs gets an error, one that comes after takes it over.

The jobs are real ones; owners on other hosts are notes as such a job would leave them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import names, steps
from mpirun import mpirun, started, wait_until
from resumable import Job

import mpisign
from mpisign import CheckpointError, checkpoint
from mpisign.checkpoint import owner
from mpisign.checkpoint.files import read_json, write_json
from mpisign.checkpoint.owner import OWNER, Owner

# Saves until the file "stop" is there, and says what it has met.
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import mpisign
from resumable import Job

mpisign.init()
folder, stop = Path(sys.argv[1]), Path(sys.argv[2])
job = Job()
if mpisign.checkpoint.newest(folder):
    print("goes on from", job.load(folder).step, flush=True)
step = job.step
while True:
    step += 1
    try:
        job.save(folder, step=step, asynchronous=step % 2 == 0)
        mpisign.checkpoint.wait()
    except mpisign.CheckpointError as error:
        print("rank", mpisign.rank(), "refused:", error, flush=True)
        break
    if mpisign.rank() == 0:
        print("saved", step, flush=True)
    if any(mpisign.allgather_object(stop.exists())):
        break
    time.sleep(0.01)
mpisign.shutdown()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "job.py"
    file.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.mark.long
def test_the_second_is_refused_and_the_first_loses_nothing(script: Path, folder: Path, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    with started(2, script, folder, stop) as first:
        first.wait_for("saved 3")
        second = mpirun(2, script, folder, tmp_path / "never")
        assert second.returncode == 0
        assert "goes on from" in second.text, "anybody may read"
        for rank in range(2):
            assert f"rank {rank} refused: checkpoint.save(): step" in second.text
        told = read_json(folder / OWNER)
        assert f"is the directory of another job, process {told['pid']} on {told['host']}, which runs" in second.text
        assert f"remove {folder / OWNER}" in second.text
        assert str(told["pid"]) in {str(pid) for pid in first.processes()}
        before = first.text().count("saved")
        wait_until(lambda: first.text().count("saved") > before + 3, 60.0)
        stop.touch()
        assert first.wait(60.0).returncode == 0
        assert "refused" not in first.text()
        assert first.text().count("saved") > before + 3
    assert len(steps(folder)) == 3, "and nothing half-written"
    assert not (folder / OWNER).exists(), "who ends leaves it"


@pytest.mark.long
def test_after_a_kill_the_next_takes_over_without_being_asked(script: Path, folder: Path, tmp_path: Path) -> None:
    with started(2, script, folder, tmp_path / "never") as first:
        first.wait_for("saved 2")
        for pid in first.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not first.orphans()
    assert (folder / OWNER).exists()
    stop = tmp_path / "stop"
    stop.touch()
    second = mpirun(2, script, folder, stop)
    assert second.returncode == 0
    assert "goes on from" in second.text
    assert "saved" in second.text
    assert "refused" not in second.text
    assert all(name.startswith("step-") for name in names(folder))
    assert not (folder / OWNER).exists()


# ------------------------------------------------------------------------------------------------------ who is gone


@pytest.fixture
def mine(world: None) -> Owner:
    return owner.me("mine")


def left(folder: Path, other: Owner, seconds_ago: float = 0.0) -> None:
    """A note of another job, touched so long ago."""
    write_json(folder / OWNER, vars(other))
    now = time.time()
    os.utime(folder / OWNER, (now - seconds_ago,) * 2)


def elsewhere(mine: Owner) -> Owner:
    return replace(mine, token="other", host="far-away", machine="another boot", pid=1, slurm="")


def test_a_process_that_runs(folder: Path, mine: Owner) -> None:
    with subprocess.Popen(["sleep", "100"]) as other:
        left(folder, replace(mine, token="other", pid=other.pid, started=owner._started(other.pid)), seconds_ago=1e6)
        with pytest.raises(
            CheckpointError, match=f"step 1 is not saved: rank 0 .*process {other.pid} on .*, which runs"
        ):
            Job().save(folder, step=1)
        assert names(folder) == []
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie by now
        Job().save(folder, step=1)
    assert steps(folder) == [1]


def test_its_number_may_be_another_process_by_now(folder: Path, mine: Owner) -> None:
    left(folder, replace(mine, token="other", pid=os.getppid(), started="12345"))
    Job().save(folder, step=1)


def test_an_earlier_job_of_this_process(folder: Path, mine: Owner) -> None:
    Job().save(folder, step=1)
    kept = (folder / OWNER).read_text()
    mpisign.shutdown()
    assert not (folder / OWNER).exists()
    (folder / OWNER).write_text(kept)
    mpisign.init()
    Job().save(folder, step=2)
    assert steps(folder) == [1, 2]


def test_on_another_host_its_silence_tells(folder: Path, mine: Owner) -> None:
    left(folder, elsewhere(mine), seconds_ago=owner.SILENT_SECONDS - 60)
    with pytest.raises(
        CheckpointError, match=r"process 1 on far-away, which gave a sign of life 24\d s ago \(after 300 s"
    ):
        Job().save(folder, step=1)
    left(folder, elsewhere(mine), seconds_ago=owner.SILENT_SECONDS + 60)
    Job().save(folder, step=1)
    assert read_json(folder / OWNER)["token"] == mpisign.session.current().token


def test_a_clock_that_is_wrong_does_not_matter(folder: Path, mine: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages are told by the file system alone."""
    for ago in (0, -1000):  # touched in the future
        left(folder, elsewhere(mine), seconds_ago=ago)
        with monkeypatch.context() as here:
            here.setattr(time, "time", lambda: 0.0)
            with pytest.raises(CheckpointError, match=r"sign of life \d s ago"):
                Job().save(folder, step=1)


def test_a_requeued_slurm_job(folder: Path, mine: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    for theirs in ("here 78", "there 77", ""):
        left(folder, replace(elsewhere(mine), slurm=theirs))
        with pytest.raises(CheckpointError, match=f"far-away{', SLURM job 7[78]' if theirs else ','}"):
            Job().save(folder, step=1)
    left(folder, replace(elsewhere(mine), slurm="here 77"))
    Job().save(folder, step=1)
    assert read_json(folder / OWNER)["slurm"] == "here 77"


def test_whoever_holds_it_gives_signs_of_life(folder: Path, mine: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_SECONDS", 0.1)
    Job().save(folder, step=1)
    os.utime(folder / OWNER, (0, 0))
    wait_until(lambda: os.stat(folder / OWNER).st_mtime > 0, 30.0)
    assert os.stat(folder / OWNER).st_mtime > 0
    left(folder, elsewhere(mine), seconds_ago=1000)
    time.sleep(0.5)
    assert time.time() - os.stat(folder / OWNER).st_mtime > 900, "and touches no other's"
    mpisign.shutdown()
    assert (folder / OWNER).exists(), "nor removes it"
    assert not [thread for thread in threading.enumerate() if thread.name == "mpisign owner" and thread.is_alive()][1:]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_who_has_lost_it_hears_of_it_and_removes_nothing(folder: Path, mine: Owner, asynchronous: bool) -> None:
    job = Job()
    job.save(folder, step=1)
    left(folder, elsewhere(mine))
    with pytest.raises(CheckpointError, match="is the directory of another job, process 1 on far-away"):
        job.save(folder, step=2, asynchronous=asynchronous)
    (folder / OWNER).unlink()
    job.save(folder, step=2)
    assert steps(folder) == [1, 2]


def test_a_directory_that_is_lost_during_a_save(folder: Path, mine: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpisign.checkpoint import saving

    write = saving.write_tensors

    def slowly(*args: object) -> object:
        left(folder, elsewhere(mine))
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_tensors", slowly)
    with pytest.raises(CheckpointError, match="has been taken over by another job, process 1 on far-away"):
        Job().save(folder, step=1)
    assert names(folder) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"token": 3}', b"\xff", b"[" * 100_000])
def test_a_note_that_cannot_be_read(folder: Path, mine: Owner, content: bytes) -> None:
    (folder / OWNER).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"an unknown host, which gave a sign of life .*remove .*owner\.json"):
        Job().save(folder, step=1)
    os.utime(folder / OWNER, (0, 0))
    Job().save(folder, step=1)


def test_a_pipe_in_its_place(folder: Path, mine: Owner) -> None:
    os.mkfifo(folder / OWNER)
    with pytest.raises(CheckpointError, match="no regular file"):
        Job().save(folder, step=1)


def test_reading_asks_nobody(folder: Path, mine: Owner) -> None:
    job = Job().train(1)
    job.save(folder)
    left(folder, elsewhere(mine))
    assert checkpoint.newest(folder) == folder / "step-00000001"
    assert job.load(folder).step == 1
    assert read_json(folder / OWNER)["host"] == "far-away"


# ---------------------------------------------------------------------------------------------------------- races


def test_of_many_who_claim_at_once_one_gets_it(folder: Path, mine: Owner) -> None:
    """Also where all find the note of a job that is gone. They are threads, and for each other jobs elsewhere."""
    got: list[Owner] = []
    begin = threading.Barrier(4)

    def one(number: int) -> None:
        it = replace(mine, token=f"job {number}", machine=f"machine {number}")
        begin.wait()
        try:
            owner.claim(folder, it)
        except CheckpointError:
            return
        got.append(it)

    for round_ in range(20):
        got.clear()
        if round_ % 2:
            left(folder, elsewhere(mine), seconds_ago=1000)
        else:
            (folder / OWNER).unlink(missing_ok=True)
        threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holds = json.loads((folder / OWNER).read_text())["token"]
        assert holds in [it.token for it in got]
        for it in got:
            if it.token != holds:
                with pytest.raises(CheckpointError, match="taken over"):
                    owner.check(folder, it.token)
        assert [path.name for path in folder.iterdir()] == [OWNER], "and nothing is left lying around"
    owner.release_all()


def test_a_file_system_without_links(folder: Path, mine: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    Job().save(folder, step=1)
    assert read_json(folder / OWNER)["pid"] == os.getpid()
    left(folder, elsewhere(mine))
    with pytest.raises(CheckpointError, match="far-away"):
        Job().save(folder, step=2)
