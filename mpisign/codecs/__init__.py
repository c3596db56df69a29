"""What one message holds. One encoding a file.

A codec is any object of this shape (k = ``length(n)`` items of ``wire_dtype`` carry n elements):

- ``name``, ``elementwise`` (as for a memory: whether it may be called on pieces that start at a multiple of 32).
- ``wire_dtype(dtype)``: NumPy dtype of a message item for a parameter of that torch dtype.
- ``length(n)``: k.
- ``planes_up(policy)``: rows a message has; ``planes_down(policy)``: rows a decision has.
- ``encode(values, message, turn, first_word) -> bool``: write flat ``values`` (n,) into ``message``
  (planes_up, k); False if a value is not finite. ``first_word``: global position, see ``bitmap.coin``.
- ``decode(decision, out)``: write ``decision`` (planes_down, k) into the flat tensor ``out`` (n,).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from mpisign.codecs.dense import Dense
from mpisign.codecs.sign_bits import SignBits
from mpisign.policy import Policy, Turn

__all__ = ["Codec", "Dense", "SignBits"]


class Codec(Protocol):
    """The shape of a codec; see the package's docstring."""

    @property
    def name(self) -> str: ...
    @property
    def elementwise(self) -> bool: ...
    def wire_dtype(self, dtype: torch.dtype) -> np.dtype[np.generic]: ...
    def length(self, elements: int) -> int: ...
    def planes_up(self, policy: Policy) -> int: ...
    def planes_down(self, policy: Policy) -> int: ...
    def encode(self, values: torch.Tensor, message: npt.NDArray[np.generic], turn: Turn, first_word: int) -> bool: ...
    def decode(self, decision: npt.NDArray[np.generic], out: torch.Tensor) -> None: ...
