"""mpisign.checkpoint at one rank: saves in the background."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from checkpoints import full_disk, saved_twice, steps
from resumable import Job

import mpisign
from mpisign import CheckpointError, checkpoint

pytestmark = pytest.mark.usefixtures("world")


def test_a_background_save_completes_by_itself(tmp_path: Path) -> None:
    job = Job().train(3)
    job.save(tmp_path, asynchronous=True)
    deadline = time.monotonic() + 60
    while checkpoint.newest(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert steps(tmp_path) == [3]
    checkpoint.wait()
    checkpoint.wait()


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mpisign checkpoint"]


def test_its_copies_are_made_in_the_same_memory_each_time(tmp_path: Path) -> None:
    job = Job()
    places = []
    for step in (1, 2, 3):
        job.train(step).save(tmp_path, asynchronous=True)
        places.append([buffer.data_ptr() for buffer in checkpoint.saving._snapshot._buffers])
        checkpoint.wait()
        assert not writers()
    assert len(places[0]) > 10
    assert places[1] == places[2], "the first step has made the momentum"


def test_shutdown_completes_it(tmp_path: Path) -> None:
    Job().train(3).save(tmp_path, asynchronous=True)
    mpisign.shutdown()
    assert steps(tmp_path) == [3]
    assert not writers()


def test_its_error_comes_at_the_next_call(tmp_path: Path) -> None:
    job, _ = saved_twice(tmp_path)
    message = r"step-00000006 is not saved, .*File too large"
    for call in (lambda: job.save(tmp_path, step=7), lambda: job.load(tmp_path), mpisign.shutdown):
        with full_disk():
            job.save(tmp_path, step=6, asynchronous=True)
            for writer in writers():
                writer.join()
        with pytest.raises(CheckpointError, match=message):
            call()
        assert steps(tmp_path) == [2, 4]
    mpisign.init()
    Job().save(tmp_path, step=8)
    assert steps(tmp_path) == [2, 4, 8]
