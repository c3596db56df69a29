"""What tests here need: marks that skip them where it is missing, and the shim in a GPU's place."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler

__all__ = ["devices", "kernels_on", "needs_gpu", "needs_mpi"]


def _has_mpi() -> bool:
    try:
        importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError):  # mpi4py can be installed where MPI itself is not
        return False
    return True


needs_gpu = pytest.mark.skipif(not (torch.cuda.is_available() and find_spec("cupy")), reason="needs a GPU and CuPy")
devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="shim", marks=needs_compiler), pytest.param("cuda", marks=needs_gpu)]
)


def kernels_on(device: str) -> AbstractContextManager[Any]:
    """A GPU runs the kernels itself; for the CPU the shim does, and all of torch is the host's."""
    return gpu_branch() if device == "cpu" else nullcontext()


needs_mpi = pytest.mark.skipif(not _has_mpi(), reason="needs MPI")
