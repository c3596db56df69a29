"""mpisign.checkpoint at one rank: what is in the files, what is kept, and what is refused.

That resuming is exact is in test_resume.py, what spoiled files do in test_checkpoint_damage.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import MODES, names, saved_twice, steps
from resumable import Job, assert_equal

import mpisign
from mpisign import CheckpointError, OptionError, checkpoint

pytestmark = pytest.mark.usefixtures("world")

# ---------------------------------------------------------------------------------------------- resuming


def test_going_back_within_a_job(tmp_path: Path) -> None:
    job = Job().train(2)
    job.save(tmp_path)
    earlier = job.everything()
    job.train(4)
    job.load(tmp_path)
    assert_equal(job.everything(), earlier)


def test_what_is_loaded_outlives_the_files(tmp_path: Path) -> None:
    """Tensors are read lazily; none may stay in a file that is overwritten or removed."""
    job = Job(plain=True).train(2)
    saved = job.save(tmp_path, extra={"epoch": 0, "batch": 2, "weights": torch.arange(5.0)})
    resumed = Job(plain=True)
    found = resumed.load(tmp_path)
    for file in saved.glob("*.pt"):
        file.write_bytes(bytes(file.stat().st_size))
    assert_equal(found.extra["weights"], torch.arange(5.0))
    assert_equal(resumed.everything(), job.everything())


def test_a_scaler_goes_on(tmp_path: Path) -> None:
    job = Job().train(1)
    parts = {"model": job.model, "optimizer": job.optimizer}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    checkpoint.save(tmp_path, **parts, scaler=scaler, step=1)
    other = torch.amp.GradScaler("cpu")
    checkpoint.load(tmp_path, **parts, scaler=other)
    assert other.get_scale() == 8.0


def test_only_the_model(tmp_path: Path) -> None:
    job = Job().train(3)
    job.save(tmp_path)
    other = Job(seed=1)
    assert checkpoint.load(tmp_path, model=other.model).step == 3
    assert_equal(other.model.state_dict(), job.model.state_dict())
    assert other.optimizer.state_dict()["mpisign"]["step"] == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_schedules_of_every_kind_go_on(tmp_path: Path, asynchronous: bool) -> None:
    """MultiStepLR counts its milestones in a Counter, whose update() adds."""
    rates = []
    for resumed in (False, True):
        model = torch.nn.Linear(3, 2)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [2, 4, 4], gamma=0.1)
        if resumed:
            checkpoint.load(tmp_path, model=model, optimizer=sgd, scheduler=schedule)
        for at in range(1 if resumed else 0, 6):
            rates.append(sgd.param_groups[0]["lr"])
            sgd.step()
            schedule.step()
            if at == 0:
                parts = {"model": model, "optimizer": sgd, "scheduler": schedule}
                checkpoint.save(tmp_path, **parts, step=1, asynchronous=asynchronous)
        checkpoint.wait()
    assert rates[6:] == rates[1:6]
    assert len(set(rates)) == 3


# ------------------------------------------------------------------------------------------------ the files


def test_the_files_read_without_a_job(tmp_path: Path) -> None:
    job = Job().train(2)
    saved = job.save(tmp_path, extra={"epoch": 0, "batch": 2, "note": "as it was"})
    mpisign.shutdown()
    assert names(saved) == ["manifest.json", "rank-00000.pt", "shared.pt"]
    shared = torch.load(saved / "shared.pt", weights_only=True)
    assert_equal(shared["model"], job.model.state_dict())
    assert (shared["step"], shared["extra"]["note"]) == (2, "as it was")
    assert set(shared) == {"model", "optimizer", "scheduler", "scaler", "step", "extra"}
    assert "mpisign" not in shared["optimizer"], "a rank's own memory is in its own file"
    own = torch.load(saved / "rank-00000.pt", weights_only=True)
    assert_equal(own["mpisign"], job.optimizer.state_dict()["mpisign"])
    manifest = json.loads((saved / "manifest.json").read_text())
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == {
        name: (saved / name).stat().st_size for name in ("rank-00000.pt", "shared.pt")
    }


@MODES
def test_tied_tensors_are_written_once(tmp_path: Path, asynchronous: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Linear(200, 200))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = checkpoint.save(tmp_path, model=model, optimizer=optimizer, step=1, asynchronous=asynchronous)
    checkpoint.wait()
    assert 160_000 < (saved / "shared.pt").stat().st_size < 200_000


def test_the_newest_are_kept(tmp_path: Path) -> None:
    job = Job()
    for step in (1, 2, 3, 4):
        job.train(step).save(tmp_path, keep=2)
    assert steps(tmp_path) == [3, 4]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000004"
    job.train(5).save(tmp_path, keep=1)
    assert steps(tmp_path) == [5]


def test_after_going_back_the_last_saved_is_the_newest(tmp_path: Path) -> None:
    job = Job()
    for step in (2, 4, 6):
        job.train(step).save(tmp_path)
    job.load(tmp_path / "step-00000002")
    job.train(3).save(tmp_path)
    assert steps(tmp_path) == [3, 4, 6], "saved first, removed first"
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000003"
    assert Job().load(tmp_path).step == 3


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    job = Job().train(2)
    job.save(tmp_path, extra={"epoch": 0, "batch": 0})
    job.save(tmp_path, extra={"epoch": 0, "batch": 7})
    assert steps(tmp_path) == [2]
    job.load(tmp_path)
    assert job.batch == 7


def test_killed_while_replacing_a_step(tmp_path: Path) -> None:
    """Between two renames the old one has made way and the new one is not in its place."""
    job = Job().train(2)
    saved = job.save(tmp_path)
    saved.rename(saved.with_name(saved.name + ".old"))
    (tmp_path / "step-00000002.0123abcd.tmp").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000002.old"
    resumed = Job()
    assert resumed.load(tmp_path).step == 2
    assert_equal(resumed.everything(), job.everything())
    resumed.save(tmp_path, keep=1)
    assert steps(tmp_path) == [2]

    shutil.copytree(saved, saved.with_name(saved.name + ".old"))  # killed after both renames
    resumed.save(tmp_path, keep=1)
    assert steps(tmp_path) == [2]


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "step-00000007.0123abcd.tmp"
    leftover.mkdir()
    (leftover / "shared.pt").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    Job().train(1).save(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step-00000001"]


def test_there_is_no_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None
    (tmp_path / "step-00000007.0123abcd.tmp").mkdir()
    assert checkpoint.newest(tmp_path) is None


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "extra", [np.float32(3), {"a": [np.zeros(3)]}, lambda: None, Path("here")], ids=["scalar", "array", "code", "path"]
)
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, extra: Any) -> None:
    job, _ = saved_twice(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 4 is not saved: rank 0 .*'extra' holds .*torch\.from_numpy"):
        job.save(tmp_path, extra=extra)
    assert steps(tmp_path) == [2, 4]
    assert job.load(tmp_path).step == 4


@pytest.mark.parametrize(("option", "value"), [("step", -1), ("step", 1.0), ("keep", 0), ("keep", None)])
def test_impossible_options(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option}="):
        Job().save(tmp_path, **{option: value})


def test_before_init(tmp_path: Path) -> None:
    job = Job()
    mpisign.shutdown()
    for call in (job.save, job.load, checkpoint.newest):
        with pytest.raises(mpisign.NotInitializedError, match=r"checkpoint\.\w+\(\) .*mpisign\.init\(\)"):
            call(tmp_path)
    checkpoint.wait()  # harmless
