"""How the library's own work runs, whatever state a program has put torch into: nothing of it may change a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["plain"]


@contextmanager
def plain() -> Iterator[None]:
    """Inside, there is no autograd, no autocast and no inference mode. Also a decorator: ``@plain()``.

    What is made in inference mode can never be written to outside of it, as memories and buffers must be.
    """
    with torch.inference_mode(False), torch.no_grad():
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                yield
        else:
            yield
