"""Small problems on which compressed training is known to go wrong, and what repairs it, beside their closed forms.

Each is a function of one to three numbers. It is minimised by the library as any model is, on one to three ranks; what
must come out is computed apart from that, and drawn over it. Ends with exit code 1 if any prediction fails.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import RESULTS, markdown_table, parse, write_report
from flags import HelpFormatter, count, end, progress_bar, said_once, whole
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mpisign
from mpisign.codecs import TopK
from mpisign.memory import Identity
from mpisign.rules import Mean

EXAMPLES = """\
examples:
  mpirun -n 3 python scripts/experiment_counterexamples.py
  mpirun -n 3 python scripts/experiment_counterexamples.py --quick
  mpirun -n 3 python scripts/experiment_counterexamples.py --only ce1 pull --copies 16
  mpirun -n 3 python scripts/experiment_counterexamples.py --report
"""
RANKS = 3
QUICK = {"only": ["ce1", "ce3", "pull"], "copies": 4}
EVERY = 5  # steps from one number of a path in the report to the next
DEVIATIONS = 5.0  # by how many of the path's largest standard errors a mean of random runs may be off at any step
ROUNDING = 1e-4  # of a number that is not random: messages are in fp32
KARIMIREDDY = "Karimireddy et al. 2019, Counterexample"

Curve = np.ndarray
"""(steps + 1,) float64: what is shown, before each step and after the last."""


@dataclass(frozen=True)
class Run:
    """A method on a counterexample, and what must come out, on average where there is chance.

    ``relation``: ``"="``, ``"<="`` or ``">="``, between what is seen and ``predicted``, at all steps.
    """

    label: str
    method: mpisign.Method
    relation: str
    predicted: Curve
    ranks: int | None = None  # if not the counterexample's
    ties: str = "coin"


@dataclass(frozen=True)
class Counterexample:
    """A function to minimise, from ``start`` (d,).

    Attributes:
        gradient: of x (copies, d) on a rank, (copies, d); it draws from the generator if it is stochastic.
        shown: what of x (copies, d) is drawn and predicted, (copies,); ``quantity`` in words.
        best: what it is where the true f is least.
        averaged: that, averaged over the steps so far.
        copies: independent runs at a time, for means; 0 for as many as the user wants.
        box: coordinates are clipped to [-box, box] after each step.
    """

    name: str
    title: str
    source: str
    start: tuple[float, ...]
    lr: float
    steps: int
    gradient: Callable[[Tensor, int, torch.Generator], Tensor]
    shown: Callable[[Tensor], Tensor]
    quantity: str
    best: float
    runs: Sequence[Run]
    ranks: int = 1
    averaged: bool = False
    copies: int = 0
    box: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Seen:
    """What a run gave: (steps + 1,) each, the mean over its copies, that mean's standard error, and the middle 80 %."""

    mean: Curve
    error: Curve
    low: Curve
    high: Curve

    def holds(self, run: Run) -> bool:
        slack = DEVIATIONS * self.error.max() + ROUNDING * (1.0 + np.abs(run.predicted))
        off = self.mean - run.predicted
        return bool(np.all({"=": np.abs(off), "<=": off, ">=": -off}[run.relation] <= slack))


# --------------------------------------------------------------------------------------------- closed forms


