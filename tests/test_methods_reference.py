"""What the literature says in closed form about its methods, on one rank: where signs fail and error feedback does not.

Optimization by one rank is the single-worker setting of Karimireddy et al., "Error Feedback Fixes SignSGD", 2019, whose
counterexamples 1 to 3 these are. ``tests/mpi/test_methods_reference.py`` has what needs ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mpisign
from mpisign import DistributedSignOptimizer, Method
from mpisign.attacks import Adversary, Mimic
from mpisign.codecs import Codec, SignBits, Trits
from mpisign.memory import ErrorFeedback, Memory, SparseSign, StochasticSign, TernarySign
from mpisign.policy import Policy
from mpisign.rules import MajorityVote

Gradient = Callable[[list[torch.Tensor], int], list[torch.Tensor]]


def descend(
    method: Method,
    start: list[torch.Tensor],
    gradient: Gradient,
    steps: int,
    lr: Callable[[int], float],
    after: Callable[[list[torch.Tensor]], object] = lambda x: None,
    **options: Any,
) -> list[torch.Tensor]:
    """Minimize from ``start``, one parameter a tensor; ``after`` sees the parameters after every step."""
    x = [torch.nn.Parameter(t.clone().double()) for t in start]
    optimizer = DistributedSignOptimizer(torch.optim.SGD(x, lr=lr(0)), method=method, **options)
    for at in range(steps):
        optimizer.param_groups[0]["lr"] = lr(at)
        for parameter, g in zip(x, gradient([p.detach() for p in x], at), strict=True):
            parameter.grad = g
        optimizer.step()
        after([p.data for p in x])
    return [p.detach() for p in x]


# --------------------------------------------------------------------- counterexample 1: rare large gradients


def rare_and_large(x: list[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Of f(x) = x / 4 on [-1, 1]: 4 with probability 1/4, else -1, in every coordinate for itself."""
    random = torch.Generator().manual_seed(at)
    return [torch.where(torch.rand(p.shape, generator=random) < 0.25, 4.0, -1.0).to(p.dtype) for p in x]


@pytest.mark.usefixtures("world")
def test_the_expected_step_goes_up_with_the_sign_and_down_with_error_feedback() -> None:
    """E[dx] = +lr / 2 and -lr / 4; with one coordinate a tensor, error feedback has nothing to lose and is SGD."""
    lr, many, steps = 0.01, 100, 20
    apart = [torch.zeros(1) for _ in range(many)]
    for method, drift, deviation in (
        (mpisign.signsgd(), lr / 2, 0.87 * lr),
        (mpisign.ef_signsgd(), -lr / 4, 2.17 * lr),
    ):
        ends = torch.cat(descend(method, apart, rare_and_large, steps, lambda at: lr))
        error = 5 * deviation * math.sqrt(steps / many)
        assert float(ends.mean()) == pytest.approx(steps * drift, abs=error)
        assert error < steps * abs(drift)  # so the sign of the drift is told


@pytest.mark.long
@pytest.mark.usefixtures("world")
def test_the_sign_ends_at_the_worst_point_and_error_feedback_at_the_best() -> None:
    def project(x: list[torch.Tensor]) -> None:
        for p in x:
            p.clamp_(-1.0, 1.0)

    ends = [
        torch.cat(
            descend(method, [torch.zeros(1)] * 8, rare_and_large, 400, lambda at: 0.03 / (1 + at / 100), project)
        ).mean()
        for method in (mpisign.signsgd(), mpisign.ef_signsgd())
    ]
    assert ends[0] > 0.95
    assert ends[1] < -0.8


# ------------------------------------------------- counterexamples 2 and 3: a sign orthogonal to where to go


