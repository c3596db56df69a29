"""mpisign.checkpoint at one rank: what is in the files, what is kept, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resumable import Job, assert_equal, spoil_generators

import mpisign
from mpisign import CheckpointError, OptionError, checkpoint
from mpisign.checkpoint.merging import merged

pytestmark = pytest.mark.usefixtures("world")

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def steps(path: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(path)]


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


# ---------------------------------------------------------------------------------------------- damage


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def missing(file: Path) -> None:
    file.unlink()


def misnumbered(file: Path) -> None:
    """Reads well, but is not what was saved."""
    file.write_bytes(re.sub(rb"(serial\D+)2", rb"\g<1>7", content := file.read_bytes()))
    assert file.read_bytes() != content


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.fixture
def two(tmp_path: Path) -> tuple[Job, dict[str, Any], Path]:
    """A job after two saves, what it was at the first, and where."""
    job = Job().train(2)
    job.save(tmp_path)
    first = job.everything()
    job.train(4).save(tmp_path)
    return job, first, tmp_path


Two = tuple[Job, dict[str, Any], Path]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *itertools.product(["manifest.json", "shared.pt", "rank-00000.pt"], [truncated, flipped, missing, emptied]),
        ("manifest.json", misnumbered),
    ],
    ids=lambda it: it if isinstance(it, str) else it.__name__,
)
def test_a_damaged_checkpoint_is_left_out(two: Two, harm: Callable[[Path], None], name: str) -> None:
    job, first, path = two
    good, bad = path / "step-00000002", path / "step-00000004"
    harm(bad / name)
    with pytest.warns(UserWarning, match=f"goes on from {good}, as {bad}.*") as warned:
        found = job.load(path)
    assert name in str(warned[0].message)
    assert Path(warned[0].filename).name == "resumable.py", "it should point at the line that loads"
    assert found.path == good
    assert_equal(job.everything(), first)

    before = job.train(5).everything()
    with pytest.raises(CheckpointError) as refused:
        job.load(bad)
    assert name in str(refused.value)
    assert f"load('{good}', ...)" in str(refused.value)
    assert_equal(job.everything(), before)
    job.save(path)
    assert job.load(path).step == 5, "what comes after it is loaded without a word"


def test_when_all_are_damaged(two: Two) -> None:
    job, _, path = two
    flipped(path / "step-00000002" / "shared.pt")
    truncated(path / "step-00000004" / "rank-00000.pt")
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*rank-00000\.pt has .*shared\.pt is damaged"):
        job.load(path)


def of_a_newer_version(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "version": 99}


def of_another_program(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [(of_a_newer_version, "has format 99 .*pip install --upgrade mpisign"), (of_another_program, "another program")],
)
def test_a_manifest_that_is_not_understood(
    two: Two, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    job, _, path = two
    file = path / "step-00000004" / "manifest.json"
    content = json.loads(file.read_text())
    del content["crc32"]
    file.unlink()
    checkpoint.files.write_json(file, change(content))
    with pytest.raises(CheckpointError, match=rf"manifest\.json .*{message}.*step-00000002"):
        job.load(path / "step-00000004")
    with pytest.warns(UserWarning, match=message):
        assert job.load(path).step == 2


def test_nothing_to_load(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    torch.save({}, tmp_path / "model.pt")
    for path, message in (
        (tmp_path / "nowhere", "no good checkpoint in .*nowhere: it is empty"),
        (tmp_path / "step-00000003", r"step-00000003 has no manifest\.json"),
        (tmp_path / "model.pt", r"is a file.*optimizer\.load_state_dict\(torch\.load\(.*model\.pt"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Job().load(path)


def test_of_another_model(tmp_path: Path) -> None:
    Job().train(1).save(tmp_path)
    other = torch.nn.Linear(3, 4)
    with pytest.raises(CheckpointError, match=r"(?s)step-00000001 does not fit: rank 0 .*Missing key"):
        checkpoint.load(tmp_path, model=other)


def test_of_a_job_without_a_scheduler(tmp_path: Path) -> None:
    job = Job().train(1)
    checkpoint.save(tmp_path, model=job.model, optimizer=job.optimizer, step=1)
    with pytest.raises(CheckpointError, match="saved without scheduler="):
        job.load(tmp_path)


class Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


def test_loading_executes_nothing(tmp_path: Path) -> None:
    """Even where sizes and checksums are right."""
    job = Job().train(1)
    saved = job.save(tmp_path / "checkpoints")
    content = torch.load(saved / "shared.pt", weights_only=True)
    (saved / "shared.pt").unlink()
    stamp = checkpoint.files.write_tensors(saved / "shared.pt", {**content, "extra": Malice(tmp_path / "hacked")})
    manifest = checkpoint.directory.Manifest.read(saved)
    manifest.files["shared.pt"] = stamp
    manifest.write(saved)
    with pytest.raises(CheckpointError, match=r"does not fit: rank 0 .*UnpicklingError"):
        job.load(tmp_path / "checkpoints")
    assert not (tmp_path / "hacked").exists()


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "extra", [np.float32(3), {"a": [np.zeros(3)]}, lambda: None, Path("here")], ids=["scalar", "array", "code", "path"]
)
def test_what_could_not_be_loaded_again_is_not_saved(two: Two, extra: Any) -> None:
    job, _, path = two
    with pytest.raises(CheckpointError, match=r"step 4 is not saved: rank 0 .*'extra' holds .*torch\.from_numpy"):
        job.save(path, extra=extra)
    assert steps(path) == [2, 4]
    assert job.load(path).step == 4


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


@contextmanager
def full_disk(room: int = 1000) -> Iterator[None]:
    """No file of this process may grow beyond ``room`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@MODES
def test_a_full_disk_leaves_the_earlier_checkpoints(two: Two, asynchronous: bool) -> None:
    job, _, path = two
    job.train(6)
    before = job.everything()
    message = r"step-00000006 is not saved, and earlier .*: rank 0 on \S+: OSError: .*File too large"

    def save() -> None:
        job.save(path, asynchronous=asynchronous)
        checkpoint.wait()

    with full_disk(), pytest.raises(CheckpointError, match=message):
        save()
    assert steps(path) == [2, 4], "and nothing half-written"
    assert_equal(job.everything(), before)
    save()
    assert steps(path) == [2, 4, 6]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step 0 is not saved: rank 0 .*FileExistsError"):
        Job().save(tmp_path / "file")


# ------------------------------------------------------------------------------------------ in the background


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


def test_its_error_comes_at_the_next_call(two: Two) -> None:
    job, _, path = two
    message = r"step-00000006 is not saved, .*File too large"
    for call in (lambda: job.save(path, step=7), lambda: job.load(path), mpisign.shutdown):
        with full_disk():
            job.save(path, step=6, asynchronous=True)
            writers()[0].join() if writers() else None
        with pytest.raises(CheckpointError, match=message):
            call()
        assert steps(path) == [2, 4]
    mpisign.init()
    Job().save(path, step=8)
    assert steps(path) == [2, 4, 8]


# ---------------------------------------------------------------------------------------- other numbers of ranks


def write_memories(path: Path, memories: list[dict[str, Any] | None]) -> list[Path]:
    files = [path / f"rank-{rank}.pt" for rank in range(len(memories))]
    for rank, (file, memory) in enumerate(zip(files, memories, strict=True)):
        about = None if memory is None else {"rank": rank, "size": len(files), "step": 7, "method": "signum", **memory}
        torch.save({"mpisign": about}, file)
    return files


def test_memories_are_averaged(tmp_path: Path) -> None:
    momenta = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    ours = [{"memory": {0: {"momentum": m[0]}, 2: {"momentum": m[1:]}}} for m in momenta]
    one = merged(write_memories(tmp_path, ours), rank=1, size=2)
    assert one is not None
    assert (one["rank"], one["size"], one["step"], one["method"]) == (1, 2, 7, "signum")
    expected = momenta.double().mean(0).float()
    assert_equal(one["memory"], {0: {"momentum": expected[0]}, 2: {"momentum": expected[1:]}})


def test_a_memory_that_has_not_begun_counts_as_zeros(tmp_path: Path) -> None:
    """The sum of what error feedback owes is what must not change."""
    ours = [{"memory": {0: {"residual": torch.tensor([3.0, -6.0])}}}, {"memory": {}}, {"memory": {0: {}}}]
    one = merged(write_memories(tmp_path, ours), rank=0, size=1)
    assert one is not None
    assert one["memory"][0]["residual"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_equal_memories_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.randn(999, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    one = merged(write_memories(tmp_path, [{"memory": {0: {"t": value}}}] * 11), rank=0, size=1)
    assert one is not None
    assert_equal(one["memory"][0]["t"], value)


def test_ranks_at_different_steps_are_refused(tmp_path: Path) -> None:
    files = write_memories(tmp_path, [{"memory": {}}, {"memory": {}, "step": 8}])
    with pytest.raises(CheckpointError, match=r"memory\['step'\] should be the same on all ranks and is 7, 8"):
        merged(files, rank=0, size=1)


def test_plain_optimizers_have_no_memory(tmp_path: Path) -> None:
    assert merged(write_memories(tmp_path, [None, None]), rank=0, size=1) is None


def test_a_file_of_a_job_of_another_size_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    """With another number of ranks there is a warning, the memory is carried over, and random numbers are fresh."""
    job = Job().train(3)
    saved = job.save(tmp_path)
    manifest = checkpoint.directory.Manifest.read(saved)
    shutil.copy(saved / "rank-00000.pt", saved / "rank-00001.pt")
    files = {**manifest.files, "rank-00001.pt": manifest.files["rank-00000.pt"]}
    checkpoint.directory.Manifest(3, 2, 1, files).write(saved)
    expected = job.everything()

    resumed = Job()
    with pytest.warns(UserWarning, match=re.escape("was saved by 2 ranks and this job has 1: every rank goes on with")):
        assert resumed.load(tmp_path).ranks == 2
    got = resumed.everything()
    assert_equal(got["optimizer"], expected["optimizer"])
    assert_equal(got["model"], expected["model"])
    assert got["python"] != expected["python"]
    assert not torch.equal(got["torch"], expected["torch"])
    assert not np.array_equal(got["numpy"]["state"]["key"], expected["numpy"]["state"]["key"])
    spoil_generators()
    with pytest.warns(UserWarning, match="saved by 2 ranks"):
        resumed.load(tmp_path)
    assert_equal(resumed.everything(), got, "the same fresh numbers each time")


def test_what_ranks_keep_of_what_they_decide_is_put_together(tmp_path: Path) -> None:
    """A server's error belongs to pieces of parameters, one rank a piece, which another job cuts elsewhere."""
    halves = [{"pieces": {0: {0: torch.ones(3)}}}, {"pieces": {0: {3: torch.full((2,), 2.0)}, 1: {0: torch.zeros(1)}}}]
    one = merged(write_memories(tmp_path, halves), rank=2, size=3)
    assert one is not None
    assert {place: {lo: t.tolist() for lo, t in of.items()} for place, of in one["pieces"].items()} == {
        0: {0: [1.0, 1.0, 1.0], 3: [2.0, 2.0]},
        1: {0: [0.0]},
    }