def chain(
    start: float,
    spacing: float,
    reach: float,
    steps: int,
    moves: Callable[[np.ndarray], Sequence[tuple[Any, np.ndarray]]],
    shown: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Curve:
    """The exact mean of ``shown(x)`` by step, where x jumps on a lattice through ``start``: a Markov chain.

    Args:
        reach: states further from ``start`` than that do not occur.
        moves: of the states x (n,), the ways to go on: (probability (n,) or a number, next states (n,)).
    """
    far = math.ceil(reach / spacing)
    states = start + spacing * np.arange(-far, far + 1)
    here = np.arange(len(states))
    matrix = np.zeros((len(states), len(states)))
    for probability, target in moves(states):
        there = np.rint((target - states[0]) / spacing).astype(int).clip(0, len(states) - 1)
        np.add.at(matrix, (here, there), np.broadcast_to(probability, here.shape))
    distribution = (here == far).astype(float)
    means = []
    for _ in range(steps + 1):
        means.append(distribution @ shown(states))
        distribution = distribution @ matrix
    return np.array(means)


def wins(votes: Sequence[Any]) -> Any:
    """The probability of a majority of independent voters who are for it with these probabilities; a tie is a coin."""
    counts = [1.0]  # counts[k]: the probability that k are for it
    for p in votes:
        counts = [a * (1 - p) + b * p for a, b in zip([*counts, 0.0], [0.0, *counts], strict=True)]
    half = len(votes) / 2
    return sum(chance * (1.0 if k > half else 0.5) for k, chance in enumerate(counts) if k >= half)


def so_far(curve: Curve) -> Curve:
    """The mean up to each step."""
    return np.cumsum(curve) / np.arange(1, len(curve) + 1)


def lipschitz_bound(distance: float, squared: float, delta: float, lr: float, steps: int) -> Curve:
    """What error feedback keeps the mean of f - f* so far below, for convex f; Karimireddy et al. 2019, Theorem III.

    Args:
        distance: from start to minimum.
        squared: the mean of ||g||^2 at most.
        delta: C loses at most a share 1 - delta of ||p||^2: 1 / n for scaled signs of n numbers, k / n for top-k.
    """
    done = np.arange(1, steps + 2)
    return distance**2 / (2 * lr * done) + lr * squared * (0.5 + 2 * math.sqrt(1 - delta) / delta)


def interpolated_bound(distance: float, ratio: float, smooth: float, delta: float, lr: float, steps: int) -> Curve:
    """The same for a quadratic f, least on all ranks and for all samples at one place; their proof gives then:

    With y = x - e, E||y'||^2 = ||y||^2 - 2 lr <grad f, x - e> + lr^2 E||g||^2, where <grad f, x> = 2 f and
    <grad f, e> <= f / 2 + L ||e||^2, and the sum of all ||e||^2 is at most 4 (1 - delta) / delta^2 lr^2 that of all
    ||g||^2.

    Args:
        ratio: the mean of ||g||^2 is at most so many times f.
        smooth: L, the Lipschitz constant of f's gradient.
    """
    gain = 3 * lr - lr**2 * ratio - 8 * smooth * lr**3 * ratio * (1 - delta) / delta**2
    assert gain > 0, "the bound needs a smaller learning rate"
    return distance**2 / (gain * np.arange(1, steps + 2))


# ------------------------------------------------------------------------------------------- counterexamples


def sign(x: Any) -> Any:
    """With sign(0) = 1."""
    return np.where(x >= 0, 1.0, -1.0)


def rows(chosen: Tensor, vectors: Sequence[tuple[float, ...]]) -> Tensor:
    """The vector that each copy has chosen: (copies,) numbers to (copies, d)."""
    return torch.tensor(vectors, dtype=torch.float64)[chosen]


def either(x: Tensor, random: torch.Generator, chance: float = 0.5) -> Tensor:
    """For each copy 1 with probability ``chance``, else 0."""
    return (torch.rand(len(x), generator=random) < chance).long()


def ce1(stochastic: bool) -> Counterexample:
    """f(x) = x / 4 on [-1, 1]; the gradient is 4 with probability 1/4, else -1, or its mean."""
    lr, steps, t = 1 / 64, 500, np.arange(501)

    def voted(ranks: int) -> Curve:
        up = wins([3 / 4] * ranks)
        return chain(0, lr, 1, steps, lambda x: [(up, np.minimum(x + lr, 1)), (1 - up, np.maximum(x - lr, -1))])

    descent = chain(0, lr, 1, steps, lambda x: [(1 / 4, np.maximum(x - 4 * lr, -1)), (3 / 4, np.minimum(x + lr, 1))])
    of_one, of_all = (voted(1), voted(RANKS)) if stochastic else (np.maximum(-1, -lr * t),) * 2
    return Counterexample(
        name="ce1" if stochastic else "ce1-exact",
        title="CE1, large gradients are rare" if stochastic else "CE1, exact gradient",
        source=f"{KARIMIREDDY} 1",
        start=(0.0,),
        lr=lr,
        steps=steps,
        gradient=(lambda x, rank, random: rows(either(x, random, 1 / 4), [(-1.0,), (4.0,)]))
        if stochastic
        else (lambda x, rank, random: torch.full_like(x, 1 / 4)),
        shown=lambda x: x[:, 0],
        quantity="x",
        best=-1.0,
        runs=[
            Run("sign", mpisign.signsgd(), "=", of_one),
            Run(f"vote of {RANKS}", mpisign.signsgd(), "=", of_all, ranks=RANKS),
            # A scaled sign of one number is the number: nothing is left to feed back.
            Run("error feedback", mpisign.ef_signsgd(), "=", descent if stochastic else np.maximum(-1, -lr * t / 4)),
        ],
        copies=0 if stochastic else 1,
        box=1.0,
    )


def ce2(stochastic: bool, epsilon: float = 0.5) -> Counterexample:
    """f(x) = epsilon |x1 + x2| + |x1 - x2|; the gradient is that of one of the two, doubled, or of both."""
    lr, steps = 1 / 64, 600
    terms = torch.tensor([[epsilon, epsilon], [1.0, -1.0]], dtype=torch.float64)

    def gradient(x: Tensor, rank: int, random: torch.Generator) -> Tensor:
        signs = torch.where(x @ torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) >= 0, 1.0, -1.0)
        parts = signs.double()[:, :, None] * terms
        return 2 * parts[torch.arange(len(x)), either(x, random)] if stochastic else parts.sum(dim=1)

    # x1 + x2 and x1 - x2 jump by 2 lr: both when their own term was drawn, or else the second always.
    def jumps(chance: float) -> Callable[[np.ndarray], Sequence[tuple[Any, np.ndarray]]]:
        return lambda x: [(chance, x - 2 * lr * sign(x)), (1 - chance, x)]

    total = chain(2, 2 * lr, 4, steps, jumps(0.5 if stochastic else 0.0), np.abs)
    difference = chain(0, 2 * lr, 1, steps, jumps(0.5 if stochastic else 1.0), np.abs)
    squared = 4 * (1 + epsilon**2) if stochastic else 2 * (1 + epsilon**2)
    return Counterexample(
        name="ce2" if stochastic else "ce2-exact",
        title="CE2, one term a step" if stochastic else "CE2, exact gradient",
        source=f"{KARIMIREDDY} 2",
        start=(1.0, 1.0),
        lr=lr,
        steps=steps,
        gradient=gradient,
        shown=lambda x: epsilon * (x[:, 0] + x[:, 1]).abs() + (x[:, 0] - x[:, 1]).abs(),
        quantity="f, mean so far",
        best=0.0,
        runs=[
            Run("sign", mpisign.signsgd(), "=", so_far(epsilon * total + difference)),
            Run("error feedback", mpisign.ef_signsgd(), "<=", lipschitz_bound(2**0.5, squared, 1 / 2, lr, steps)),
        ],
        averaged=True,
        copies=0 if stochastic else 1,
    )


