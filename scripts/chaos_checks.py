"""What must be true of a training with faults, by what its ranks have written.

Ranks that have died may have made one exchange more than the others know of, which then does not count: of each only
what comes before its last is compared.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from chaos_faults import DEADLY
from chaos_job import Outcome, Record, Struck

from mpisign.membership import QUORUM_EXIT_CODE, has_quorum

__all__ = ["CHECKS", "Problem", "Training", "check", "commits", "final_loss", "history", "resumed_from"]

CHECKS = {
    "hang": "whatever must happen happens in bounded time",
    "left": "no process is left, no file in shared memory and no temporary one",
    "steps": "no step is lost, and none is made twice; nor is an exchange",
    "replicas": "after every exchange all replicas have the same bits, and reports say the same",
    "members": "only the dead are counted out, and who is in an exchange has begun its step",
    "moved": "a vote moves parameters once",
    "deals": "all ranks deal samples anew at the same step",
    "samples": "in every epoch each sample counts once",
    "abstained": "who has NaN abstains, and nobody else",
    "resumed": "a relaunch goes on from the last checkpoint, to the same bits",
    "end": "it ends well on all that live, with one model, and stops only where too few are left",
    "loss": "the loss at the end is within the spread of seeds",
}


class Problem(NamedTuple):
    """What is wrong: the name of the check, and what it has found."""

    check: str
    text: str


TOLERANCE = 1e-3  # of how far a parameter moves, which is rounded
COMPARED = ("exchange", "generation", "members", "crc", "skipped")


@dataclass
class Training:
    """From its first launch to its end.

    Attributes:
        seed: repeats it.
        launches: the first, and each that went on from a checkpoint.
        struck: the faults.
        samples: in an epoch.
        step_size: see :class:`chaos_training.Variation`.
    """

    seed: int
    variation: str
    ranks: int
    asynchronous: bool
    samples: int
    step_size: float | None
    launches: list[Outcome] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)

    def add(self, launch: Outcome) -> None:
        """Another launch has come to its end."""
        if self.launches:
            self.launches[-1].kept = resumed_from(launch) or 0
        self.launches.append(launch)


def check(training: Training) -> list[Problem]:
    """All that is wrong, but for the loss."""
    found: list[tuple[str, int, Iterable[str]]] = []
    for launch in training.launches:
        found.append(("hang", launch.number, [launch.hang] if launch.hang else []))
        found.append(("left", launch.number, launch.left))
        for name, one in _OF_A_LAUNCH.items():
            found.append((name, launch.number, one(training, launch)))
    for before, after in itertools.pairwise(training.launches):
        found.append(("resumed", after.number, _resumed(before, after)))
    for struck in training.struck:
        found.append(("abstained", struck.launch, _abstained(training, struck)))
    problems = [Problem(name, f"launch {number}: {text}") for name, number, texts in found for text in texts]
    return problems + [Problem("samples", text) for text in _samples(training)]


def commits(records: Sequence[Record]) -> list[Record]:
    """A rank's steps, in order."""
    return [record for record in records if record["what"] == "commit"]


def counting(launch: Outcome, rank: int) -> list[Record]:
    """Those steps of a rank that the others must know of."""
    its = commits(launch.records[rank])
    if rank in launch.killed:
        last = max((at for at, record in enumerate(its) if "exchange" in record), default=len(its))
        return its[: last + (last < len(its) and its[last]["step"] <= launch.kept)]
    return its


def guide(launch: Outcome, ranks: Iterable[int] | None = None) -> int:
    """The rank, of these, that knows of the last steps that have counted, and most of those before."""

    def knows(rank: int) -> tuple[int, int, bool, int]:
        its = counting(launch, rank)
        return (its[-1]["step"] if its else -1), len(its), rank not in launch.killed, -rank

    return max(launch.records if ranks is None else ranks, key=knows)


def begin(launch: Outcome, rank: int) -> Record | None:
    """Where a rank has begun to train, if it has."""
    return next((record for record in launch.records[rank] if record["what"] == "begin"), None)


