"""mpisign.checkpoint.merging: what a job of another number of ranks makes of the ranks' files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resumable import Job, assert_equal, spoil_generators

from mpisign import CheckpointError, checkpoint
from mpisign.checkpoint.merging import merged

pytestmark = pytest.mark.usefixtures("world")


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
