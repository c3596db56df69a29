"""Trainings with faults, and the same without, one after the other."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from chaos_checks import Problem, Training, check, final_loss
from chaos_faults import deal
from chaos_inject import back_from, can_strike, strike
from chaos_job import HangError, Job, Launch
from chaos_times import samples_by
from chaos_training import VARIATIONS
from train_digits import load_data

__all__ = ["BATCH_SIZE", "Goodput", "Plan", "Spread", "goodput", "loss_is_wrong", "make_data", "run", "spread"]

BATCH_SIZE = 8
START_SECONDS = 120.0  # until all ranks have made a step
MOST_LAUNCHES = 30
NEVER = 10**6  # epochs
SLACK = 0.25  # of the mean loss, besides four standard deviations of a few seeds


@dataclass(frozen=True)
class Plan:
    """What all trainings have in common.

    Attributes:
        gap: the mean of the seconds from one fault to the next.
        patience: seconds after which what has not happened is a hang.
        most: faults in one training; then it ends without.
        spares: how many of them wait, drawn from these for each training.
        hosts: on how many ranks are, in trainings with faults; 0 for this machine.
        detect_links: after how many seconds of silence they count as dead, in trainings with faults.
        data: the digits, as :func:`make_data` has written them.
        told: is called with each fault that has come about.
    """

    ranks: Sequence[int]
    kinds: Sequence[str]
    variations: Sequence[str]
    epochs: int
    gap: float
    patience: float
    most: int
    spares: Sequence[int]
    hosts: int
    detect_links: float | None
    folder: Path
    data: Path
    told: Callable[[str], object] = lambda what: None


def make_data(folder: Path) -> Path:
    """Write the digits down, so that no rank has to import what reads them."""
    train, test = load_data(0)
    path = folder / "digits.npz"
    (images, labels), (test_images, test_labels) = ([its.numpy() for its in one.tensors] for one in (train, test))
    np.savez(path, images=images, labels=labels, test_images=test_images, test_labels=test_labels)
    return path


def _job(plan: Plan, variation: str, ranks: int, seed: int) -> Job:
    return Job(
        variation=variation,
        ranks=ranks,
        spares=0,
        min_ranks=2,
        seeds=[seed],
        epochs=plan.epochs,
        batch_size=BATCH_SIZE,
        save_every=24,
        asynchronous=False,
        compute=0.0,
        data=str(plan.data),
        checkpoints="",
        nodes=VARIATIONS[variation].nodes,
    )


def _samples(plan: Plan) -> int:
    return len(np.load(plan.data)["labels"])


def run(plan: Plan, seed: int) -> tuple[Training, list[Problem]]:
    """A training with the faults of a seed, and what is wrong with it."""
    dice = random.Random(seed)
    variation = plan.variations[seed % len(plan.variations)]
    ranks, asynchronous = dice.choice(list(plan.ranks)), dice.random() < 0.5
    spares = dice.choice(list(plan.spares))
    with tempfile.TemporaryDirectory(dir=plan.folder, prefix=f"{seed}-") as folder:
        job = replace(
            _job(plan, variation, ranks, seed),
            spares=spares,
            asynchronous=asynchronous,
            checkpoints=str(Path(folder) / "saved"),
            hosts=plan.hosts,
            detect_links=plan.detect_links,
        )
        size = VARIATIONS[variation].step_size
        training = Training(seed, variation, ranks, asynchronous, _samples(plan), size)
        faults = deal(dice, plan.kinds, plan.gap, plan.detect_links)
        for number in range(MOST_LAUNCHES):
            with Launch(job, number, Path(folder) / f"launch-{number}", plan.patience) as launch:
                hang = ""
                try:
                    launch.wait_until_ready(START_SECONDS)
                    while len(training.struck) < plan.most:
                        fault = next(its for its in faults if can_strike(launch, its))
                        if not launch.pause(fault.gap) or launch.epoch() >= plan.epochs - 1:
                            break
                        struck = strike(launch, fault)
                        if struck is None:
                            break
                        training.struck.append(struck)
                        plan.told(fault.kind)
                        if not back_from(launch, struck):
                            break
                except HangError as error:
                    hang = str(error)
                outcome = launch.finish(hang=hang)
            training.add(outcome)
            if outcome.hang or not outcome.code or not outcome.killed:
                break
        problems = check(training)
        if final_loss(training) is None and not problems:
            problems.append(Problem("end", f"it has not come to its end in {len(training.launches)} launches"))
        return training, problems


@dataclass(frozen=True)
class Spread:
    """Losses at the end of trainings without faults, one a seed: of as few steps as there may be, and of as many.

    All ranks from the first to the last epoch make the fewest and take part in the largest votes; two the most.
    """

    losses: Sequence[Sequence[float]]

    @property
    def limit(self) -> float:
        """More is no chance: of either, the mean and four standard deviations, but a quarter of the mean at least."""
        means = [statistics.fmean(its) for its in self.losses]
        slack = [max(4 * statistics.stdev(its), SLACK * mean) for its, mean in zip(self.losses, means, strict=True)]
        return max(mean + its for mean, its in zip(means, slack, strict=True))


def spread(plan: Plan, variation: str, seeds: int) -> Spread:
    """Train without faults, on as many ranks as there may be, and on two. Raises :class:`chaos_job.HangError`."""
    found = []
    for ranks in (max(plan.ranks), 2):
        job = replace(_job(plan, variation, ranks, 0), seeds=list(range(seeds)), save_every=0)
        with (
            tempfile.TemporaryDirectory(dir=plan.folder, prefix="calm-") as folder,
            Launch(job, 0, Path(folder) / "launch", plan.patience) as launch,
        ):
            launch.wait_until_ready(START_SECONDS)
            outcome = launch.finish()
        losses = [record["loss"] for record in outcome.records[0] if record["what"] == "end"]
        if outcome.code or outcome.hang or len(losses) != seeds:
            raise HangError(f"a training without faults has not ended well: {outcome.hang or outcome.text}")
        found.append(losses)
    return Spread(found)


def loss_is_wrong(training: Training, calm: Spread) -> list[Problem]:
    """Whether the loss at the end is worse than chance explains."""
    loss = final_loss(training)
    if loss is None or loss <= calm.limit:
        return []
    losses = ", ".join(f"{its:.4f}" for losses in calm.losses for its in losses)
    text = f"the loss is {loss:.4f} at the end, and without faults {losses}: up to {calm.limit:.4f} is chance"
    return [Problem("loss", text)]


@dataclass(frozen=True)
class Goodput:
    """What came of a training in so many seconds.

    Attributes:
        between: the mean of the seconds between two deaths; None for none.
        survives: it goes on when ranks die; else it starts anew from its checkpoint.
        samples: that have counted in the end, a second.
    """

    between: float | None
    survives: bool
    seconds: float
    samples: float
    deaths: int
    relaunches: int


def goodput(plan: Plan, between: float | None, *, survives: bool, seconds: float, seed: int) -> Goodput:
    """Kill ranks for so long, one at a time, as a Poisson process does. Raises :class:`chaos_job.HangError`."""
    dice, ranks = random.Random(seed), max(plan.ranks)
    training = Training(seed, plan.variations[0], ranks, False, _samples(plan), None)
    with tempfile.TemporaryDirectory(dir=plan.folder, prefix="goodput-") as folder:
        job = replace(
            _job(plan, plan.variations[0], ranks, seed),
            epochs=NEVER,
            min_ranks=2 if survives else ranks,
            compute=0.03,
            checkpoints=str(Path(folder) / "saved"),
        )
        began, deaths = 0.0, 0
        until = following = float("inf")
        while time.monotonic() < until:
            number = len(training.launches)
            with Launch(job, number, Path(folder) / f"launch-{number}", plan.patience) as launch:
                if launch.wait_until_ready(START_SECONDS) and not began:
                    began = time.monotonic()
                    until = began + seconds
                    following = began + (dice.expovariate(1 / between) if between else seconds + 1)
                while launch.pause(max(0.0, min(following, until) - time.monotonic())):
                    if time.monotonic() >= until:
                        launch.end()
                        break
                    if living := launch.living():
                        launch.kill(dice.choice(living))
                        deaths += 1
                    assert between is not None
                    following = max(following, time.monotonic()) + dice.expovariate(1 / between)
                training.add(launch.finish())
            if hang := training.launches[-1].hang:
                raise HangError(hang)
        samples = samples_by(training, BATCH_SIZE, until)
        return Goodput(between, survives, seconds, samples / seconds, deaths, len(training.launches) - 1)
