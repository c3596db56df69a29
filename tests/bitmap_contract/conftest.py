"""One contract for all who do bit arithmetic: NumPy, C for each processor, the CUDA kernels, and these without a GPU.

Everything is compared with the oracle, bit for bit, in memory whose surroundings must neither be written nor matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract import DEVICES, NATIVE, Memory, Subject, make

from mpisign.bitmap import native


@pytest.fixture(params=["host", *NATIVE, *DEVICES])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    yield make(request.param, monkeypatch)
    if native.library() is not None:
        native.choose()


@pytest.fixture
def memory(backend: Subject) -> Iterator[Memory]:
    memory = Memory(backend.device)
    yield memory
    memory.check()
