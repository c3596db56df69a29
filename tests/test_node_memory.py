"""mpisign.exchange.node_memory: one rank's side of it here, and jobs in which there is too little room, or a kill."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from mpirun import environment, started

from mpisign.exchange import node_memory
from mpisign.exchange.node_memory import HEAD_BYTES, TOKEN_BYTES, NodeMemory
from mpisign.session import current

NAME = "mpisign-" + "5a" * TOKEN_BYTES


@pytest.fixture
def folder(world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm, in a job of one rank."""
    monkeypatch.setattr(node_memory, "FOLDER", tmp_path)
    return tmp_path


def refused(reason: str) -> str:
    memory, why = NodeMemory.share(current(), 100)
    assert memory is None
    assert reason in why
    return why


@pytest.mark.parametrize("size", [0, 1, 63, 64, 4097, 1 << 20])
def test_it_is_zero_and_has_no_name(folder: Path, size: int) -> None:
    memory, why = NodeMemory.share(current(), size)
    assert memory is not None
    assert why == ""
    assert memory.bytes.shape == (size,)
    assert not memory.bytes.any()
    assert memory.bytes.ctypes.data % 64 == 0
    memory.bytes[:] = 7
    assert list(folder.iterdir()) == []


def test_it_lives_as_long_as_its_bytes(folder: Path) -> None:
    memory, _ = NodeMemory.share(current(), 5000)
    assert memory is not None
    part = memory.bytes[10:20]
    del memory
    part[:] = 3
    assert part.tolist() == [3] * 10


def test_each_is_another(folder: Path) -> None:
    (one, _), (other, _) = (NodeMemory.share(current(), 100) for _ in range(2))
    assert one is not None
    assert other is not None
    one.bytes[:] = 1
    assert not other.bytes.any()


def test_its_space_is_claimed_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is an error here, and not a SIGBUS when it is written."""
    claimed: list[tuple[int, int]] = []
    claim = os.posix_fallocate

    def noted(handle: int, start: int, size: int) -> None:
        assert stat.S_IMODE(os.fstat(handle).st_mode) == 0o600
        assert os.fstat(handle).st_blocks <= 8, "a kill before would have left next to nothing"
        assert list(folder.iterdir()) == [], "and one from here on nothing"
        claimed.append((start, size))
        claim(handle, start, size)

    monkeypatch.setattr(os, "posix_fallocate", noted)
    NodeMemory.share(current(), 100_000)
    assert claimed == [(0, 100_000 + HEAD_BYTES)]


def test_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert refused("No space left on device").startswith("rank 0 gets no")
    assert list(folder.iterdir()) == []


def test_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_memory, "FOLDER", folder / "none")
    refused("No such file or directory")


def test_a_file_that_is_there_stays_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / NAME).write_bytes(b"somebody's")
    monkeypatch.setattr(node_memory.secrets, "token_hex", lambda size: "5a" * size)
    refused("File exists")
    assert (folder / NAME).read_bytes() == b"somebody's"


def written(path: Path, head: bytes, size: int) -> Path:
    path.write_bytes(head + bytes(size - len(head)))
    return path


def test_what_the_leader_has_made_is_opened(folder: Path) -> None:
    mapped = node_memory._open(written(folder / NAME, b"\x5a" * TOKEN_BYTES, 200), 200)
    np.frombuffer(mapped, np.uint8)[100] = 9
    assert (folder / NAME).read_bytes()[100] == 9


@pytest.mark.parametrize(
    ("head", "size", "said"), [(b"\x5b" * 16, 200, "is another file"), (b"\x5a" * 16, 100, "length")]
)
def test_another_file_under_that_name(folder: Path, head: bytes, size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        node_memory._open(written(folder / NAME, head, size), 200)


def test_names_that_lead_elsewhere(folder: Path) -> None:
    """Whatever a hostile leader says, only such a file in the folder is opened."""
    (folder / "in").mkdir()
    target = written(folder / "in" / NAME, b"\x5a" * TOKEN_BYTES, 200)
    (folder / NAME).symlink_to(target)
    os.mkfifo(folder / "pipe")
    for name in (f"in/{NAME}", f"../{folder.name}/in/{NAME}", str(target), NAME, "in", ".", "..", "", "pipe", "none"):
        with pytest.raises((OSError, ValueError)):
            node_memory._open(folder / name, 200)
    with pytest.raises(ValueError, match="null"):
        node_memory._open(folder / "a\0b", 200)


# ----------------------------------------------------------------------------------------------------- whole jobs

JOB = """
import logging, os, sys
from pathlib import Path
import torch
import mpisign
from mpisign.exchange import node_memory

