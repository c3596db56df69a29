"""What tests of the integrations share: how a framework is imported here, and what is trained in it."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

__all__ = ["data", "framework"]


def framework(name: str) -> ModuleType:
    """A framework's module; a test is skipped without it.

    Without torchvision, where its operators do not load: where torch was built for CPUs, and torchvision, as the
    package index has it, for CUDA.
    """
    if find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs {name}: pip install 'mpisign[integrations]'")
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for loaded in [its for its in sys.modules if its.partition(".")[0] == "torchvision"]:
            del sys.modules[loaded]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    return importlib.import_module(name)


def data(count: int = 48) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Examples of two classes that a line parts."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(count, 6, generator=random)
    return [(its, (its.sum() > 0).long()) for its in x]
