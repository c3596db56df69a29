"""What goes wrong on one rank is told to all, so that nobody waits for a rank that has given up."""

from __future__ import annotations

import platform
from typing import Any

from mpisign.encoding import Optional, fits, printable
from mpisign.errors import CheckpointError, ConsistencyError
from mpisign.session import Session

__all__ = ["agree"]

NAMED = 3  # ranks in a message; when a file system fails, it fails for many


def agree(
    session: Session, act: str, failed: str, error: Exception | None, mine: Any = None, schema: Any = object
) -> list[Any]:
    """Every rank's ``mine``, a plain value. **Collective.**

    Args:
        act: one of :data:`mpisign.talk.ACTS`.
        failed: what has not come about if a rank has an ``error``.
        schema: the shape of ``mine`` where there is no error, for :func:`mpisign.encoding.decode`.

    Raises:
        CheckpointError: on every rank if any has an ``error``, naming it.
        ConsistencyError: a rank has sent something of another shape.
    """
    problem = error and f"{platform.node()}: {type(error).__name__}: {error}"
    said = [problem, None if problem else mine]
    everyone = session.gather_values(said, (Optional(str), Optional(schema)), act)
    problems = [f"rank {rank} on {printable(problem)}" for rank, (problem, _) in enumerate(everyone) if problem]
    if problems:
        more = f"; and {len(problems) - NAMED} ranks more" if len(problems) > NAMED else ""
        raise CheckpointError(f"{act}: {failed}: {'; '.join(problems[:NAMED])}{more}") from error
    for rank, (_, theirs) in enumerate(everyone):
        if not fits(theirs, schema):
            raise ConsistencyError(
                f"{act}: rank {rank} has said nothing, and no problem either (this is rank {session.rank}): run the "
                f"same version of mpisign on every rank"
            )
    return [theirs for _, theirs in everyone]
