"""How a job has ended, by what its ranks have left behind (see :mod:`mpisign.exit_words`)."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpisign.exit_words import REQUEUE_EXIT_CODE

__all__ = ["Ending", "judge", "read"]

GOOD = (0, REQUEUE_EXIT_CODE)
ENDED = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
WHY = {"SIGKILL": " (out of memory?)", "SIGRTMAX": " (it did nothing for most of detect_links=)"}


@dataclass(frozen=True)
class Ending:
    """How a rank has ended.

    Attributes:
        code: its exit code, above 128 by a signal; None if it has not been heard of.
        generation, members: of the last group that it was in, by the launcher's ranks; nobody if it was in none.
        waits: it was a spare that has waited until the end, and knows nothing of the others.
    """

    code: int | None
    generation: int = -1
    members: frozenset[int] = frozenset()
    waits: bool = False


def read(folder: Path) -> dict[int, Ending]:
    """By rank, what is said of it. One of whom nothing is said has no code; without any word it is empty."""
    words: dict[int, int] = {}
    size = 0
    for path in folder.glob("*.exit"):
        numbers = path.read_text().split()
        if len(numbers) == 2 and path.stem.isdecimal() and all(number.isdecimal() for number in numbers):
            words[int(path.stem)] = int(numbers[0])
            size = max(size, int(numbers[1]))
    endings = {}
    for rank in range(size):
        try:
            its = json.loads((folder / f"{rank}.group").read_text())
            place = its["generation"], frozenset(its["members"]), bool(its.get("waits"))
        except (OSError, ValueError):  # it was in none, or died as it wrote
            place = -1, frozenset(), False
        endings[rank] = Ending(words.get(rank), *place)
    return endings


def judge(endings: Mapping[int, Ending], launcher: int, *, outlives: bool) -> tuple[int, str]:
    """The exit code of a job, and what to say of it, "" if all is well.

    All ranks must have ended with 0. Where a job may outlive its ranks (``outlives``), those must that were in the last
    group, and those that were in no group; at least one has to be in it. A rank that stops when it is asked to, with
    ``REQUEUE_EXIT_CODE``, has ended well, too, and makes it the job's code.

    Args:
        launcher: the launcher's own exit code. Where a job ends with its first rank, one that is not 0 is the job's;
            else a job that has failed has the first code of a rank that has failed.
    """
    survivors = _survivors(endings) if outlives else set(endings)
    codes = [endings[rank].code for rank in sorted(survivors)]
    if codes and all(code in GOOD for code in codes):
        good = max(code for code in codes if code is not None)
        if outlives or launcher in (0, good):
            lost = sorted(set(endings) - survivors)
            return good, f"the job has outlived {_named(endings, lost)}" if lost else ""
        return launcher, f"all ranks ended well, but the launcher with exit code {launcher}"
    if launcher == REQUEUE_EXIT_CODE and not outlives and not _by_themselves(endings, endings):
        return launcher, ""  # the first that stops makes mpirun end the others, who were about to
    if not endings:
        return launcher or 1, f"no rank has ended by itself; the launcher's exit code was {launcher}"
    failed = [rank for rank in sorted(survivors or endings) if endings[rank].code not in GOOD]
    killed = [rank for rank in failed if endings[rank].code == 128 + signal.SIGKILL]
    failed = _by_themselves(endings, failed) or killed or failed
    told = next((code for rank in failed if (code := endings[rank].code)), 1)
    return (0 if outlives else launcher) or told, f"failed: {_named(endings, failed)}"


def _survivors(endings: Mapping[int, Ending]) -> set[int]:
    """Those who were in the last group of one that has ended well, and those who were in none."""
    well = {rank: ending for rank, ending in endings.items() if ending.code in GOOD}
    voters = {rank: ending for rank, ending in well.items() if not ending.waits}
    found: set[int] = set()
    if voters:
        found = {rank for rank, ending in endings.items() if not ending.members or (rank in well and ending.waits)}
    for rank, ending in voters.items():
        if ending.members:
            its = (other for other in voters.values() if rank in other.members)
            found |= max(its, key=lambda other: other.generation).members
    return found & set(endings)


def _by_themselves(endings: Mapping[int, Ending], ranks: Iterable[int]) -> list[int]:
    """Of these, those who have ended badly, and not as the launcher ends ranks when one has failed."""
    return [rank for rank in sorted(ranks) if endings[rank].code not in (*GOOD, *ENDED, None)]


def _named(endings: Mapping[int, Ending], ranks: Sequence[int]) -> str:
    """For a message: how these ranks ended, those of one kind together."""
    kinds: dict[str, list[int]] = {}
    for rank in ranks:
        kinds.setdefault(_how(endings[rank].code), []).append(rank)
    return "; ".join(
        f"rank{'s' if len(its) > 1 else ''} {', '.join(map(str, its))}, {how}" for how, its in kinds.items()
    )


def _how(code: int | None) -> str:
    if code is None:
        return "not heard of"
    if code <= 128:
        return f"which ended with exit code {code}"
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return f"which ended with exit code {code}"
    return f"ended by {name}{WHY.get(name, '')}"
