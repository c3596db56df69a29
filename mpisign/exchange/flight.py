"""What a round has under way."""

from __future__ import annotations

from dataclasses import dataclass

from mpisign.exchange.decider import Deciding
from mpisign.exchange.header import Heard
from mpisign.layout import Bucket
from mpisign.watchdog import Pending

__all__ = ["Flight"]


@dataclass
class Flight:
    """A message on its way.

    Attributes:
        header: until it is here.
        pending: its phase; None when the last one is over.
        phase: the number of it.
        heard, deciding: what the headers say, and who decides accordingly, when they are here.
    """

    bucket: Bucket
    header: Pending | None
    pending: Pending | None
    phase: int = 0
    heard: Heard | None = None
    deciding: Deciding | None = None

    @property
    def said(self) -> Heard:
        """What the headers say, which are here."""
        assert self.heard is not None
        return self.heard
