"""How the library's own work runs, whatever state a program has put torch into: nothing of it may change a result."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

__all__ = ["plain", "uncompiled"]

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def plain() -> Iterator[None]:
    """Inside, there is no autograd, no autocast and no inference mode. Also a decorator: ``@plain()``.

    What is made in inference mode can never be written to outside of it, as memories and buffers must be.
    """
    casts = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if not (casts or torch.is_grad_enabled() or torch.is_inference_mode_enabled()):  # as inside of backward
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        if casts:
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                yield
        else:
            yield


def uncompiled(function: F) -> F:
    """A function that is a graph break to ``torch.compile``, and runs as it is, with all that it calls.

    Dynamo is not imported for it: where nobody has, nothing is compiled.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        broken = getattr(function, "uncompiled", None)
        if broken is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **options)
            broken = function.uncompiled = torch.compiler.disable(function)  # type: ignore[attr-defined]
        return broken(*args, **options)

    return cast(F, call)
