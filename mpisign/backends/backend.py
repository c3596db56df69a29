"""What a backend can do. All backends produce the same bits; ``tests/bitmap_contract`` holds them to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["WORD", "Backend", "Bitmaps", "Count", "First", "Flag", "RandomNumbers"]

WORD = torch.int32
"""The torch type of a word, as torch computes little on uint32. Its bits are those of :mod:`mpisign.bitmap.host`."""

Flag = bool | Tensor
"""A truth. On a GPU it may be a 0-d tensor that is still being computed: ``bool()`` waits for it."""

Count = int | Tensor
"""A number, in the same way."""

First = int | Tensor
"""The place of the first tensor in which something was found, or a larger number if it was in none; the same way."""


class Bitmaps(ABC):
    """Bitmaps of many tensors, of fixed sizes and places on the wire, packed and unpacked together.

    Gradients and outputs are given in the order of the bitmaps: dense tensors of their sizes, of any supported type, or
    None for those that are left out.
    """

    @abstractmethod
    def pack(self, values: Sequence[Tensor | None], *, zeros: str, key: int) -> First:
        """Pack the signs of each of ``values``. Returns the first that has a NaN or Inf."""

    @abstractmethod
    def pack_average(
        self,
        gradients: Sequence[Tensor | None],
        averages: Sequence[Tensor | None],
        betas: tuple[float, float],
        *,
        unscale: float,
        zeros: str,
        key: int,
        before: Sequence[Tensor | None] | None = None,
    ) -> First:
        """Take each gradient g, times ``unscale``, into its average m, and pack the signs of what is sent of them.

        That is ``betas[0] m + (1 - betas[0]) g``; then ``m <- betas[1] m + (1 - betas[1]) g``, unless g is NaN or Inf
        there. The arithmetic is that of ``torch.lerp``, in the average's precision.

        Args:
            averages: (n,) each, of the precision of a memory's state; changed in place.
            before: where the averages are read from instead, of the same form; not changed.

        Returns:
            The first in which something sent was NaN or Inf.
        """

    @abstractmethod
    def unpack(self, outs: Sequence[Tensor | None]) -> None:
        """Write +1 or -1 for each bit, and 0 where there is a second plane and it has a 0."""

    @abstractmethod
    def apply(
        self,
        parameters: Sequence[Tensor | None],
        rates: Sequence[float],
        decays: Sequence[float],
        moved: Sequence[Tensor | None],
    ) -> None:
        """Take a step of SGD on each parameter p: ``p <- p - rate (s + decay p)``, s as :meth:`unpack` would write it.

        The result is that of torch's own ``SGD(rate, weight_decay=decay)``; on the host, 16-bit parameters may differ
        in the last bit where there is a decay.

        Args:
            moved: for each parameter a bitmap with a 0 where s is 0, instead of its second plane; or None.
        """


class RandomNumbers(ABC):
    """Random numbers that follow from a key, in the order in which they are drawn."""

    @abstractmethod
    def normal(self, out: Tensor) -> Tensor:
        """Fill ``out`` (n,) with standard normal numbers."""

    @abstractmethod
    def uniform(self, out: Tensor, bound: float) -> Tensor:
        """Fill ``out`` (n,) with numbers from [-bound, bound]."""


class Backend(ABC):
    """Bit arithmetic, and the few other things that are done in another way on another device.

    Bitmaps are contiguous word tensors (k,), k = ceil(n/32). Values are flat and contiguous, (n,), unless said
    otherwise.

    Attributes:
        name: for reports.
        together: to start something takes longer than to do it, so that a whole model is encoded at once, and its
            messages leave one after the other.
        staged: MPI reads and writes other memory than this.
        cache: elements that several operations in turn should be given at once, so that what one has read, the next
            finds in a cache; a multiple of 32.
        rows: the same for operations on many vectors side by side.
        work: fp64 numbers that operations on whole vectors may have as scratch.
        sample: share of a vector from which a threshold is guessed, where that is quicker than to sort; else None.
    """

    name: str
    together = False
    staged = False
    cache: int
    rows: int
    work: int
    sample: float | None = None

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Load what is needed. Raises :class:`mpisign.GradientError`, saying what to install, if it is not there."""

    def blocks(self, elements: int) -> Iterator[slice]:
        """Slices of at most ``cache`` elements that cover ``elements``."""
        for lo in range(0, elements, self.cache):
            yield slice(lo, min(lo + self.cache, elements))

    # ------------------------------------------------------------------------------------------------ bits

    @abstractmethod
    def bitmaps(
        self, elements: Sequence[int], words: Sequence[Tensor], nonzeros: Sequence[Tensor | None], starts: Sequence[int]
    ) -> Bitmaps:
        """Bitmaps for tensors of so many ``elements``, in ``words`` and, if not None, ``nonzeros``: (k,) each.

        Args:
            starts: the global numbers of their first words, from which the zeros' coins are drawn.
        """

    @abstractmethod
    def pack(
        self,
        values: Tensor,
        words: Tensor,
        *,
        zeros: str = "coin",
        key: int = 0,
        first_word: int = 0,
        nonzero: Tensor | None = None,
    ) -> Flag:
        """:func:`mpisign.bitmap.host.pack` of ``values`` into ``words``. Returns whether all were finite."""

    @abstractmethod
    def unpack(self, words: Tensor, out: Tensor, *, nonzero: Tensor | None = None) -> None:
        """:func:`mpisign.bitmap.host.unpack` of ``words`` into ``out``: +1, -1, or 0 where ``nonzero`` is 0."""

    @abstractmethod
    def all_finite(self, values: Tensor) -> Flag:
        """Whether no element is NaN or Inf."""

    @abstractmethod
    def first_bad(self, values: Sequence[Tensor | None]) -> First:
        """The first of ``values``, dense and of any shape, with a NaN or Inf."""

    @abstractmethod
    def majority(
        self,
        ballots: Sequence[Tensor],
        out: Tensor,
        *,
        ties: str = "coin",
        key: int = 0,
        first_word: int = 0,
        nonzeros: Sequence[Tensor] | None = None,
        out_nonzero: Tensor | None = None,
        tied: Tensor | None = None,
    ) -> Count:
        """:func:`mpisign.bitmap.host.majority`.

        Args:
            tied: 0-d int64 on the device to which the ties are added where that saves a wait; 0 is returned then.
        """

    @abstractmethod
    def any_zero(self, words: Tensor) -> Flag:
        """Whether some word has no 1. Where that is a tensor, it holds until this is asked again."""

    @abstractmethod
    def zero_words(self, words: Tensor, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """By span from start to stop, whether some word in it has no 1."""

    @abstractmethod
    def count(self, ballots: Sequence[Tensor], planes: Tensor) -> None:
        """:func:`mpisign.bitmap.host.count`: how many of ``ballots`` have a 1, bit-sliced, into ``planes`` (p, k)."""

    @abstractmethod
    def add_counts(self, counts: Sequence[Tensor], planes: Tensor) -> None:
        """:func:`mpisign.bitmap.host.add_counts`: the sum of ``counts`` (p, k), into ``planes`` (q, k)."""

    @abstractmethod
    def decide_counts(
        self,
        yes: Tensor,
        voted: int | Tensor,
        out: Tensor,
        *,
        ties: str = "coin",
        key: int = 0,
        first_word: int = 0,
        out_nonzero: Tensor | None = None,
        tied: Tensor | None = None,
    ) -> Count:
        """:func:`mpisign.bitmap.host.decide_counts`; ``tied`` as for :meth:`majority`."""

    @abstractmethod
    def agreement(
        self,
        ballot: Tensor,
        decision: Tensor,
        elements: int,
        nonzero: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> tuple[Count, Count]:
        """:func:`mpisign.bitmap.host.agreement`: on how many elements both agree, and on how many both spoke."""

    # ------------------------------------------------------------------------------------------- other things

    @abstractmethod
    def zeros(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector that lives long and is read and written at every step."""

    @abstractmethod
    def random(self, key: int, device: torch.device, *, private: bool) -> RandomNumbers:
        """Random numbers of a key of 64 bits; of 128 bits where they are ``private``, as far as the device can."""

    @abstractmethod
    def number(self, value: Tensor) -> float | Tensor:
        """A 0-d fp32 value to compute with; on a GPU a 0-d fp64 tensor, so that nobody waits."""

    @abstractmethod
    def total(self, values: Tensor) -> float | Tensor:
        """The sum of ``values`` (n,), of which no fp32 value is too large."""

    @abstractmethod
    def magnitudes(self, values: Tensor) -> Tensor:
        """The sum of the magnitudes of each row of ``values`` (r, n), in fp64: (r,). Nobody waits for it."""

    @abstractmethod
    def norm(self, values: Sequence[Tensor]) -> Tensor:
        """The L2 norm of all ``values``, (n,) each and at least one, together: 0-d fp64. Nobody waits for it."""

    @abstractmethod
    def at_least(self, values: Tensor, threshold: Tensor) -> Tensor:
        """Where ``values`` have the magnitude ``threshold`` or more, or are NaN: int64 indices in order."""