def story(launch: Outcome, ranks: Sequence[int] | None = None) -> list[Record]:
    """All that has counted: what the guide has written, and before it has stepped in, those who were there then."""
    kept = guide(launch, ranks)
    mine = launch.records[kept]
    if kept in launch.killed:
        mine = _until(mine, max((record["step"] for record in counting(launch, kept)), default=0))
    first = begin(launch, kept)
    if first is None or not first["came"]:
        return list(mine)
    at = first["step"]
    others = [its for its in launch.records if (was := begin(launch, its)) and (was["step"], was["came"]) < (at, True)]
    return _until(story(launch, others), at, ("commit", "epoch")) + mine


def _until(records: Sequence[Record], step: int, ends: Sequence[str] = ("commit",)) -> list[Record]:
    """What was written until a step was over: of the step itself only what is named ``ends``."""
    return [r for r in records if r.get("step", 0) < step or (r["what"] in ends and r["step"] == step)]


# ------------------------------------------------------------------------------------------------ of a launch


def _steps(training: Training, launch: Outcome) -> Iterator[str]:
    """No step is lost, and none is made twice."""
    for rank, records in launch.records.items():
        begun = [record["step"] for record in records if record["what"] == "begin"]
        if len(begun) != 1:
            if begun or (launch.code == 0 and rank < launch.ranks):
                yield f"rank {rank} has begun {len(begun)} times"
            continue
        for kind in ("take", "commit"):
            steps = [begun[0], *(record["step"] for record in records if record["what"] == kind)]
            for before, after in itertools.pairwise(steps):
                if after != before + 1:
                    yield f"rank {rank}: step {after} follows {before} ({kind}): one is lost, or made twice"
        numbers = [record["exchange"] for record in commits(records) if "exchange" in record]
        for before, after in itertools.pairwise(numbers):
            if after != before + 1:
                yield f"rank {rank}: exchange {after} follows {before}: one is lost, or counts twice"


def _replicas(training: Training, launch: Outcome) -> Iterator[str]:
    """After every exchange all ranks have the same parameters, and say the same of it."""
    said: dict[int, tuple[int, Record]] = {}
    for rank in launch.records:
        for record in counting(launch, rank):
            if "exchange" not in record:
                continue
            first, its = said.setdefault(record["step"], (rank, record))
            for name in COMPARED:
                if record[name] != its[name]:
                    what = "replicas differ" if name == "crc" else f"{name} differs"
                    yield (f"step {record['step']}: {what}: {record[name]} on rank {rank}, {its[name]} on rank {first}")


def _members(training: Training, launch: Outcome) -> Iterator[str]:
    """Only those who have died are counted out, and who votes has begun the step."""
    killed = set(launch.killed)
    taken = {rank: {r["step"] for r in its if r["what"] == "take"} for rank, its in launch.records.items()}
    for rank in launch.records:
        for record in launch.records[rank]:
            if record["what"] == "change" and not set(record["lost"]) <= killed:
                yield f"rank {rank} was told that {record['lost']} have died, and only {sorted(killed)} have"
        for record in counting(launch, rank):
            if "exchange" in record:
                idle = [its for its in record["members"] if record["step"] not in taken[its]]
                if idle or rank not in record["members"]:
                    yield f"step {record['step']} on rank {rank}: members {record['members']}, of which {idle} had none"


def _deals(training: Training, launch: Outcome) -> Iterator[str]:
    """Samples are dealt anew at the same step, to the same ranks, by all."""

    def dealt(records: Sequence[Record], until: int) -> list[tuple[int, int, list[int]]]:
        its = (r for r in records if r["what"] == "deal" and r["step"] < until)
        return [(record["step"], record["epoch"], record["members"]) for record in its]

    told = story(launch)
    for rank in launch.records:
        since, until = begin(launch, rank), max((record["step"] for record in counting(launch, rank)), default=0)
        mine = dealt(launch.records[rank], until)
        its = [deal for deal in dealt(told, until) if since and deal[0] >= since["step"]]
        if mine != its:
            differing = next((pair for pair in zip(mine, its, strict=False) if pair[0] != pair[1]), (mine, its))
            yield f"samples were dealt otherwise to rank {rank} than to others: {differing[0]}, {differing[1]}"