def ce3(stochastic: bool, epsilon: float = 0.5) -> Counterexample:
    """f(x) = <a1, x>^2 + <a2, x>^2, a = +-(1, -1) + epsilon (1, 1); the gradient is that of one of the two, or half."""
    lr, steps, t = 0.03, 500, np.arange(501)
    a = torch.tensor([[1 + epsilon, -1 + epsilon], [-1 + epsilon, 1 + epsilon]], dtype=torch.float64)

    def gradient(x: Tensor, rank: int, random: torch.Generator) -> Tensor:
        parts = 2 * (x @ a.T)[:, :, None] * a
        return parts[torch.arange(len(x)), either(x, random)] if stochastic else parts.mean(dim=1)

    # Both signs are +-(1, -1): x1 + x2 = 2 stays, and x1 - x2 jumps by 2 lr, towards a zero of the term drawn.
    def jumps(x: np.ndarray) -> Sequence[tuple[Any, np.ndarray]]:
        return [(0.5, x - 2 * lr * sign(x + 2 * epsilon)), (0.5, x + 2 * lr * sign(2 * epsilon - x))]

    stuck = chain(0, 2 * lr, 3, steps, jumps, lambda difference: 2 * difference**2 + 8 * epsilon**2)
    bound = 2 * interpolated_bound(2**0.5, 8 * (1 + epsilon**2), 4 * max(1, epsilon**2), 1 / 2, lr, steps)
    # Without noise x stays on the line through (1, 1) and 0, where signs are as good as any scale.
    along = chain(1, lr, 2, steps, lambda x: [(1, x - lr * sign(x))], lambda x: 8 * epsilon**2 * x**2)
    shrunk = 8 * epsilon**2 * (1 - 4 * epsilon**2 * lr) ** (2 * t)
    return Counterexample(
        name="ce3" if stochastic else "ce3-exact",
        title="CE3, one term a step" if stochastic else "CE3, exact gradient",
        source=f"{KARIMIREDDY} 3",
        start=(1.0, 1.0),
        lr=lr,
        steps=steps,
        gradient=gradient,
        shown=lambda x: (x @ a.T).square().sum(dim=1),
        quantity="f, mean so far" if stochastic else "f",
        best=0.0,
        runs=[
            Run("sign", mpisign.signsgd(), "=", so_far(stuck) if stochastic else along),
            Run("error feedback", mpisign.ef_signsgd(), *(("<=", bound) if stochastic else ("=", shrunk))),
        ],
        averaged=stochastic,
        copies=0 if stochastic else 1,
    )


