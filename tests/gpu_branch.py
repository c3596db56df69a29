"""The library's way for CUDA tensors, taken by CPU tensors: the kernels run on the host, through the shim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import shim
import torch

from mpisign import backends
from mpisign.bitmap import kernels

needs_compiler = pytest.mark.skipif(not shim.COMPILER, reason="needs a C++ compiler")


@contextmanager
def gpu_branch(taken: bool = True) -> Iterator[list[str]]:
    """What is made and run inside does as on a GPU, except for streams and pinned memory; if not ``taken``, nothing.

    Yields:
        The names of the kernels launched so far.
    """
    launches: list[str] = []

    def launch(name: str, blocks: int, arguments: Sequence[Any], device: torch.device) -> None:
        launches.append(name)
        shim.launch(name, blocks, arguments, device)

    with pytest.MonkeyPatch.context() as patch:
        if taken:
            patch.setitem(backends.BACKENDS, "cpu", backends.BACKENDS["cuda"])
            patch.setattr(kernels, "launch", launch)
        yield launches
