"""One pytest run on many ranks: rank 0 reports, and a failure anywhere ends the run everywhere, at once.

pytest-mpi marks and counts, but it lets the other ranks wait for ever for one that has failed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

STALL_SECONDS = 60.0
TEST_SECONDS = 120.0  # a rank that hangs outside the library's exchanges: show where, and end the run


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--with-mpi"):
        config.pluginmanager.register(OneRun(), "one-run")


class OneRun:
    """Makes the ranks' pytests behave as one."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD
        # pytest captures file descriptor 2 while a test runs; what precedes an abort must get out even then.
        self.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        aborts = logging.StreamHandler(self.stderr)
        aborts.setLevel(logging.CRITICAL)
        logging.getLogger("mpisign").addHandler(aborts)

    def abort(self, what: str, details: str) -> None:
        title = f" rank {self.comm.rank} of {self.comm.size}: {what} "
        sys.stdout.flush()
        print(f"\n{title:=^120}\n{details}\n{title:=^120}", file=self.stderr, flush=True)
        self.comm.Abort(1)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """What is marked as ``few`` hardly depends on the number of ranks."""
        for item in items:
            if item.get_closest_marker("few") and self.comm.size > 2:
                item.add_marker(pytest.mark.skip(reason="on 1 and 2 ranks"))

    def pytest_plugin_registered(self, plugin: object, plugin_name: str, manager: pytest.PytestPluginManager) -> None:
        if plugin_name == "terminalreporter" and self.comm.rank != 0:
            manager.unregister(plugin)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[Any]:
        faulthandler.dump_traceback_later(TEST_SECONDS, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(trylast=True)  # let rank 0's terminal write its F first
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            captured = "".join(f"\n{f' {name} ':-^120}\n{text}" for name, text in report.sections)
            self.abort(f"{report.nodeid} failed in {report.when}", report.longreprtext + captured)

    @pytest.hookimpl(trylast=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.abort(f"cannot collect {report.nodeid}", report.longreprtext)

    def pytest_internalerror(self, excrepr: object) -> None:
        self.abort("pytest itself failed", str(excrepr))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.abort("stopped", str(excinfo.getrepr(style="short")))


@pytest.fixture(autouse=True)
def job(request: pytest.FixtureRequest, comm: MPI.Comm) -> Iterator[None]:
    """Every test is a job of its own, over all ranks."""
    import mpisign

    node_of = range(comm.size) if "a_node_a_rank" in request.fixturenames else None
    mpisign.init(stall_timeout=STALL_SECONDS, node_of=node_of)
    yield
    mpisign.shutdown()


@pytest.fixture
def a_node_a_rank() -> None:
    """For tests in whose jobs each rank is on a node of its own, so that there is a network to hide: see job()."""


@pytest.fixture
def comm() -> MPI.Comm:
    """All ranks, on a channel that the library does not use: for oracles, and to compare ranks with."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def folder(comm: MPI.Comm, tmp_path: Path) -> Path:
    """One for all ranks."""
    shared: Path = comm.bcast(tmp_path)
    return shared


@pytest.fixture
def nothing_runs_and_memory_stays(folder: Path) -> Any:
    """No byte that was sent is executed, and no number makes a rank take much memory."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert not (folder / "executed").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "in KiB"