def pull() -> Counterexample:
    """f_m(x) = (x - a_m)^2 / 2 on three ranks: the vote ends at the median of a, the gradient's zero is their mean."""
    a, lr, steps, noise, start = (1.0, 2.0, 10.0), 0.05, 500, 5.0, 0.02  # a start from which no jump ends in an a_m
    t = np.arange(steps + 1)

    def goes_to(place: float) -> Curve:
        return place + (start - place) * (1 - lr) ** t

    def noisy(x: np.ndarray) -> Sequence[tuple[Any, np.ndarray]]:
        down = wins([np.vectorize(math.erf)((x - place) / (noise * 2**0.5)) / 2 + 1 / 2 for place in a])
        return [(down, x - lr), (1 - down, x + lr)]

    middle = float(np.median(a))
    return Counterexample(
        name="pull",
        title=f"Ranks with minima {', '.join(f'{place:g}' for place in a)}",
        source="Chen et al. 2020, section 3",
        start=(start,),
        lr=lr,
        steps=steps,
        gradient=lambda x, rank, random: x - a[rank],
        shown=lambda x: x[:, 0],
        quantity="x",
        best=float(np.mean(a)),
        runs=[
            Run(
                "vote", mpisign.signsgd(), "=", chain(start, lr, 12, steps, lambda x: [(1, x - lr * sign(x - middle))])
            ),
            Run("median", mpisign.median(momentum=0.0), "=", goes_to(middle)),
            Run(f"vote, noise {noise:g}", mpisign.noisy_signsgd(noise), "=", chain(start, lr, 12, steps, noisy)),
            Run("error feedback", mpisign.ef_signsgd(), "=", goes_to(float(np.mean(a)))),
        ],
        ranks=RANKS,
    )


