"""What tests of the integrations share: how a framework is imported here, and what is trained in it."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

__all__ = ["data", "declare_operators", "framework"]


def framework(name: str) -> ModuleType:
    """A framework's module; a test is skipped without it."""
    if find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs {name}: pip install '.[integrations]'")
    declare_operators()
    return importlib.import_module(name)


def declare_operators() -> None:
    """Frameworks import torchvision if it is there, which fails where its operators do not load.

    That is where torch was built for CPUs, and torchvision, as the package index has it, for CUDA.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")


def data(count: int = 48) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Examples of two classes that a line parts."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(count, 6, generator=random)
    return [(its, (its.sum() > 0).long()) for its in x]
