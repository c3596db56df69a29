"""Every exception a user of mpisign can meet."""

from __future__ import annotations

__all__ = [
    "AlreadyInitializedError",
    "AuditError",
    "CheckpointError",
    "ConsistencyError",
    "DeadTrainingError",
    "GradientError",
    "LaunchError",
    "MembershipChangedError",
    "MpisignError",
    "NotInitializedError",
    "OptionError",
    "SynchronizationError",
]


class MpisignError(Exception):
    """Base of every error that mpisign raises.

    Attributes:
        told: it has happened on another rank, which has told this one.
    """

    told = False


class NotInitializedError(MpisignError, RuntimeError):
    """A function that needs the job's ranks was called before :func:`mpisign.init`, or in a process that is no rank."""


class AlreadyInitializedError(MpisignError, RuntimeError):
    """:func:`mpisign.init` was called twice without :func:`mpisign.shutdown` between."""


class LaunchError(MpisignError, RuntimeError):
    """MPI cannot run here: it is not installed, sees only this one of several processes, or this is no rank."""


class ConsistencyError(MpisignError, RuntimeError):
    """Ranks disagree: on the layout, the step, an option or a parameter's value."""


class AuditError(ConsistencyError):
    """A rank has published something else than the votes say: see ``audit`` of the optimizer.

    Raised on every rank; with ``init(on_failure="continue")`` only where the others cannot go on without it.

    Attributes:
        ranks: who has lied; of several, one.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class MembershipChangedError(MpisignError, RuntimeError):
    """Ranks have died in a call that cannot be repeated by itself, with ``init(on_failure="continue")``.

    All that are left get it. The job has its new members already: call it again.
    """


class DeadTrainingError(MpisignError, RuntimeError):
    """Nobody has voted for many steps, and ``init(on_dead_training="raise")`` ends such a job."""


class OptionError(MpisignError, ValueError):
    """An option has a value it cannot have, or a parameter is named wrongly."""


class GradientError(MpisignError, RuntimeError):
    """A parameter or gradient is of a kind that cannot be voted on."""


class SynchronizationError(MpisignError, RuntimeError):
    """``synchronize()`` and ``step()`` were called in an order that would corrupt training."""


class CheckpointError(MpisignError, RuntimeError):
    """A checkpoint cannot be written, is damaged, or does not fit the job that loads it."""
