"""Hosts with a network card each, on this machine: benchmarks/slow_network, for the tests that need it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpirun import environment

__all__ = ["left_behind", "namespaces", "needs_namespaces", "slow_network"]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def can_make_namespaces() -> bool:
    tools = all(shutil.which(tool) for tool in ("ip", "tc", "nsenter", "unshare"))
    if os.geteuid() != 0 or not tools:
        return False
    name = f"mpisign-test-{os.getpid()}"  # others look at the same time
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made


needs_namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason="needs root, iproute2, and the right to make network namespaces"
)


def namespaces() -> set[str]:
    """Those that are there, also of tests that run beside this one."""
    text = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in text.splitlines()}


def left_behind() -> set[str]:
    """Those of a slow_network that has ended: also a moment later, as some that run beside may just be tidying up."""
    found = without_owner()
    if found:
        time.sleep(3.0)
        found &= without_owner()
    return found


def without_owner() -> set[str]:
    owned = {name: re.match(r"mpisign(\d+)-", name) for name in namespaces()}
    return {name for name, its in owned.items() if its and not Path("/proc", its[1]).exists()}


def slow_network(*command: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(BENCHMARKS / "slow_network"), *command],
        env=environment({"PATH": path}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
