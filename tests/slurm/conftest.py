"""One local SLURM for all tests here, and what they measured."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Job, Submit, missing

MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes."""
    absent = missing()
    if absent:
        pytest.skip(f"SLURM is not installed ({absent}): apt-get install slurm-wlm slurm-client munge libpmix-dev")
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled test run, too, ends its daemons
    with Cluster(4) as four:
        yield four
    signal.signal(signal.SIGTERM, former)


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Submit]:
    """``sbatch`` in a folder of the test's own; what still runs at its end is cancelled."""
    jobs = []

    def submit(*command: str | Path, **variables: str | Path) -> Job:
        jobs.append(cluster.submit(tmp_path, *command, **({"PYTHON": sys.executable} | variables)))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.cancel()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says a line at the end of the test run."""
    return request.config.stash.setdefault(MEASURED, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(MEASURED, []):
        terminalreporter.write_line(line)
