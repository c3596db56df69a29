"""One contract for all who do bit arithmetic: the host, the CUDA kernels, and the same kernels without a GPU.

Everything is compared with the oracle, bit for bit, in memory whose surroundings must neither be written nor matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract import DEVICES, Memory, Subject, make


@pytest.fixture(params=["host", *DEVICES])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
    return make(request.param, monkeypatch)


@pytest.fixture
def memory(backend: Subject) -> Iterator[Memory]:
    memory = Memory(backend.device)
    yield memory
    memory.check()
