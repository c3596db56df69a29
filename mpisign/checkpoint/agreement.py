"""What goes wrong on one rank is told to all, so that nobody waits for a rank that has given up."""

from __future__ import annotations

import platform
from typing import Any

from mpisign.errors import CheckpointError
from mpisign.world import World

__all__ = ["agree"]

NAMED = 3  # ranks in a message; when a file system fails, it fails for many


def agree(world: World, act: str, failed: str, error: Exception | None, mine: Any = None) -> list[Any]:
    """Every rank's ``mine``. **Collective.**

    Args:
        act: one of the channel's ``ACTS``.
        failed: what has not come about if a rank has an ``error``.

    Raises:
        CheckpointError: on every rank if any has an ``error``, naming it.
    """
    problem = error and f"rank {world.rank} on {platform.node()}: {type(error).__name__}: {error}"
    everyone = world.gather((problem, mine), act)
    problems = [problem for problem, _ in everyone if problem]
    if problems:
        more = f"; and {len(problems) - NAMED} ranks more" if len(problems) > NAMED else ""
        raise CheckpointError(f"{act}: {failed}: {'; '.join(problems[:NAMED])}{more}") from error
    return [theirs for _, theirs in everyone]