def standstill() -> Counterexample:
    """(x + 1)^2 / 2 and 3 (x - 1)^2 / 2 on two ranks: between -1 and 1 they disagree, and every vote is a tie."""
    lr, steps, start, bound = 0.03, 500, -0.26, 8.0  # a start from which no jump ends in -1 or 1
    steep, place = (1.0, 3.0), (-1.0, 1.0)

    def slopes(x: Any) -> list[Any]:
        return [c * (x - p) for c, p in zip(steep, place, strict=True)]

    def voted(chances: Callable[[np.ndarray], list[np.ndarray]]) -> Curve:
        def jumps(x: np.ndarray) -> Sequence[tuple[Any, np.ndarray]]:
            down = wins(chances(x))
            return [(down, x - lr), (1 - down, x + lr)]

        return chain(start, lr, 3, steps, jumps)

    best = float(np.average(place, weights=steep))
    return Counterexample(
        name="standstill",
        title="Two ranks whose votes always tie",
        source="the tie of a vote; Jin et al. 2020 for sto-sign",
        start=(start,),
        lr=lr,
        steps=steps,
        gradient=lambda x, rank, random: slopes(x)[rank],
        shown=lambda x: x[:, 0],
        quantity="x",
        best=best,
        runs=[
            Run("vote, ties stay", mpisign.signsgd(), "=", np.full(steps + 1, start), ties="zero"),
            Run("vote, ties by coin", mpisign.signsgd(), "=", voted(lambda x: [(1 + sign(g)) / 2 for g in slopes(x)])),
            Run(
                "sto-sign",
                mpisign.sto_sign(bound),
                "=",
                voted(lambda x: [(1 / 2 + g / (2 * bound)).clip(0, 1) for g in slopes(x)]),
            ),
            Run(
                "error feedback",
                mpisign.ef_signsgd(),
                "=",
                best + (start - best) * (1 - lr * sum(steep) / 2) ** np.arange(steps + 1),
            ),
        ],
        ranks=2,
    )


def beznosikov() -> Counterexample:
    """f_m(x) = <a_m, x>^2 + ||x||^2 / 4 on three ranks: each sends the largest of three numbers, and misleads."""
    a = np.array([(-3.0, 2.0, 2.0), (2.0, -3.0, 2.0), (2.0, 2.0, -3.0)])
    steps, kept, one = 600, 1 / 3, np.ones(3)
    hessians = 2 * a[:, :, None] * a[:, None, :] + np.eye(3) / 2
    each = np.linalg.eigvalsh(hessians)[:, -1]  # L_m
    convex, *_, smooth = np.linalg.eigvalsh(hessians.mean(axis=0))
    # EF21, Theorem 2: theta, beta and the step that the theorem allows.
    theta = 1 - math.sqrt(1 - kept)
    beta = (1 - kept) / theta
    rms = math.sqrt(np.mean(each**2))
    lr = float(min(1 / (smooth + rms * math.sqrt(2 * beta / theta)), theta / (2 * convex)))

    t = np.arange(steps + 1)
    first = hessians @ one  # the gradients at the start
    f = float(one @ hessians.mean(axis=0) @ one / 2)
    lost = np.mean(np.sort(first**2, axis=1)[:, :-1].sum(axis=1))  # of a gradient, by sending its largest number
    largest = np.where(np.abs(first) == np.abs(first).max(axis=1, keepdims=True), first, 0.0).mean(axis=0)
    growth = 1 - lr * largest[0]  # x stays a multiple of (1, 1, 1)
    return Counterexample(
        name="beznosikov",
        title="Beznosikov: the largest of three misleads",
        source="Beznosikov et al. 2020, Example 1; Richtarik et al. 2021, Theorem 2",
        start=tuple(one),
        lr=lr,
        steps=steps,
        gradient=lambda x, rank, random: x @ torch.from_numpy(hessians[rank]),
        shown=lambda x: ((x @ torch.from_numpy(hessians.mean(axis=0))) * x).sum(dim=1) / 2,
        quantity="f, mean so far",
        best=0.0,
        runs=[
            Run(
                "top-1, nothing fed back",
                mpisign.Method(Identity(), TopK(kept), Mean(), "naive"),
                "=",
                so_far(f * growth ** (2 * t)),
            ),
            Run(
                "top-1, error feedback",
                mpisign.top_k(kept),
                "<=",
                interpolated_bound(3**0.5, 2 * each.max(), smooth, kept, lr, steps),
            ),
            Run("EF21", mpisign.ef21(kept), "<=", so_far((1 - lr * convex) ** t * (f + lr / theta * lost))),
        ],
        ranks=RANKS,
        averaged=True,
        copies=1,
        log=True,
    )