def _moved(training: Training, launch: Outcome) -> Iterator[str]:
    """A vote is applied once."""
    size = training.step_size
    if size is None:
        return
    for rank, records in launch.records.items():
        for record in commits(records):
            expected = 0.0 if record["skipped"] else size
            if abs(record["moved"] - expected) > TOLERANCE * size:
                yield (
                    f"rank {rank}: step {record['step']} has moved a parameter by {record['moved']:.6g}, and a vote "
                    f"moves it by {expected:g}"
                )


def _end(training: Training, launch: Outcome) -> Iterator[str]:
    """It ends well on all that live, or stops where too few are left; and nobody else ends."""
    if launch.hang:
        return
    ends = {rank: r for rank, its in launch.records.items() for r in its if r["what"] == "end"}
    living = [rank for rank in launch.records if rank not in launch.killed and begin(launch, rank)]
    if launch.code == 0:
        gone = [rank for rank in living if not any(r["what"] == "left" for r in launch.records[rank])]
        if gone:
            yield f"ranks {gone} have ended, and nobody has killed them"
        if len({(r["step"], r["crc"]) for rank, r in ends.items() if rank in living}) > 1:
            yield f"replicas differ at the end: {[(rank, r['step'], r['crc']) for rank, r in ends.items()]}"
        return
    members = last_members(launch)
    left = [rank for rank in members if rank not in launch.killed]
    if has_quorum(left, members) and len(left) >= launch.min_ranks:
        yield (
            f"it has stopped with exit code {launch.code}, and {left} of {members} could have gone on (exit codes "
            f"{launch.codes}, last words {[launch.records[rank][-1:] for rank in left]}): "
            f"{launch.text.strip()[-2000:]}"
        )
    elif silent := [
        rank
        for rank in left
        if f"rank {rank} stops: " not in launch.text and launch.codes.get(rank) != QUORUM_EXIT_CODE
    ]:
        yield f"ranks {silent} have ended without a word ({launch.codes}): {launch.text.strip()[-2000:]}"


_OF_A_LAUNCH: dict[str, Callable[[Training, Outcome], Iterator[str]]] = {
    "steps": _steps,
    "replicas": _replicas,
    "members": _members,
    "moved": _moved,
    "deals": _deals,
    "end": _end,
}


def last_members(launch: Outcome) -> list[int]:
    """Of the last group that a rank has been in."""
    changes = [record for its in launch.records.values() for record in its if record["what"] == "change"]
    return max(changes, key=lambda r: r["generation"])["members"] if changes else list(range(launch.ranks))


def _begun(launch: Outcome) -> list[Record]:
    """Where those have begun that were there from the start."""
    begun = (begin(launch, rank) for rank in launch.records)
    return [record for record in begun if record and not record["came"]]


def _resumed(before: Outcome, after: Outcome) -> Iterator[str]:
    """It goes on from a checkpoint that was whole, to the same bits."""
    begun = {(r["step"], r["crc"]) for r in _begun(after)}
    if not begun:
        return  # which is said elsewhere
    if len(begun) > 1:
        yield f"ranks begin otherwise than others: {sorted(begun)}"
        return
    ((step, crc),) = begun
    certain = max((r["step"] for its in before.records.values() for r in its if r.get("certain")), default=0)
    if step < certain:
        yield f"it goes on from step {step}, and step {certain} had been saved"
    first = min(r["step"] for r in _begun(before))
    there = {r["crc"] for r in commits(story(before)) if r["step"] == step and "crc" in r}
    if step > first and there != {crc}:
        yield f"it goes on from step {step}, whose parameters are not those that were there: {crc}, {there}"


def _abstained(training: Training, struck: Struck) -> Iterator[str]:
    """A rank whose gradients are NaN abstains, and nobody else does."""
    if struck.fault.kind in DEADLY or training.variation.startswith("every"):
        return
    launch = training.launches[struck.launch]
    spoiled = [r["step"] for rank in struck.struck for r in commits(launch.records[rank]) if r["nan"]]
    for rank in launch.records:
        for record in counting(launch, rank):
            wanted = struck.struck if record["step"] in spoiled else None
            if wanted is not None and record["silent"] != wanted:
                yield f"step {record['step']}: {record['silent']} abstain on rank {rank}, and NaN have {wanted}"


