"""What a worker remembers between steps, in front of the codec. One idea a file.

A memory is any object of this shape:

- ``name``: its name in errors and checkpoints.
- ``fields``: the names of its state tensors, each like the parameter (fp32 for 16-bit parameters). An empty
  tuple means it keeps none, and the gradient may be passed in as it lies.
- ``elementwise``: whether element i of the result depends on element i of the inputs alone. If so it may be
  called on pieces of a parameter; if not it always sees the whole.
- ``__call__(gradient, state, scratch) -> Tensor``: take one flat gradient (n,) into ``state`` (a dict of flat
  tensors (n,), changed in place) and return what the codec shall send (n,): ``gradient``, a state tensor, or
  the first n elements of ``scratch`` (at least n) after writing into them. It allocates nothing.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mpisign.memory.lion import LionMomentum
from mpisign.memory.momentum import Momentum
from mpisign.memory.nothing import Nothing

__all__ = ["LionMomentum", "Memory", "Momentum", "Nothing"]


class Memory(Protocol):
    """The shape of a memory; see the package's docstring."""

    @property
    def name(self) -> str: ...
    @property
    def fields(self) -> tuple[str, ...]: ...
    @property
    def elementwise(self) -> bool: ...
    def __call__(
        self, gradient: torch.Tensor, state: dict[str, torch.Tensor], scratch: torch.Tensor
    ) -> torch.Tensor: ...
