"""What tests here need, as marks that skip them where it is missing."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
import torch

__all__ = ["needs_gpu", "needs_mpi"]


def _has_mpi() -> bool:
    try:
        importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError):  # mpi4py can be installed where MPI itself is not
        return False
    return True


needs_gpu = pytest.mark.skipif(not (torch.cuda.is_available() and find_spec("cupy")), reason="needs a GPU and CuPy")
needs_mpi = pytest.mark.skipif(not _has_mpi(), reason="needs MPI")
