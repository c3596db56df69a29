"""Which rank the others wait for, and what that costs, by what each has waited itself.

All ranks come to the handshake of a step, and leave it when the last has come, who has not waited. So each measures how
long it is in there, and at the end of a window tells its share of the time, in bits of the handshake that are to spare:
there is no message for it, and no byte. No rank's clock is compared with another's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median
from time import perf_counter_ns
from typing import NamedTuple

__all__ = ["NOBODY", "WINDOW", "Late", "Lateness"]

logger = logging.getLogger(__name__)

WINDOW = 50  # steps
SCALE = 1 << 20  # in parts of which shares are told, so that they need 21 bits
NAMED = 0.01  # of the time: less is noise
TOLD = 0.05  # of the time, in two windows one after the other, is worth a line in the log


class Late(NamedTuple):
    """The rank that the others waited for in the last window, and the share of the time that this cost them."""

    rank: int | None = None
    share: float = 0.0


NOBODY = Late()


class Lateness:
    """Of one optimizer's ranks."""

    def __init__(self) -> None:
        self._began = 0  # the window, in nanoseconds; 0 before the first
        self._waited = self._steps = 0
        self._late = NOBODY
        self._of: tuple[int, ...] = ()  # among whom, by identities
        self._warned = False

    def says(self, step: int) -> int:
        """What this rank tells in the handshake of a step: at a window's end 1 + the share it has waited, else 0."""
        if step % WINDOW or self._steps < WINDOW // 2:
            return 0
        return 1 + min(SCALE, SCALE * self._waited // max(1, perf_counter_ns() - self._began))

    def waits(self, nanoseconds: int) -> None:
        """This rank was so long in a handshake. The first has no step before it."""
        if self._began:
            self._waited += nanoseconds
            self._steps += 1
        else:
            self._began = perf_counter_ns()

    def hears(self, step: int, told: Sequence[int], identities: tuple[int, ...], rank: int) -> None:
        """What all have told at a window's end, by rank; this one is ``rank``."""
        before, self._late = self.among(identities), _latest(told)
        self._began, self._waited, self._steps, self._of = perf_counter_ns(), 0, 0, identities
        late, share = self._late
        if self._warned or late is None or late != before.rank or min(share, before.share) < TOLD:
            return
        self._warned = True
        if rank in (0, late):
            logger.warning(
                "the others wait for rank %d: from step %d to %d that has cost %.0f %% of the time. Look for other "
                "processes on its machine, a slow disk or clock, fewer cores or workers than the others have, more "
                "data in its batches, and what it alone does between steps; `python -m mpisign doctor` shows how ranks "
                "are bound, mpisign.timeline() what they do",
                late,
                step - 2 * WINDOW,
                step - 1,
                50 * (share + before.share),
            )

    def among(self, identities: tuple[int, ...]) -> Late:
        """What the last window has come to, if these were its ranks."""
        return self._late if self._of == identities else NOBODY


def _latest(told: Sequence[int]) -> Late:
    """Who has waited least, and how much longer the others have, in the middle; those who tell 0 are left out."""
    shares = {rank: min(number - 1, SCALE) for rank, number in enumerate(told) if number > 0}
    if len(shares) < 2:
        return NOBODY
    late = min(shares, key=shares.__getitem__)
    share = (median(its for rank, its in shares.items() if rank != late) - shares[late]) / SCALE
    return Late(late, share) if share >= NAMED else NOBODY
