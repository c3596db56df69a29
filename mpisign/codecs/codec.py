"""The shape of a codec, to be subclassed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpisign.backends import Flag
from mpisign.policy import Policy, StepContext

__all__ = ["Codec", "Part", "Planes"]


Planes = torch.Tensor | Sequence[torch.Tensor]
"""The rows of a message: (planes, k), or as many (k,)."""


@dataclass(frozen=True)
class Part:
    """Elements ``lo .. hi`` of a parameter, and the ``message`` (planes, k) of ``codec`` in which they are sent."""

    codec: Codec
    lo: int
    hi: int
    message: Planes
    first_word: int


class Codec(ABC):
    """How n values of one parameter become k = ``length(n)`` items of a message, and back.

    All tensors lie on the parameter's device. Make it a frozen dataclass: ranks compare the ``repr``.

    Attributes:
        name: for errors.
        elementwise: whether it may be called on pieces of a parameter that start at a multiple of 32.
        ballots: items are words of sign bits, which can be voted on.
        plain: items are the values themselves, so that any rule can work on messages as they are.
        random: it draws random numbers, from the context alone.
    """

    name = "codec"
    elementwise = False
    ballots = False
    plain = False
    random = False

    def of(self, parameter: torch.Tensor) -> Codec:
        """The codec for this parameter, told by its shape: usually this one. All must have the same wire types."""
        return self

    def part(self, lo: int, hi: int) -> Codec:
        """The codec for elements ``lo .. hi`` of a parameter that is cut, ``lo`` a multiple of 32: usually this one."""
        return self

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type of a message item for a parameter of type ``dtype``."""
        return torch.int32

    @abstractmethod
    def length(self, elements: int) -> int:
        """Items that carry so many elements."""

    def planes(self, policy: Policy) -> int:
        """Rows of a message."""
        return 1

    @abstractmethod
    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        """Write flat ``values`` (n,) into ``message`` (planes, k). It allocates as little as it can.

        Args:
            first_word: number of the message's first item in the layout, which tells places apart.

        Returns:
            Whether all values were finite; on a GPU a 0-d tensor, so that nobody waits.
        """

    def encode_parts(self, values: torch.Tensor, parts: Sequence[Part], context: StepContext) -> Flag:
        """Encode all of a parameter, flat ``values`` (n,), in its parts. Returns whether all were finite."""
        finite: Flag = True
        for part in parts:
            its = values[part.lo : part.hi]
            finite = finite & part.codec.encode(its, part.message, context, part.first_word)
        return finite

    @abstractmethod
    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        """``out += alpha * decoded``, in place, for flat fp32 or fp64 ``out`` (n,): for error feedback and means."""

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        """Write ``decision`` (planes, k) into flat ``out`` (n,) of any supported float type.

        Args:
            context: its ``voters`` are the ranks that voted, on which the worth of counts depends.
        """
        out.zero_()
        self.add(decision, out, 1.0)
