"""What a step did and how long it took, for the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpisign.errors import MpisignError
from mpisign.plain import uncompiled

__all__ = ["StepReport"]


@dataclass(frozen=True)
class StepReport:
    """What the last ``synchronize()`` (or ``step()``) did. The same on every rank but for its times.

    It can be pickled and copied; only :meth:`agreement` needs the original, as it looks at the bitmaps.

    Attributes:
        step: number of the exchange, from 0.
        method: the method's name, e.g. ``"signum"``.
        exchange: how each bucket crossed MPI, e.g. ``("two_phase", "allgather")``.
        exchange_reason: why, for the largest message: what the cost model says of the links, or what was asked for.
        bytes_sent: bytes this rank handed to MPI for other ranks: messages and headers.
        header_bytes: how many of them were headers.
        voters: the ranks whose gradient was heard, be it of some parameters only.
        abstentions: rank -> why it has voted on nothing: ``"non-finite gradient"``, ``"inf found by GradScaler"``,
            ``"joined"`` (out of batches), ``"no gradient"``.
        ended_at: rank -> the parameter at which its ballot has ended, as there was a NaN or Inf: it has voted on those
            before it, in the reverse order of ``named_parameters``, in which backward reaches them, and abstained on it
            and all after it.
        skipped: nobody voted; parameters and optimizer state stay as they are, on every rank.
        waited_for: the rank that the others waited for in the last whole window of 50 steps, each by its own measure;
            None if that cost less than a hundredth of the time.
        waited_share: the share of the time that it has cost them, in the middle.
        ties: coordinates with as many votes for as against; None for a rule that has no ties.
        seconds: wall time of this rank in ``pack`` (memory and codec), ``exchange`` (MPI, with the wait for
            slower ranks), ``decide`` (count the votes) and ``unpack``, from the spans of the step.
        generation: how many groups this job has had before the one that has exchanged.
        members: the identities of its ranks, in the order of their numbers: their numbers in the job's first group.
        recovery_seconds: what recoveries from the death of ranks have taken since the last report.
        exposed_seconds: how long the step itself has waited for the network and for slower ranks, from its handshake
            on: what backward has not hidden. Without overlap it is ``seconds["exchange"]``.
    """

    step: int
    method: str
    exchange: tuple[str, ...]
    bytes_sent: int
    header_bytes: int
    voters: tuple[int, ...]
    abstentions: Mapping[int, str]
    ended_at: Mapping[int, str]
    skipped: bool
    ties: int | None
    seconds: Mapping[str, float]
    exposed_seconds: float = 0.0
    generation: int = 0
    members: tuple[int, ...] = ()
    recovery_seconds: float = 0.0
    exchange_reason: str = ""
    waited_for: int | None = None
    waited_share: float = 0.0
    _agreement: Callable[[], list[float]] | None = field(default=None, repr=False, compare=False)

    @uncompiled
    def agreement(self) -> list[float]:
        """The share of coordinates on which each rank's ballot agreed with the decision. **Collective.**

        Coordinates on which a rank abstained or the decision was "do not move" do not count; the share of a
        rank that did not vote is NaN. It costs a pass over the bitmaps, which live until the next step.

        Returns:
            M shares in [0, 1], by rank.

        Raises:
            MpisignError: the next step has overwritten the bitmaps, this is a copy, or the method casts no votes.
        """
        if self._agreement is None:
            raise MpisignError(
                f"there are no ballots to agree with: method {self.method!r} casts no votes, or this is a copy of the "
                f"report, and the ballots are where optimizer.report is"
            )
        return self._agreement()

    def as_dict(self) -> dict[str, float]:
        """Flat numbers for TensorBoard, W&B or a CSV file.

        ``step``, ``bytes_sent``, ``header_bytes``, ``voters``, ``abstentions`` and ``ended_at`` (how many),
        ``skipped`` (0 or 1), ``ties`` (NaN for a rule that has none), and ``seconds_pack``, ``seconds_exchange``,
        ``seconds_decide``, ``seconds_unpack``, ``exposed_seconds``, ``waited_for`` (-1 for nobody), ``waited_share``,
        ``generation``, ``members`` (how many) and ``recovery_seconds``. The keys are the same in every step.

        Example::

            for name, value in optimizer.report.as_dict().items():
                writer.add_scalar(f"mpisign/{name}", value, step)
        """
        return {
            "step": self.step,
            "bytes_sent": self.bytes_sent,
            "header_bytes": self.header_bytes,
            "voters": len(self.voters),
            "abstentions": len(self.abstentions),
            "ended_at": len(self.ended_at),
            "skipped": int(self.skipped),
            "ties": float("nan") if self.ties is None else self.ties,
            **{f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()},
            "exposed_seconds": self.exposed_seconds,
            "waited_for": -1 if self.waited_for is None else self.waited_for,
            "waited_share": self.waited_share,
            "generation": self.generation,
            "members": len(self.members),
            "recovery_seconds": self.recovery_seconds,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_agreement": None}