def counterexamples() -> list[Counterexample]:
    """All of them, in the order of the picture."""
    exact = [maker(stochastic=False) for maker in (ce1, ce2, ce3)]
    return [*exact, *(maker(stochastic=True) for maker in (ce1, ce2, ce3)), pull(), standstill(), beznosikov()]


# ----------------------------------------------------------------------------------------------- the library


@contextmanager
def first_ranks(number: int) -> Iterator[bool]:
    """A job of the first ranks only, and whether this process is one of them. **Collective** over all."""
    from mpi4py import MPI  # importing it starts MPI

    mine = MPI.COMM_WORLD.rank < number
    comm = MPI.COMM_WORLD.Split(int(mine))
    mpisign.shutdown()
    mpisign.init(comm)
    try:
        yield mine
    finally:
        mpisign.shutdown()
        comm.Free()
        mpisign.init()


def follow(example: Counterexample, run: Run, copies: int, seed: int) -> Seen:
    """Minimise by the library: each copy is a parameter of its own. **Collective.**"""
    parameters = [nn.Parameter(torch.tensor(example.start, dtype=torch.float64)) for _ in range(copies)]
    sgd = torch.optim.SGD(parameters, lr=example.lr)
    optimizer = mpisign.DistributedSignOptimizer(sgd, method=run.method, ties=run.ties, seed=seed)
    random = torch.Generator().manual_seed(seed * RANKS + mpisign.rank())
    values = []
    for step in range(example.steps + 1):
        x = torch.stack([parameter.detach() for parameter in parameters])
        values.append(example.shown(x).numpy())
        if step == example.steps:
            break
        for parameter, gradient in zip(parameters, example.gradient(x, mpisign.rank(), random), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        if example.box is not None:
            for parameter in parameters:
                parameter.data.clamp_(-example.box, example.box)
    curves = np.apply_along_axis(so_far, 0, np.array(values)) if example.averaged else np.array(values)
    error = curves.std(axis=1, ddof=1) / copies**0.5 if copies > 1 else np.zeros(len(curves))
    low, high = np.percentile(curves, [10, 90], axis=1)
    return Seen(curves.mean(axis=1), error, low, high)


def main() -> None:
    mpisign.init()
    args = parse_arguments()
    torch.set_num_threads(1)
    chosen = [example for example in counterexamples() if example.name in args.only]
    runs = [(example, run) for example in chosen for run in example.runs]
    results: list[tuple[Counterexample, Run, Seen]] = []
    bar = progress_bar(runs, unit="run", quiet=args.quiet)
    for ranks, group in groupby(bar, key=lambda pair: pair[1].ranks or pair[0].ranks):
        with first_ranks(ranks) as mine:
            for example, run in group:
                if mine:
                    results.append((example, run, follow(example, run, example.copies or args.copies, args.seed)))
    wrong = mpisign.broadcast_object(show(args, results) if mpisign.rank() == 0 else None)
    if wrong:
        end(f"what was predicted did not happen: {'; '.join(wrong)}", 1)


# ------------------------------------------------------------------------------------------------- the results


def show(args: argparse.Namespace, results: Sequence[tuple[Counterexample, Run, Seen]]) -> list[str]:
    """Print the table, write the report; returns which predictions failed."""
    columns = ["counterexample", "method", "ranks", "predicted", "seen", "holds"]
    lines, facts, wrong = [], [], []
    for example, run, seen in results:
        holds = seen.holds(run)
        if not holds:
            wrong.append(f"{example.name}, {run.label}")
        sign_of = "" if run.relation == "=" else f"{run.relation} "
        spread = f" ± {seen.error[-1]:.3f}" if seen.error[-1] > ROUNDING else ""
        ranks = run.ranks or example.ranks
        cells = [f"{sign_of}{run.predicted[-1]:.3f}", f"{seen.mean[-1]:.3f}{spread}", "yes" if holds else "NO"]
        lines.append([example.name, run.label, str(ranks), *cells])
        kept = [*range(0, example.steps, EVERY), example.steps]
        curves = {"predicted": run.predicted, "seen": seen.mean, "standard_error": seen.error}
        facts.append(
            {
                "counterexample": example.name,
                "source": example.source,
                "shown": example.quantity,
                "best": example.best,
                "method": str(run.method),
                "label": run.label,
                "ranks": ranks,
                "lr": example.lr,
                "copies": example.copies or args.copies,
                "relation": run.relation,
                "holds": holds,
                "steps": kept,
                **{name: curve[kept].tolist() for name, curve in curves.items()},
            }
        )
    table = Table(title="At the last step")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 2 else "right")
    for line in lines:
        table.add_row(*line)
    # mpirun gives each rank a terminal of its own, so rich would colour what goes to a file in the end.
    Console(color_system=None, width=110).print(table)
    text = f"""# Counterexamples, beside their closed forms

{len(results) - len(wrong)} of {len(results)} predictions hold, at all steps. Lines are what the library did, the mean
of {args.copies} runs where there is chance, with their middle 80 %. Black dashes are what was computed apart from it;
coloured dashes are what it may be at most.

{markdown_table(columns, lines)}

A prediction that is no bound is of the mean path at every step: it may be off by {DEVIATIONS:g} of the path's largest
standard errors, or by {ROUNDING:g} where there is no chance. `scripts/experiment_counterexamples.py` has the formulas
and their sources."""
    data = {"seeds": [args.seed], "runs": facts}
    print(f"report: {write_report(args.out, 'counterexamples', text, data, {'': draw(results)})}")
    return wrong


