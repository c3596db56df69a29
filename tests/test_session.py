"""mpisign.session at one rank: joining, leaving, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mpisign
from mpisign.session import current

NEEDS_RANKS = [
    mpisign.rank,
    mpisign.size,
    mpisign.local_rank,
    mpisign.local_size,
    mpisign.node_rank,
    mpisign.num_nodes,
    mpisign.device,
    mpisign.barrier,
]


@pytest.fixture
def outside() -> Iterator[None]:
    """Not in a job; whatever the test joins is left again."""
    hook = sys.excepthook
    mpisign.shutdown()
    yield
    mpisign.shutdown()
    assert sys.excepthook is hook


@pytest.mark.usefixtures("world")
def test_alone() -> None:
    assert mpisign.is_initialized()
    assert (mpisign.rank(), mpisign.size()) == (0, 1)
    assert (mpisign.local_rank(), mpisign.local_size()) == (0, 1)
    assert (mpisign.node_rank(), mpisign.num_nodes()) == (0, 1)
    mpisign.barrier()


@pytest.mark.usefixtures("world")
def test_device() -> None:
    expected = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    assert mpisign.device() == expected


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_ranks_share_the_devices_of_their_node(local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    group = current().group
    size = local_rank + 1
    current().replace(dataclasses.replace(group, rank=local_rank, size=size, node_of=(0,) * size))
    try:
        device = mpisign.device()
    finally:
        current().replace(group)
    assert device == torch.device("cuda", index)


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("before", [None, "0"])
def test_joining_does_not_start_cuda(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may still set CUDA_VISIBLE_DEVICES by its local rank, and fork."""
    variable, seen = "PYTORCH_NVML_BASED_CUDA_CHECK", []
    if before is None:
        monkeypatch.delenv(variable, raising=False)
    else:
        monkeypatch.setenv(variable, before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen.append(os.environ[variable])))
    mpisign.init()
    assert seen == ["1"]
    assert os.environ.get(variable) == before


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("function", NEEDS_RANKS, ids=lambda function: function.__name__)
def test_before_init(function: Any) -> None:
    assert not mpisign.is_initialized()
    with pytest.raises(mpisign.NotInitializedError, match=rf"{function.__name__}\(\) .*mpisign\.init\(\)"):
        function()


@pytest.mark.usefixtures("world")
def test_init_twice() -> None:
    with pytest.raises(mpisign.AlreadyInitializedError, match=r"rank 0: .*mpisign\.shutdown\(\)"):
        mpisign.init()
    assert mpisign.is_initialized()


@pytest.mark.usefixtures("outside")
def test_shutdown_and_init_again() -> None:
    mpisign.shutdown()  # harmless outside
    for _ in range(3):
        mpisign.init()
        assert mpisign.size() == 1
        mpisign.shutdown()
        assert not mpisign.is_initialized()


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("option", ["stall_warning", "stall_timeout"])
@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "60"])
def test_times_are_positive_numbers(option: str, seconds: Any) -> None:
    with pytest.raises(mpisign.OptionError, match=f"{option}=.* must be a positive number of seconds"):
        mpisign.init(**{option: seconds})
    assert not mpisign.is_initialized()


@pytest.mark.usefixtures("outside")
def test_never_is_a_time() -> None:
    mpisign.init(stall_warning=None, stall_timeout=None)
    mpisign.barrier()


@pytest.mark.usefixtures("outside")
def test_the_communicator_is_a_duplicate() -> None:
    """The library's messages must never meet the user's, and its shutdown not take the user's away."""
    from mpi4py import MPI

    for comm in (MPI.COMM_SELF, MPI.COMM_WORLD):
        mpisign.init(comm)
        duplicate = current().group.comm
        assert MPI.Comm.Compare(duplicate, comm) == MPI.CONGRUENT
        mpisign.shutdown()
        assert duplicate == MPI.COMM_NULL, "MPI has only so many communicators"
        comm.barrier()


@pytest.mark.usefixtures("outside")
def test_alone_although_the_launcher_started_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    from mpi4py import MPI

    copy = MPI.COMM_WORLD.Dup()
    for comm in (None, copy):
        with pytest.raises(mpisign.LaunchError, match=r"OMPI_COMM_WORLD_SIZE=4.*MPI"):
            mpisign.init(comm)
        assert not mpisign.is_initialized()
    copy.Free()

    mpisign.init(MPI.COMM_SELF)  # who names a communicator of one means it


@pytest.mark.usefixtures("outside")
def test_the_exception_hook_is_ours_only_while_in_the_job() -> None:
    before = sys.excepthook
    mpisign.init()
    assert sys.excepthook is not before
    mpisign.shutdown()
    assert sys.excepthook is before
    mpisign.init(abort_on_exception=False)
    assert sys.excepthook is before


@pytest.mark.usefixtures("outside")
def test_a_hook_set_later_is_left_alone() -> None:
    before = sys.excepthook

    def later(*_: object) -> None: ...

    mpisign.init()
    sys.excepthook = later
    mpisign.shutdown()
    assert sys.excepthook is later
    sys.excepthook = before


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("last_words", "code"), [("raise ValueError('seven')", 1), ("raise KeyboardInterrupt('seven')", 130)]
)
def test_an_exception_ends_the_job_with_its_traceback(last_words: str, code: int) -> None:
    ended = run(f"import mpisign; mpisign.init(); {last_words}")
    assert ended.returncode == code
    assert "Traceback" in ended.stderr
    assert "seven" in ended.stderr


def test_after_mpi_finalize_a_script_still_ends_well() -> None:
    ended = run("import mpisign; mpisign.init(); from mpi4py import MPI; MPI.Finalize()")
    assert ended.returncode == 0, ended.stderr


def test_a_forked_child_is_not_a_rank() -> None:
    """And a script may end without shutdown()."""
    ended = run(
        "import os, mpisign\n"
        "mpisign.init()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    mpisign.shutdown()\n"
        "    os._exit(0)  # mpi4py itself would finalize MPI a second time in a child that exits as usual\n"
        "os.waitpid(child, 0)\n"
        "mpisign.barrier()\n"
        "print('the parent goes on as', mpisign.rank(), 'of', mpisign.size())\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "the parent goes on as 0 of 1\n", "")


@pytest.mark.parametrize("comm", [None, "world"], ids=["null", "string"])
def test_only_a_communicator_will_do(comm: str | None) -> None:
    from mpi4py import MPI

    with pytest.raises(mpisign.OptionError, match="comm="):
        mpisign.init(MPI.COMM_NULL if comm is None else comm)
    assert not mpisign.is_initialized()