# ---------------------------------------------------------------------------------------------- of all launches


def history(training: Training) -> list[tuple[Outcome, Record]]:
    """What has counted in the end, as the rank that knows most of each launch has written it.

    What was done after the checkpoint from which the next launch has gone on is left out.
    """
    found: list[tuple[Outcome, Record]] = []
    starts = [resumed_from(launch) for launch in training.launches]
    for place, launch in enumerate(training.launches):
        if starts[place] is None:
            continue
        later = next((step for step in starts[place + 1 :] if step is not None), None)
        found = [] if starts[place] == 0 else found
        records = story(launch)
        found += [(launch, record) for record in (records if later is None else _until(records, later))]
    return found


def resumed_from(launch: Outcome) -> int | None:
    """The step from which it has gone on; None if it has not come so far."""
    return next((record["step"] for record in _begun(launch)), None)


def final_loss(training: Training) -> float | None:
    """On the test images, if it has come to its end."""
    last = training.launches[-1].records.values()
    return next((record["loss"] for its in last for record in its if record["what"] == "end"), None)


class _Deal:
    """What is had of one deal."""

    def __init__(self, members: Sequence[int], left: int) -> None:
        self.members, self.left = members, left
        self.handed = self.again = 0


def _samples(training: Training) -> Iterator[str]:
    """In each epoch every sample counts once, but for those that are dealt twice so that all ranks get as many.

    A relaunch of as many ranks goes on within the window and the deal in which its checkpoint was saved. Of another
    number it gives up what was in no exchange, unless ranks had changed: then it had been dealt anew before the save.
    """
    counted: Counter[int] = Counter()
    pending: list[tuple[int, int, list[int]]] = []
    taken = {id(launch): _taken(launch) for launch in training.launches}
    deal = _Deal((), training.samples)
    problems: list[str] = []
    latest: Sequence[int] = ()  # who was in the last exchange
    resumed = False

    def settle(members: Sequence[int] | None, until: float = math.inf) -> None:
        for step, rank, samples in pending:
            if step <= until and (members is None or rank in members):
                deal.again += sum(counted[sample] > 0 for sample in samples)
                counted.update(samples)
        pending[:] = [its for its in pending if its[0] > until]

    def close() -> None:
        if deal.again > max(0, min(deal.handed - deal.left, len(deal.members) - 1)):
            problems.append(f"{deal.again} samples have counted twice; {deal.left} were left, {deal.handed} dealt")

    for launch, record in history(training):
        what = record["what"]
        if what == "begin" and not record["came"]:
            resumed = launch is not training.launches[0]
        elif what == "deal":
            members = record["members"]
            if resumed and latest == deal.members and len(latest) == len(members):
                now = dict(zip(latest, members, strict=True))
                pending[:] = [(step, now[rank], samples) for step, rank, samples in pending if rank in now]
                deal.members = latest = members
            else:
                settle(members if not resumed else latest if latest != deal.members else ())
                close()
                deal = _Deal(members, training.samples - len(counted))
            resumed = False
        elif what == "commit":
            its = taken[id(launch)].get(record["step"], {})
            pending += [(record["step"], rank, samples) for rank, samples in its.items()]
            deal.handed += len(deal.members) * max((len(samples) for samples in its.values()), default=0)
            if "exchange" in record:
                latest = record["members"]
                settle(latest, record["step"] - record.get("later", 0))
        elif what == "epoch":
            settle(None)
            close()
            missing = training.samples - len(counted)
            if missing:
                problems.append(f"{missing} of {training.samples} samples have not counted")
            yield from (f"epoch {record['epoch']}: {problem}" for problem in problems)
            problems.clear()
            counted.clear()
            deal, resumed = _Deal((), training.samples), False


def _taken(launch: Outcome) -> dict[int, dict[int, list[int]]]:
    """By step and rank, the samples that were taken."""
    found: dict[int, dict[int, list[int]]] = {}
    for rank, records in launch.records.items():
        for record in records:
            if record["what"] == "take":
                found.setdefault(record["step"], {})[rank] = record["samples"]
    return found
