"""How long a training with faults has taken to find them and to be back, by what its ranks have written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from chaos_checks import Training, commits, history, resumed_from
from chaos_faults import DEADLY
from chaos_job import Outcome, Record, Struck

__all__ = ["Times", "redone", "samples_by", "times"]


@dataclass(frozen=True)
class Times:
    """Of one fault.

    Attributes:
        found: seconds from it to when the first rank has begun to recover; None where nobody had to, or could.
        back: seconds from it to when all that live have made a step again: after a SIGSTOP from its SIGCONT, after a
            stretch without MPI from the later of its end and the death, of two deaths from the second.
        on_time: a death that was to come in a recovery, or in a save, has come before that was over.
    """

    found: float | None
    back: float | None
    on_time: bool | None = None


def times(launch: Outcome, struck: Struck) -> Times:
    """Of a fault in this launch."""
    kind, deadly = struck.fault.kind, struck.fault.kind in DEADLY
    since = max(struck.at, struck.last)
    if kind == "stretch":
        over = (r["at"] for r in launch.records[struck.struck[-1]] if r["what"] == "order over" and r["at"] > struck.at)
        since = max(since, next(over, since))
    found, back = [], []
    for records in launch.records.values():
        at = _recovered(records, struck.victims) if deadly else _first(records, since)
        if at is None:
            continue
        step = next((r for r in records[at:] if r["what"] in ("commit", "end")), None)
        if step is None:
            continue
        back.append(step["at"] - since)
        if deadly:
            first = next(r for r in records if r["what"] == "change" and set(r["lost"]) & set(struck.victims))
            told = next((r for r in records[records.index(first) :] if "recovery" in r), None)
            found.append(first["at"] - (told["recovery"] if told else 0.0) - struck.at)
    return Times(
        max(0.0, min(found)) if found else None,
        max(0.0, *back) if back and kind not in ("slow", "nan") else None,
        _on_time(launch, struck),
    )


def _recovered(records: Sequence[Record], victims: Sequence[int]) -> int | None:
    """Where in its records a rank has heard of all the deaths."""
    missing = set(victims)
    for at, record in enumerate(records):
        if record["what"] == "change":
            missing -= set(record["lost"])
            if not missing:
                return at
    return None


def _first(records: Sequence[Record], since: float) -> int | None:
    """Where a rank that was there has gone on."""
    if not any(r["what"] == "begin" and r["at"] <= since for r in records):
        return None
    return next((at for at, r in enumerate(records) if r["what"] == "take" and r["at"] >= since), None)


def _on_time(launch: Outcome, struck: Struck) -> bool | None:
    if struck.fault.kind == "recovery":
        first = (
            record["at"]
            for records in launch.records.values()
            for record in records
            if record["what"] == "change" and struck.victims[0] in record["lost"]
        )
        return struck.last < min(first, default=float("inf"))
    if struck.fault.kind == "save":
        its = launch.records[struck.victims[0]]
        told = next(at for at, r in reversed(list(enumerate(its))) if r["what"] == "fault")
        return not any(r["what"] == "saved" and r["certain"] for r in its[told:])
    return None


def redone(training: Training) -> int:
    """Steps that were made again after a relaunch, as they were not in the checkpoint."""
    count = 0
    for before, after in itertools.pairwise(training.launches):
        done = max((r["step"] for its in before.records.values() for r in commits(its)), default=0)
        again = resumed_from(after)
        count += max(0, done - again) if again is not None and done else 0
    return count


def samples_by(training: Training, batch_size: int, until: float) -> int:
    """How many samples have counted in the end, of the steps up to a moment."""
    steps = (r for _, r in history(training) if r["what"] == "commit" and r["at"] <= until)
    return sum(batch_size * len(r["members"]) for r in steps)