logging.basicConfig(format="said: %(message)s")
if len(sys.argv) > 1:
    node_memory.FOLDER = Path(sys.argv[1])
mpisign.init(node_of=[0, 0, 1] if os.environ.get("TWO_NODES") else None)

def train(elements, exchange, steps):
    model = [torch.nn.Parameter(torch.zeros(elements // 4)) for _ in range(4)]
    sgd = torch.optim.SGD(model, lr=1.0)
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=mpisign.signsgd(), exchange=exchange)
    for step in range(steps):
        own = torch.Generator().manual_seed(100 * step + mpisign.rank())
        for parameter in model:
            parameter.grad = torch.randn(parameter.shape, generator=own)
        optimizer.step()
        if step == 3:  # what others wait for: everybody has taken three
            print("trains", flush=True)
    return torch.cat([parameter.detach() for parameter in model]), set(optimizer.report.exchange)
"""

FULL = """
room = os.statvfs("/dev/shm")
assert room.f_blocks * room.f_frsize == 1 << 20, "this test's own"
small, large = 1 << 16, 1 << 24
for elements, expected in ((small, "hierarchical"), (large, "two_phase"), (small, "two_phase")):
    ends = [train(elements, exchange, 3) for exchange in ("hierarchical", "two_phase", "allgather")]
    assert all(torch.equal(ends[0][0], its) for its, _ in ends), elements
    assert ends[0][1] == {expected}, (elements, ends[0][1])
assert not [name for name in os.listdir("/dev/shm") if name.startswith("mpisign-")]
print(f"rank {mpisign.rank()} is right", flush=True)
"""

ENDLESS = """
Path(sys.argv[1]).with_name(f"{mpisign.rank()}.pid").write_text(str(os.getpid()))
train(1 << 16, "hierarchical", 10**9)
"""


def script(tmp_path: Path, what: str) -> Path:
    (path := tmp_path / "train.py").write_text(textwrap.dedent(JOB + what))
    return path


def can_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not can_mount(), reason="needs the right to mount, in a namespace of its own")
@pytest.mark.parametrize("nodes", ["", "2"])
def test_a_small_dev_shm_is_no_sigbus(tmp_path: Path, nodes: str) -> None:
    """As in a container: 1 MB, of which MPI itself wants none."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    mpi = ["mpirun", "-n", "3", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "--mca", "btl", "tcp,self"]
    own_namespace = ["unshare", "--mount", "--fork", "--kill-child=SIGTERM", "sh", "-c", mount, "sh"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*own_namespace, *mpi, sys.executable, str(script(tmp_path, FULL))],
        env=environment({"PATH": path, "TWO_NODES": nodes}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("is right") == 3, done.stdout
    assert done.stdout.count("said: no exchange is hierarchical in this job") == 1, done.stdout
    assert "No space left on device" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 2])
def test_a_kill_leaves_no_file(tmp_path: Path, rank: int) -> None:
    """In the middle of training, of a leader."""
    (shared := tmp_path / "shared").mkdir()
    with started(3, script(tmp_path, ENDLESS), shared, env={"TWO_NODES": "1"}) as job:
        job.wait_for("trains")
        os.kill(int((tmp_path / f"{rank}.pid").read_text()), signal.SIGKILL)
        assert job.wait(60).returncode != 0
        assert not job.orphans()
    assert list(shared.iterdir()) == []