def tilted(x: list[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A subgradient of f = |x1 + x2| / 2 + |x1 - x2|, which takes sign(0) for +1 in the second term."""
    (p,) = x
    apart = torch.tensor([1.0, -1.0]).to(p.dtype) * (1.0 if p[0] >= p[1] else -1.0)
    return [0.5 * torch.sign(p.sum()) + apart]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("zeros", ["coin", "positive"])
def test_the_sign_never_leaves_the_line_where_it_starts(zeros: str) -> None:
    sums: list[float] = []
    descend(
        mpisign.signsgd(),
        [torch.ones(2)],
        tilted,
        500,
        lambda at: 0.1 / math.sqrt(at + 1),
        lambda x: sums.append(float(x[0].sum())),
        zeros=zeros,
    )
    assert sums == pytest.approx([2.0] * 500, abs=1e-12)


@pytest.mark.long
@pytest.mark.usefixtures("world")
def test_error_feedback_leaves_it() -> None:
    (x,) = descend(mpisign.ef_signsgd(), [torch.ones(2)], tilted, 1500, lambda at: 0.1 / (1 + at / 30))
    assert 0.5 * abs(float(x.sum())) + abs(float(x[0] - x[1])) < 0.002


TERMS = torch.tensor([[1.5, -0.5], [-0.5, 1.5]], dtype=torch.float64)  # +-(1, -1) + (1, 1) / 2


def loss(x: torch.Tensor) -> float:
    """f = <a1, x>^2 + <a2, x>^2."""
    return float((TERMS @ x).square().sum())


def one_term(x: list[torch.Tensor], at: int) -> list[torch.Tensor]:
    """The gradient of one of the two, drawn at random."""
    a = TERMS[int(torch.randint(2, (), generator=torch.Generator().manual_seed(7919 * at)))]
    return [4 * (a @ x[0]) * a]


@pytest.mark.usefixtures("world")
def test_signs_of_random_terms_never_descend() -> None:
    losses: list[float] = []
    start = torch.ones(2)
    descend(mpisign.signsgd(), [start], one_term, 500, lambda at: 0.05, lambda x: losses.append(loss(x[0])))
    assert min(losses) >= loss(start.double()) - 1e-9
    (x,) = descend(mpisign.ef_signsgd(), [start], one_term, 500, lambda at: 0.05)
    assert loss(x) < 1e-6


# --------------------------------------------------------------------------------------- codecs of random signs

G = torch.tensor([-0.9, -0.4, -0.05, 0.0, 0.2, 0.6, 1.0], dtype=torch.float64)
DRAWS = 20_000


@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive"])
@pytest.mark.parametrize(
    ("memory", "codec", "factor"),
    [
        (StochasticSign(1.5), SignBits(), 1.5),
        (TernarySign(1.0, 1.6), Trits(), 1.6),
        (SparseSign(0.8), Trits(), 1 / 0.8),
    ],
    ids=["sto-sign", "ternary", "sparsign"],
)
def test_what_arrives_is_unbiased(memory: Memory, codec: Codec, factor: float, zeros: str) -> None:
    """Through memory, wire and back: factor * E[message] = g."""
    many, policy = G.repeat_interleave(DRAWS), Policy(zeros, seed=3)
    context = policy.context(5, 2, 3)
    values = memory(many, {}, torch.empty_like(many), context, 11)
    message = torch.zeros((codec.planes(policy), codec.length(many.numel())), dtype=torch.int32)
    assert codec.encode(values, message, context, 11)
    arrived = torch.empty_like(many)
    codec.decode(message, arrived)
    deviations = factor / math.sqrt(DRAWS)
    np.testing.assert_allclose(factor * arrived.view(len(G), DRAWS).mean(1), G, rtol=0, atol=5 * deviations)


@pytest.mark.usefixtures("world")
def test_error_feedback_before_a_vote_is_allowed() -> None:
    """There is no guarantee for more ranks; for one, which always wins, nothing is lost."""
    method = Method(ErrorFeedback(), SignBits(), MajorityVote(), "ef_vote")
    total = torch.zeros(50, dtype=torch.float64)
    x = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = DistributedSignOptimizer(torch.optim.SGD([x], lr=0.1), method=method, apply="optimizer")
    for at in range(5):
        x.grad = torch.randn(50, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
        total += x.grad
        optimizer.step()
        assert set(x.grad.tolist()) <= {-1.0, 1.0}
    error = optimizer.state_dict()["mpisign"]["memory"][0]["error"]
    torch.testing.assert_close(x.detach() - 0.1 * error, -0.1 * total)


# ------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mpisign.ef21_w([]), r"smoothness=\[\] must be one positive constant for each rank"),
        (lambda: mpisign.ef21_w([1.0, 0.0]), r"smoothness=\[1.0, 0.0\] must be"),
        (lambda: mpisign.ef21_w([1.0, math.nan]), r"smoothness=\[1.0, nan\] must be"),
        (lambda: mpisign.ef21_w([1.0, math.inf]), r"smoothness=\[1.0, inf\] must be"),
        (lambda: mpisign.ef21_w("ab"), r"smoothness='ab' must be"),
        (lambda: mpisign.ef21_w(3.0), r"smoothness=3.0 must be"),
        (lambda: mpisign.one_bit_adam(0), r"freeze_step=0 must be an int of 1 or more"),
        (lambda: mpisign.one_bit_adam(True), r"freeze_step=True must be an int of 1 or more"),
        (lambda: mpisign.dgc(warmup_epochs=1.5), r"warmup_epochs=1.5 must be an int of 0 or more"),
        (lambda: mpisign.nearest_neighbour_mixing(1, "krum"), r"then='krum' is not a Method: .*trimmed_mean\(1\)"),
        (lambda: mpisign.nearest_neighbour_mixing(1, mpisign.signum()), "decides on signs, which cannot be averaged"),
        (
            lambda: mpisign.nearest_neighbour_mixing(1, mpisign.one_bit_adam(5)),
            "one_bit_adam becomes another method as training goes on, which mixing cannot follow",
        ),
    ],
)
def test_impossible_options(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(mpisign.OptionError, match=message):
        make()


def test_weights_may_come_as_any_numbers() -> None:
    expected = mpisign.ef21_w([1.0, 3.0])
    assert expected.memory.shares == (0.25, 0.75)
    for smoothness in ((1, 3), np.array([1.0, 3.0]), torch.tensor([1.0, 3.0]), iter([1.0, 3.0])):
        assert mpisign.ef21_w(smoothness) == expected


@pytest.mark.parametrize(
    ("attack", "ranks", "message"),
    [
        (Mimic(target=1), [], r"Mimic\(target=1\) is not among the 1 honest ranks, which count from 0"),
        (Mimic(target=-1), [], r"Mimic\(target=-1\) is not among"),
        ("sign flip", [0], r"attack='sign flip' is not an Attack: .*SignFlip\(\)"),
    ],
)
@pytest.mark.usefixtures("world")
def test_impossible_attacks(attack: Any, ranks: list[int], message: str) -> None:
    from mpi4py import MPI

    with pytest.raises(mpisign.OptionError, match=message):
        Adversary(attack, ranks, MPI.COMM_SELF, i_know_this_is_an_attack=True)
