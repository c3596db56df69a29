"""Training that has died: steps in which nobody votes, or a rank never does, one after the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mpisign.errors import DeadTrainingError
from mpisign.report import StepReport

__all__ = ["ON_DEAD_TRAINING", "Vigil"]

logger = logging.getLogger(__name__)

ON_DEAD_TRAINING = ("warn", "raise")

FIRST = 32  # steps: a loss scale may begin at 2 ** 32 and be halved in each
BAD = ("non-finite gradient", "inf found by GradScaler")

ADVICE = (
    "Go back to a checkpoint (mpisign.checkpoint.load), with a lower learning rate or clipping; "
    "torch.autograd.set_detect_anomaly(True) finds where NaN and Inf come from"
)

Named = Sequence[tuple[str, torch.Tensor]]


class Vigil:
    """Counts, for one optimizer, steps in a row in which nothing was applied, and those without a rank's whole vote."""

    def __init__(self) -> None:
        self._skipped = self._lost = 0
        self._silent: dict[int, int] = {}  # by identity, as a recovery changes numbers

    def heard(self, report: StepReport, rank: int, action: str, parameters: Named) -> None:
        """What a step has come to, the same on all ranks.

        Args:
            action: one of ``ON_DEAD_TRAINING``.

        Raises:
            DeadTrainingError: on all ranks, if nobody has voted for too long, and ``action`` is ``"raise"``.
        """
        if not (report.skipped or report.abstentions or report.ended_at):
            self._skipped = 0
            if self._silent:
                self._silent = {}
            return
        bad = {who for who, why in report.abstentions.items() if why in BAD} | set(report.ended_at)
        whose = [report.members[who] for who in sorted(bad)]
        self._silent = {one: self._silent.get(one, 0) + 1 for one in whose}
        self._skipped = self._skipped + 1 if report.skipped else 0
        if _is_due(self._skipped):
            why = "; ".join(f"rank {who}: {reason}" for who, reason in list(report.abstentions.items())[:4])
            more = "; ..." if len(report.abstentions) > 4 else ""
            text = (
                f"training has died: nobody has voted in {self._skipped} steps in a row, up to step {report.step} "
                f"({why}{more}), so nothing changes any more{_bad_parameter(parameters)}. {ADVICE}"
            )
            if action == "raise":
                raise DeadTrainingError(f"{text} (this is rank {rank})")
            if rank == 0:
                logger.warning("%s; init(on_dead_training='raise') ends the job instead", text)
        elif not report.skipped:
            due = [one for one, count in self._silent.items() if _is_due(count)]
            ranks = [report.members.index(one) for one in due]
            if due and rank in (0, *ranks):
                logger.warning(
                    "ranks %s have not cast a whole vote in %d steps in a row, up to step %d: their gradients have a "
                    "NaN or Inf each time, and training goes on without them. Look at their data and their machines",
                    ranks,
                    self._silent[due[0]],
                    report.step,
                )

    def stepped(self, done: bool, rank: int) -> None:
        """Whether this rank has made a step of its own, where models are exchanged and others hear nothing of it."""
        self._lost = 0 if done else self._lost + 1
        if _is_due(self._lost):
            logger.warning(
                "rank %d: the gradient has a NaN or Inf in %d steps in a row, and this rank only follows the others. "
                "Look at its data and its machine",
                rank,
                self._lost,
            )


def _is_due(count: int) -> bool:
    """At the first count, and each time it has doubled."""
    times, rest = divmod(count, FIRST)
    return times > 0 and rest == 0 and times & (times - 1) == 0


def _bad_parameter(parameters: Named) -> str:
    for name, parameter in parameters:
        if not bool(parameter.isfinite().all()):
            return f"; {name!r} itself has a NaN or Inf"
    return ""
