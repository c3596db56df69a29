"""Who does the bit arithmetic on one kind of memory. :func:`backend_for` is the one place that asks for the device.

A further backend is a file beside these and a line in :data:`BACKENDS`.
"""

from __future__ import annotations

import functools
import importlib

import torch

from mpisign.backends.backend import WORD, Backend, Bitmaps, Count, First, Flag, RandomNumbers

__all__ = ["BACKENDS", "WORD", "Backend", "Bitmaps", "Count", "First", "Flag", "RandomNumbers", "backend_for"]

BACKENDS = {"cpu": "mpisign.backends.native", "cuda": "mpisign.backends.cuda"}
"""By torch's name of a kind of device: the module whose ``BACKEND`` works there. It is imported when it is needed."""


@functools.cache
def _of(module: str) -> Backend:
    backend: Backend = importlib.import_module(module).BACKEND
    return backend


def backend_for(device: torch.device) -> Backend:
    """The backend that works where tensors of ``device`` lie."""
    return _of(BACKENDS[device.type])
