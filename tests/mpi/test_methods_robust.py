"""Robust rules on real ranks against the oracle, and what no rank can do to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import oracle
import pytest
import torch

import mpisign
from mpisign import Method
from mpisign.attacks import Adversary, Constant, Scaled
from mpisign.rules import VectorRule

from . import ballots
from .steps import EXCHANGES, STEPS, assert_close, drawn, everyones, model, step, whole, wrap

if TYPE_CHECKING:
    from mpi4py import MPI


pytestmark = pytest.mark.mpi


# -------------------------------------------------------------------------------------------- robust rules

Rule = Callable[[Any, int, Any], Any]  # (rows (M, n), f, previous decision (n,)) -> (n,)

ROBUST: dict[str, tuple[int, Callable[[int], Method], Rule]] = {
    # the f of a job of M ranks is (M - spare) // 2
    "median": (1, lambda f: mpisign.median(0.8), lambda rows, f, last: np.median(rows, axis=0)),
    "trimmed_mean": (1, lambda f: mpisign.trimmed_mean(f, 0.8), lambda rows, f, last: oracle.trimmed_mean(rows, f)),
    "krum": (3, lambda f: mpisign.krum(f, 0.8), lambda rows, f, last: oracle.multi_krum(rows, f, 1)),
    "multi_krum": (
        3,
        lambda f: mpisign.multi_krum(f, momentum=0.8),
        lambda rows, f, last: oracle.multi_krum(rows, f, len(rows) - f),
    ),
    "cge": (1, lambda f: mpisign.cge(f, 0.8), lambda rows, f, last: oracle.gradient_elimination(rows, f)),
    "geometric_median": (
        1,
        lambda f: mpisign.geometric_median(0.5, 4, 0.8),
        lambda rows, f, last: oracle.geometric_median(rows, 0.5, 4),
    ),
    "centered_clipping": (
        1,
        lambda f: mpisign.centered_clipping(2.0, 2, 0.8),
        lambda rows, f, last: oracle.centered_clipping(rows, 2.0, last, 2),
    ),
    "nearest_neighbour_mixing": (
        1,
        lambda f: mpisign.nearest_neighbour_mixing(f, mpisign.trimmed_mean(f, 0.8)),
        lambda rows, f, last: oracle.trimmed_mean(oracle.nearest_neighbour_mixing(rows, f), f),
    ),
    "nearest_neighbour_mixing of clipping": (
        1,
        lambda f: mpisign.nearest_neighbour_mixing(f, mpisign.centered_clipping(2.0, 2, 0.8)),
        lambda rows, f, last: oracle.centered_clipping(oracle.nearest_neighbour_mixing(rows, f), 2.0, last, 2),
    ),
}
robust = pytest.mark.parametrize(("spare", "make", "rule"), ROBUST.values(), ids=ROBUST)


@pytest.mark.parametrize("exchange", EXCHANGES)
@robust
def test_robust_rules_decide_on_the_ranks_momenta(
    comm: MPI.Comm, spare: int, make: Callable[[int], Method], rule: Rule, exchange: str
) -> None:
    if comm.size < spare:
        pytest.skip(f"needs {spare} ranks")
    f = (comm.size - spare) // 2
    method = make(f)
    if exchange == "two_phase" and isinstance(method.rule, VectorRule):
        pytest.skip("needs whole vectors")
    tensors = model(torch.float64)
    optimizer = wrap(tensors, method, exchange=exchange, bucket_cap_mb=16 / (1 << 20))
    momenta = np.zeros((comm.size, sum(t.numel() for t in tensors)))
    decision = momenta[0]
    for at in range(STEPS):
        momenta = 0.8 * momenta + 0.2 * np.stack([whole(mine) for mine in everyones(comm, at)])
        decision = rule(momenta, f, decision)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([whole([ballots.flat(t.grad) for t in tensors])], [decision], 1e-12)


@pytest.mark.parametrize("attack", [Constant(math.nan), Constant(-math.inf), Constant(3e38), Scaled(1e30)], ids=repr)
@robust
def test_no_rank_can_blow_up_a_robust_rule(
    comm: MPI.Comm, spare: int, make: Callable[[int], Method], rule: Rule, attack: Any
) -> None:
    f = (comm.size - spare) // 2
    if f < 1:
        pytest.skip("too few ranks for an adversary")
    tensors = model()
    optimizer = wrap(tensors, make(f))
    adversary = Adversary(attack, [0], comm, i_know_this_is_an_attack=True)
    for at in range(STEPS):
        for tensor, gradient in zip(tensors, drawn(tensors, at, comm.rank), strict=True):
            tensor.grad = gradient
        adversary.corrupt(tensors)
        optimizer.step()
    honest = max(np.linalg.norm(whole(mine)) for at in range(STEPS) for mine in everyones(comm, at)[1:])
    assert np.linalg.norm(whole([ballots.flat(t) for t in tensors])) <= 0.1 * STEPS * honest


def test_a_parameter_without_gradients_does_not_cut_the_vector_in_two(comm: MPI.Comm) -> None:
    """Krum elects one rank, whose whole vector it is, although nobody uses the parameter in the middle."""
    if comm.size < 3:
        pytest.skip("needs 3 ranks")
    first, unused, last = tensors = ballots.parameters((1,), (4,), (1,), dtypes=[torch.float64])
    optimizer = wrap(tensors, mpisign.krum(0, momentum=0.0))
    rows = np.array([[5.0, 0.0], [0.0, 0.5], [0.6, 3.0], [50.0, 50.0], [90.0, 10.0]])[: comm.size]
    first.grad, last.grad = torch.from_numpy(rows[comm.rank]).split(1)
    optimizer.step()
    assert unused.grad is None
    assert [float(first.grad), float(last.grad)] == oracle.multi_krum(rows, 0, 1).tolist()


def test_monna(comm: MPI.Comm) -> None:
    """A step on the own momentum, then the mean of the M - f models nearest to the own one."""
    f, tensors = (comm.size - 1) // 2, model(torch.float64)
    optimizer = wrap(tensors, mpisign.monna(f, 0.8))
    models = np.zeros((comm.size, sum(t.numel() for t in tensors)))
    momenta = np.zeros_like(models)
    for at in range(STEPS):
        gradients = np.stack([whole(mine) for mine in everyones(comm, at)])
        momenta = 0.8 * momenta + 0.2 * gradients
        halfway = models - 0.1 * momenta
        models = np.stack([oracle.nearest_neighbour_averaging(halfway, f, rank) for rank in range(comm.size)])
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([whole([ballots.flat(t) for t in tensors])], [models[comm.rank]], 1e-12)
    mpisign.check_consistency(torch.nn.ParameterList(tensors), optimizer)  # replicas may differ


def test_a_rank_of_monna_with_a_nan_makes_no_step_of_its_own_and_goes_on(comm: MPI.Comm) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.monna(0, 0.0))  # the mean of all models
    gradients = drawn(tensors, 0, comm.rank)
    if comm.rank == 0:
        gradients[0].fill_(torch.nan)
    step(optimizer, tensors, gradients)
    steps = [whole(mine) for mine in everyones(comm, 0)[1:]]
    expected = -0.1 * np.sum(steps, axis=0) / comm.size if steps else np.zeros(sum(t.numel() for t in tensors))
    assert_close([whole([ballots.flat(t) for t in tensors])], [expected], 1e-12)
    assert optimizer.report.voters == tuple(range(comm.size))


def test_mixing_leaves_what_is_frozen_alone(comm: MPI.Comm) -> None:
    """Though Adam's momentum would go on with a gradient that is left."""
    frozen, trained = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.Adam([frozen, trained], lr=0.1), method=mpisign.monna(0))
    for at in range(3):
        frozen.grad, trained.grad = torch.full((4,), comm.rank + 1.0), torch.ones(4)
        if at == 1:
            frozen.requires_grad_(False)
            before = frozen.detach().clone()
        optimizer.step()
    assert torch.equal(frozen.detach(), before)
    assert not torch.equal(trained.detach(), torch.ones(4))
