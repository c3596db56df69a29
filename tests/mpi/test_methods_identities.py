"""mpisign.methods on real ranks: closed forms for any gradients, for noise, and for data of different kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from methods_table import TABLE, Make

import mpisign
from mpisign import Method
from mpisign.rules import RecodedMean

from . import ballots
from .steps import EXCHANGES, assert_close, drawn, mean_of_ranks, memories, model, servers_errors, step, wrap

if TYPE_CHECKING:
    from mpi4py import MPI

    from .ballots import Floats

pytestmark = pytest.mark.mpi


# -------------------------------------------------------------------------------------------- identities


def scaled_sign(p: Floats) -> Floats:
    return float(np.float32(np.abs(p).mean())) * np.sign(p) if p.size else p


def largest(p: Floats, ratio: float = 0.1) -> Floats:
    kept = np.argsort(-np.abs(p))[: max(1, round(ratio * p.size))]
    sent = np.zeros_like(p)
    sent[kept] = p[kept].astype(np.float32)
    return sent


@pytest.mark.parametrize(
    ("method", "compress"),
    [(mpisign.ef_signsgd(), scaled_sign), (mpisign.top_k(0.1), largest), (mpisign.top_k(0.1, sample=0.3), largest)],
    ids=["ef_signsgd", "top_k", "top_k sample"],
)
def test_the_mean_of_compressed_messages(comm: MPI.Comm, method: Method, compress: Callable[[Floats], Floats]) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, method)
    errors = [[np.zeros(t.numel()) for t in tensors] for _ in range(comm.size)]
    for at in range(3):
        everyones = ballots.gathered(comm, drawn(tensors, at, comm.rank))
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        for place, tensor in enumerate(tensors):
            sent = []
            for rank in range(comm.size):
                p = everyones[rank][place] + errors[rank][place]
                sent.append(compress(p))
                errors[rank][place] = p - sent[-1]
            assert_close([ballots.flat(tensor.grad)], [np.mean(sent, axis=0)])
    assert_close(memories(optimizer, "error"), errors[comm.rank])


@pytest.mark.parametrize("lr", [0.1, None], ids=["constant rate", "falling rate"])
@pytest.mark.parametrize(
    ("method", "exchange"),
    [
        (mpisign.ef_signsgd(), "allgather"),
        (mpisign.top_k(0.1), "auto"),
        (mpisign.stc(0.1), "allgather"),
        (mpisign.stc(0.1), "two_phase"),
        (mpisign.double_squeeze(), "allgather"),
        (mpisign.double_squeeze(), "two_phase"),
        (mpisign.double_squeeze(), "auto"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_nothing_is_lost_with_error_feedback(comm: MPI.Comm, method: Method, exchange: str, lr: float | None) -> None:
    """x_t - lr (mean of the ranks' errors + the servers' error) = x_0 - the sum of lr * mean gradient."""
    tensors = model(torch.float64)
    # Many small buckets, so that shards and pieces of all sizes come up.
    for cap in (1.0, 16 / (1 << 20)):
        optimizer = wrap(tensors, method, exchange=exchange, bucket_cap_mb=cap)
        expected = [ballots.flat(t).copy() for t in tensors]
        for at in range(5):
            rate = lr or 0.1 / (1 + at)
            optimizer.param_groups[0]["lr"] = rate
            gradients = drawn(tensors, at, comm.rank)
            mean = mean_of_ranks(comm, [ballots.flat(g) for g in gradients])
            step(optimizer, tensors, gradients)
            expected = [x - rate * g for x, g in zip(expected, mean, strict=True)]
        owed = mean_of_ranks(comm, memories(optimizer, "error"))
        server = servers_errors(optimizer, tensors, comm)
        loses = isinstance(method.rule, RecodedMean) and comm.size > 1  # signs of signs lose nothing
        assert any(e.any() for e in server) == loses
        parts = zip(tensors, owed, server, strict=True)
        assert_close([ballots.flat(x) - rate * (e + s) for x, e, s in parts], expected, 1e-9)


@pytest.mark.parametrize("make", [TABLE[name] for name in ("ef21", "ef21 signs", "ef21_sgdm", "ef21_w")])
def test_the_average_is_the_mean_of_the_estimates(comm: MPI.Comm, make: Make) -> None:
    tensors = model(torch.float64)
    method = make(comm.size)
    shares = method.rule.shares or [1 / comm.size] * comm.size
    optimizer = wrap(tensors, method)
    for at in range(4):
        gradients = drawn(tensors, at, comm.rank)
        if at == 2 and comm.rank == comm.size - 1:
            gradients[0].view(-1)[3] = torch.inf  # whoever abstains leaves its estimate, and its part of the mean
        step(optimizer, tensors, gradients)
        average = [comm.size * shares[comm.rank] * e for e in memories(optimizer, "estimate")]
        assert_close(mean_of_ranks(comm, average), memories(optimizer, "average"), 1e-9)
        if at != 2:
            assert_close([ballots.flat(t.grad) for t in tensors], memories(optimizer, "average"), 1e-9)


def test_equal_weights_or_not_ef21_w_is_ef21_with_positively_homogeneous_codecs(comm: MPI.Comm) -> None:
    plain, weighted = model(torch.float64), model(torch.float64)
    optimizers = [wrap(plain, mpisign.ef21(0.1)), wrap(weighted, TABLE["ef21_w"](comm.size))]
    for at in range(4):
        for optimizer, tensors in zip(optimizers, (plain, weighted), strict=True):
            step(optimizer, tensors, drawn(tensors, at, comm.rank))
    assert_close([ballots.flat(t) for t in plain], [ballots.flat(t) for t in weighted])


@pytest.mark.parametrize("nesterov", [True, False])
def test_dgc_sends_all_momentum_in_the_end(comm: MPI.Comm, nesterov: bool) -> None:
    """Without masking: what was applied, plus the mean of what is still held, is plain momentum SGD."""
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.dgc(0.05, 0.9, nesterov, warmup_epochs=0, masking=False), lr=1.0)
    velocity = [np.zeros(t.numel()) for t in tensors]
    moved = [np.zeros(t.numel()) for t in tensors]
    for at in range(4):
        gradients = drawn(tensors, at, comm.rank)
        mean = mean_of_ranks(comm, [ballots.flat(g) for g in gradients])
        step(optimizer, tensors, gradients)
        for place, g in enumerate(mean):
            velocity[place] = 0.9 * (velocity[place] + g) if nesterov else 0.9 * velocity[place] + g
            moved[place] += velocity[place] + (g if nesterov else 0.0)
    held = mean_of_ranks(comm, memories(optimizer, "residual"))
    assert_close([e - ballots.flat(t) for t, e in zip(tensors, held, strict=True)], moved)


@pytest.mark.parametrize("freeze_step", [10**9, 2])
def test_one_bit_adam_is_adam_before_the_freeze(comm: MPI.Comm, freeze_step: int) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.one_bit_adam(freeze_step))
    x, m, v = ([np.zeros(t.numel()) for t in tensors] for _ in range(3))
    for at in range(4):
        gradients = drawn(tensors, at, comm.rank)
        mean = mean_of_ranks(comm, [ballots.flat(g) for g in gradients])
        step(optimizer, tensors, gradients)
        if at < freeze_step:
            for i, g in enumerate(mean):
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                x[i] = x[i] - 0.1 * m[i] / (np.sqrt(v[i]) + 1e-8)
            assert_close([ballots.flat(t) for t in tensors], x, 1e-9)
        assert_close(memories(optimizer, "variance"), v, 1e-12)  # which stays after the freeze


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zeros", ["abstain", "positive"])
def test_the_mean_of_signs_is_the_same_bits_by_either_exchange(comm: MPI.Comm, zeros: str, dtype: torch.dtype) -> None:
    """With zeros, a parameter that rank 0 has no gradient of, and in the last step a rank with a NaN."""
    for exchange in EXCHANGES:
        tensors = model(dtype)
        optimizer = wrap(tensors, mpisign.lion(0.0, 0.0, vote=False), exchange=exchange, zeros=zeros)
        for at in range(3):
            everyones = [drawn(tensors, at, rank) for rank in range(comm.size)]
            for gradients in everyones:
                gradients[0][::3] = 0
            mine = everyones[comm.rank]
            absent = comm.size - 1 if at == 2 and comm.size > 1 else None
            if comm.rank == absent:
                mine[1][7] = torch.nan
            for tensor, gradient in zip(tensors, mine, strict=True):
                tensor.grad = gradient.clone()
            if comm.rank == 0:
                tensors[4].grad = None
            optimizer.step()
            for place, tensor in enumerate(tensors):
                gone = {absent} if place <= 1 else set()  # its ballot has ended at parameter 1
                voters = [rank for rank in range(comm.size) if rank not in gone and (place, rank) != (4, 0)]
                if not voters:
                    assert tensor.grad is None
                    continue
                votes = [everyones[rank][place].double().sign() for rank in voters]
                if zeros == "positive":
                    votes = [vote + (vote == 0) for vote in votes]
                expected = torch.stack(votes).sum(0).to(torch.promote_types(dtype, torch.float32)) / len(voters)
                assert torch.equal(tensor.grad, expected.to(dtype)), (exchange, at, place)


# ------------------------------------------------------------------------------------------ randomness


def test_ranks_draw_their_own_noise_the_same_in_every_run(comm: MPI.Comm) -> None:
    votes = []
    for seed in (1, 1, 2):
        (tensor,) = tensors = ballots.parameters((1000,), dtypes=[torch.float32])
        optimizer = wrap(
            tensors, Method(mpisign.sparsign(0.5).memory, mpisign.mean().codec, mpisign.mean().rule), seed=seed
        )
        step(optimizer, tensors, [torch.ones(1000)])
        votes.append(ballots.flat(tensor.grad))
    assert np.array_equal(votes[0], votes[1])
    assert not np.array_equal(votes[0], votes[2])
    if comm.size > 1:
        assert len(np.unique(votes[0])) > 2, "all ranks spoke on the same coordinates"


# --------------------------------------------------------------------------------- data of different kinds


@pytest.mark.parametrize(
    ("method", "end"),
    [
        (mpisign.signsgd(), 2.0),
        (mpisign.median(0.0), 2.0),
        (mpisign.mean(), 13 / 3),
        (mpisign.ef_signsgd(), 13 / 3),
        (mpisign.double_squeeze(), 13 / 3),
        (mpisign.ef21(None), 13 / 3),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_votes_stop_at_the_median_and_means_at_the_mean(comm: MPI.Comm, method: Method, end: float) -> None:
    """f_m = |x - a_m|^2 / 2 with a = 1, 2, 10, and -2 a in the second coordinate."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    (x,) = tensors = ballots.parameters((2,), dtypes=[torch.float64])
    optimizer = wrap(tensors, method, lr=0.05)
    direction = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for _ in range(120):
        step(optimizer, tensors, [x.detach() - (1.0, 2.0, 10.0)[comm.rank] * direction])
    np.testing.assert_allclose(ballots.flat(x), end * direction.numpy(), rtol=0, atol=0.5)  # a step or so


def test_top_1_needs_error_feedback(comm: MPI.Comm) -> None:
    """f_m = <a_m, x>^2 + |x|^2 / 4 from (1, 1, 1): without it x grows by 1 + 11 lr / 6 a step."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    a = torch.full((3,), 2.0, dtype=torch.float64)
    a[comm.rank] = -3.0
    lr, steps = 0.01, 20
    naive = Method(mpisign.mean().memory, mpisign.top_k(1 / 3).codec, mpisign.mean().rule)
    ends = []
    for method, at_most in ((naive, steps), (mpisign.top_k(1 / 3), 200), (mpisign.ef21(1 / 3), 200)):
        (x,) = tensors = ballots.parameters((3,), dtypes=[torch.float64])
        x.data.fill_(1.0)
        optimizer = wrap(tensors, method, lr=lr)
        for _ in range(at_most):
            step(optimizer, tensors, [2 * (a @ x.detach()) * a + x.detach() / 2])
        ends.append(float(x.detach().norm()))
    assert ends[0] == pytest.approx((1 + 11 * lr / 6) ** steps * 3**0.5, rel=1e-5)
    assert max(ends[1:]) < 0.5
