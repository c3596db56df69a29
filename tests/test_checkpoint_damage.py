"""mpisign.checkpoint at one rank: files that are damaged, strange or malicious, and disks that are full."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODES, full_disk, saved_twice, steps
from resumable import Job, assert_equal

from mpisign import CheckpointError, checkpoint

pytestmark = pytest.mark.usefixtures("world")


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


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *itertools.product(["manifest.json", "shared.pt", "rank-00000.pt"], [truncated, flipped, missing, emptied]),
        ("manifest.json", misnumbered),
    ],
    ids=lambda it: it if isinstance(it, str) else it.__name__,
)
def test_a_damaged_checkpoint_is_left_out(tmp_path: Path, harm: Callable[[Path], None], name: str) -> None:
    job, first = saved_twice(tmp_path)
    good, bad = tmp_path / "step-00000002", tmp_path / "step-00000004"
    harm(bad / name)
    with pytest.warns(UserWarning, match=f"goes on from {good}, as {bad}.*") as warned:
        found = job.load(tmp_path)
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
    job.save(tmp_path)
    assert job.load(tmp_path).step == 5, "what comes after it is loaded without a word"


def test_when_all_are_damaged(tmp_path: Path) -> None:
    job, _ = saved_twice(tmp_path)
    flipped(tmp_path / "step-00000002" / "shared.pt")
    truncated(tmp_path / "step-00000004" / "rank-00000.pt")
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*rank-00000\.pt has .*shared\.pt is damaged"):
        job.load(tmp_path)


def of_a_newer_version(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "version": 99}


def of_another_program(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_a_newer_version, "has format 99 .*in the checkout of a newer one: pip install"),
        (of_another_program, "another program"),
    ],
)
def test_a_manifest_that_is_not_understood(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    job, _ = saved_twice(tmp_path)
    file = tmp_path / "step-00000004" / "manifest.json"
    content = json.loads(file.read_text())
    del content["crc32"]
    file.unlink()
    checkpoint.files.write_json(file, change(content))
    with pytest.raises(CheckpointError, match=rf"manifest\.json .*{message}.*step-00000002"):
        job.load(tmp_path / "step-00000004")
    with pytest.warns(UserWarning, match=message):
        assert job.load(tmp_path).step == 2


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


@MODES
def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: Path, asynchronous: bool) -> None:
    job, _ = saved_twice(tmp_path)
    job.train(6)
    before = job.everything()
    message = r"step-00000006 is not saved, and earlier .*: rank 0 on \S+: OSError: .*File too large"

    def save() -> None:
        job.save(tmp_path, asynchronous=asynchronous)
        checkpoint.wait()

    with full_disk(), pytest.raises(CheckpointError, match=message):
        save()
    assert steps(tmp_path) == [2, 4], "and nothing half-written"
    assert_equal(job.everything(), before)
    save()
    assert steps(tmp_path) == [2, 4, 6]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step 0 is not saved: rank 0 .*FileExistsError"):
        Job().save(tmp_path / "file")
