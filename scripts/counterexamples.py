"""Small problems on which compressed training is known to go wrong, and what each method must make of them.

Each is a function of one to three numbers, and says where it is from. ``closed_forms`` has what predictions share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from closed_forms import Curve, chain, interpolated_bound, lipschitz_bound, so_far, wins
from torch import Tensor

import mpisign
from mpisign.codecs import TopK
from mpisign.memory import Identity
from mpisign.policy import Ties
from mpisign.rules import Mean

RANKS = 3
KARIMIREDDY = "Karimireddy et al. 2019, Counterexample"


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
    ties: Ties = "coin"


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