def draw(results: Sequence[tuple[Counterexample, Run, Seen]]) -> Any:
    """A panel for each counterexample."""
    from matplotlib.figure import Figure  # slow to import, and one rank needs it

    panels = [(example, list(group)) for example, group in groupby(results, key=lambda result: result[0])]
    width = min(3, len(panels))
    height = -(-len(panels) // width)
    figure = Figure(figsize=(4.4 * width, 3.3 * height), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False).flat
    for (example, runs), axes in zip(panels, grid, strict=False):  # panels first: the rest of the grid is removed
        steps = np.arange(example.steps + 1)
        others = iter(("C0", "C1", "C4"))
        for _, run, seen in runs:
            colour = "C2" if "error feedback" in run.label else next(others)
            axes.plot(steps, seen.mean, color=colour, linewidth=2.5, label=run.label)
            axes.fill_between(steps, seen.low, seen.high, color=colour, alpha=0.15, linewidth=0)
            computed = "k" if run.relation == "=" else colour
            axes.plot(steps, run.predicted, color=computed, linewidth=1, linestyle="--")
        largest = max(max(seen.high.max(), seen.mean.max()) for _, _, seen in runs)
        if example.log:
            axes.set_yscale("log")
        elif any(run.relation != "=" for _, run, _ in runs):
            axes.set_ylim(0, 1.25 * largest)  # bounds begin high
        if not example.log:
            axes.axhline(example.best, color="0.6", linewidth=1, linestyle=":", label="best")
        axes.set_title(example.title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(example.quantity, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in list(grid):
        axes.remove()
    figure.suptitle(
        "lines: the library; black dashes: computed, and equal; coloured dashes: computed, at most", fontsize=9
    )
    return figure


# ------------------------------------------------------------------------------------------------- the options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [OPTIONS]", description=__doc__, epilog=EXAMPLES, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    names = [example.name for example in counterexamples()]
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help="of %(choices)s")
    add("--copies", type=whole, default=64, metavar="N", help="independent runs at a time, where there is chance")
    add("--seed", type=count, default=0, help="of gradients, noise and coins")
    add("--quick", action="store_true", help="takes seconds: other defaults, for few counterexamples and copies")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="where the report goes: .md, .json and .png")
    add("--report", action="store_true", help=f"write it to {RESULTS} instead")
    add("--quiet", action="store_true", help="no progress bar")
    with said_once():
        args = parse(parser, QUICK)
        if mpisign.size() < RANKS:
            parser.error(f"this needs {RANKS} ranks, and there are {mpisign.size()}: mpirun -n {RANKS} python ...")
        if args.copies < 2:
            parser.error("--copies 1 has no standard error: take two or more, such as --copies 16")
    return args


if __name__ == "__main__":
    main()
