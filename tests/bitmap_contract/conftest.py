"""One contract for all who do bit arithmetic: the host, the CUDA kernels, and the same kernels without a GPU.

Everything is compared with the oracle, bit for bit, in memory whose surroundings must neither be written nor matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contract import DEVICES, Device, Host, Memory, make


@pytest.fixture(params=["host", *DEVICES])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host | Device:
    return make(request.param, monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """For what the host does not have."""
    return make(request.param, monkeypatch).device


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    names = request.fixturenames
    where = request.getfixturevalue("backend").device if "backend" in names else request.getfixturevalue("device")
    memory = Memory(where)
    yield memory
    memory.check()
