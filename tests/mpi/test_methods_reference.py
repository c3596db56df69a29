"""Error feedback, EF21 and DGC on real ranks against their papers' algorithms in NumPy with all ranks in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import mpisign
from mpisign.memory import ef21_step_size

from . import ballots
from .steps import (
    EXCHANGES,
    SHAPES,
    STEPS,
    Vectors,
    assert_close,
    drawn,
    everyones,
    memories,
    model,
    servers_errors,
    step,
    wrap,
    zeros,
)

if TYPE_CHECKING:
    from mpi4py import MPI

    from .ballots import Floats

pytestmark = pytest.mark.mpi


Compress = Callable[[Any], Any]


def scaled_sign(p: Floats) -> Floats:
    return np.abs(p).mean() * np.sign(p) if p.size else p


def largest(ratio: float) -> Compress:
    def compress(p: Floats) -> Floats:
        kept = np.argsort(-np.abs(p))[: max(1, round(ratio * p.size))]
        return np.where(np.isin(np.arange(p.size), kept), p, 0.0)

    return compress


# ------------------------------------------------------------------------------------ error feedback, EF21


def double_squeeze(sent: list[Vectors], worker: list[Vectors], server: Vectors) -> Vectors:
    """DoubleSqueeze, Algorithm 1, on what the workers want to send; both errors change in place."""
    decided = []
    for place in range(len(SHAPES)):
        messages = []
        for mine, error in zip(sent, worker, strict=True):
            p = mine[place] + error[place]
            messages.append(scaled_sign(p))
            error[place] = p - messages[-1]
        q = np.mean(messages, axis=0) + server[place]
        decided.append(scaled_sign(q))
        server[place] = q - decided[-1]
    return decided


def assert_sparse_ternary(q: Floats, ours: Floats, ratio: float) -> None:
    """``ours`` is mu sign(q) on the k largest of q, of which equals abound, and which of them are sent is not said."""
    k = max(1, round(ratio * q.size))
    largest_first = np.sort(np.abs(q))[::-1]
    sent = ours != 0
    assert sent.sum() == k
    np.testing.assert_allclose(ours[sent], largest_first[:k].mean() * np.sign(q[sent]), rtol=0, atol=1e-5)
    assert np.abs(q[sent]).min() >= largest_first[k - 1] - 1e-5


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_stc(comm: MPI.Comm, exchange: str) -> None:
    """Algorithm 2: a worker's residual, and the server's, which is a piece's where shards are decided."""
    shape = (comm.size, 160)  # every rank decides one row
    tensors = ballots.parameters(shape, dtypes=[torch.float64])
    pieces = comm.size if exchange == "two_phase" else 1
    optimizer = wrap(tensors, mpisign.stc(0.1), exchange=exchange)
    server, before = np.zeros(tensors[0].numel()), np.zeros(tensors[0].numel())
    for at in range(STEPS):
        gradient = drawn(tensors, at, comm.rank)
        p = ballots.flat(gradient[0]) + before
        step(optimizer, tensors, gradient)
        (before,) = memories(optimizer, "error")
        sent, decided = p - before, ballots.flat(tensors[0].grad)
        q = np.mean(comm.allgather(sent), axis=0) + server
        for whole, ours in ((p, np.round(sent, 12)), (q, decided)):
            for part, its in zip(np.split(whole, pieces), np.split(ours, pieces), strict=True):
                assert_sparse_ternary(part, its, 0.1)
        server = q - decided
    assert_close(servers_errors(optimizer, tensors, comm), [server], 1e-9)


def test_double_squeeze(comm: MPI.Comm) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.double_squeeze(), exchange="allgather")  # a scale a parameter, as in the paper
    worker, (server,) = zeros(comm.size), zeros(1)
    for at in range(STEPS):
        expected = double_squeeze(everyones(comm, at), worker, server)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([ballots.flat(t.grad) for t in tensors], expected)
    assert_close(memories(optimizer, "error"), worker[comm.rank])


def test_double_squeeze_in_shards_has_a_scale_a_shard(comm: MPI.Comm) -> None:
    shape = (comm.size, 64)  # every rank decides one row
    tensors = ballots.parameters(shape, dtypes=[torch.float64])
    optimizer = wrap(tensors, mpisign.double_squeeze(), exchange="two_phase")
    worker, server = np.zeros((comm.size, *shape)), np.zeros(shape)
    for at in range(STEPS):
        p = worker + np.stack([ballots.flat(drawn(tensors, at, r)[0]).reshape(shape) for r in range(comm.size)])
        messages = np.abs(p).mean(axis=2, keepdims=True) * np.sign(p)
        worker = p - messages
        q = server + messages.mean(axis=0)
        decided = np.abs(q).mean(axis=1, keepdims=True) * np.sign(q)
        server = q - decided
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close([ballots.flat(tensors[0].grad)], [decided.ravel()])


@pytest.mark.parametrize("freeze_step", [1, 2])
def test_one_bit_adam(comm: MPI.Comm, freeze_step: int) -> None:
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.one_bit_adam(freeze_step), exchange="allgather")
    worker, (server,), (m,), (v,) = zeros(comm.size), zeros(1), zeros(1), zeros(1)
    for at in range(freeze_step + 3):
        gradients = everyones(comm, at)
        if at < freeze_step:
            mean = [np.mean(ranks, axis=0) for ranks in zip(*gradients, strict=True)]
            m = [0.9 * a + 0.1 * g for a, g in zip(m, mean, strict=True)]
            v = [0.999 * a + 0.001 * g**2 for a, g in zip(v, mean, strict=True)]
        else:
            wanted = [[0.9 * a + 0.1 * g for a, g in zip(m, mine, strict=True)] for mine in gradients]
            m = double_squeeze(wanted, worker, server)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        applied = [a / (np.sqrt(b) + 1e-8) for a, b in zip(m, v, strict=True)]
        for tensor, expected in zip(tensors, applied, strict=True):  # a scale is fp32, and v may be near 0
            np.testing.assert_allclose(ballots.flat(tensor.grad), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kappa", [1, 2])
def test_zero_one_adam(comm: MPI.Comm, kappa: int) -> None:
    """Updates of v at 0, 1, 3, 7, ... or at 0, 1, 2, 4, 6, 10, ...; the errors of both sides wait meanwhile."""
    tensors = model(torch.float64)
    optimizer = wrap(tensors, mpisign.zero_one_adam(8, kappa), exchange="allgather")
    worker, (server,), (m,), (v,) = zeros(comm.size), zeros(1), zeros(1), zeros(1)
    updates = {0, 1, 3, 7} if kappa == 1 else {0, 1, 2, 4, 6}
    for at in range(12):
        gradients = everyones(comm, at)
        if at in updates:
            mean = [np.mean(ranks, axis=0) for ranks in zip(*gradients, strict=True)]
            m = [0.9 * a + 0.1 * g for a, g in zip(m, mean, strict=True)]
            v = [0.999 * a + 0.001 * g**2 for a, g in zip(v, mean, strict=True)]
        else:
            wanted = [[0.9 * a + 0.1 * g for a, g in zip(m, mine, strict=True)] for mine in gradients]
            m = double_squeeze(wanted, worker, server)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        assert_close(memories(optimizer, "variance"), v, 1e-12)
        assert_close(memories(optimizer, "momentum"), m, 1e-5)
    assert_close(memories(optimizer, "error"), worker[comm.rank], 1e-5)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_bit_adam_leaves_alone_what_had_no_gradient_before_the_freeze(comm: MPI.Comm, exchange: str) -> None:
    """Its second moment is 0, and a bit is never 0: divided by eps it would be a step of 10^7 and more."""
    (tensor,) = tensors = ballots.parameters((100, 10), dtypes=[torch.float32])
    optimizer = wrap(tensors, mpisign.one_bit_adam(2), exchange=exchange)
    for at in range(6):
        (gradient,) = drawn(tensors, at, comm.rank)
        gradient[3:7] = 0.0
        step(optimizer, tensors, [gradient])
    assert not tensor[3:7].any()
    assert tensor[:3].all()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_bit_adam_that_never_freezes_is_torchs_adam_on_the_mean(comm: MPI.Comm, exchange: str) -> None:
    """Without bias correction, which torch's has: its rate and eps are set so that it cancels."""
    ours, theirs = model(torch.float64), model(torch.float64)
    optimizer = wrap(ours, mpisign.one_bit_adam(10**9), exchange=exchange)
    adam = torch.optim.Adam(theirs)
    reference = mpisign.DistributedSignOptimizer(adam, ballots.named(theirs), method=mpisign.mean(), exchange=exchange)
    for at in range(STEPS):
        root = math.sqrt(1 - 0.999 ** (at + 1))
        adam.param_groups[0].update(lr=0.1 * (1 - 0.9 ** (at + 1)) / root, eps=1e-8 / root)
        for whose, tensors in ((optimizer, ours), (reference, theirs)):
            step(whose, tensors, drawn(tensors, at, comm.rank))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("ratio", "compress"), [(0.1, largest(0.1)), (None, scaled_sign)], ids=["top-k", "signs"])
@pytest.mark.parametrize("kind", ["ef21", "ef21_sgdm", "ef21_w"])
def test_ef21(comm: MPI.Comm, kind: str, ratio: float | None, compress: Compress) -> None:
    """Each rank compresses what its estimate G_m lacks; the gradient applied is the (weighted) mean of all G_m."""
    smoothness = np.arange(1.0, 1.0 + comm.size)
    weights = smoothness / smoothness.sum() if kind == "ef21_w" else np.full(comm.size, 1 / comm.size)
    beta = 0.8 if kind == "ef21_sgdm" else 0.0
    method = {
        "ef21": lambda: mpisign.ef21(ratio),
        "ef21_sgdm": lambda: mpisign.ef21_sgdm(beta, ratio),
        "ef21_w": lambda: mpisign.ef21_w(smoothness.tolist(), ratio),
    }[kind]()
    tensors = model(torch.float64)
    optimizer = wrap(tensors, method)
    estimates, averages = zeros(comm.size), zeros(comm.size)
    for at in range(STEPS):
        for rank, mine in enumerate(everyones(comm, at)):
            for place, g in enumerate(mine):
                averages[rank][place] = v = beta * averages[rank][place] + (1 - beta) * g
                estimates[rank][place] += compress(v / (comm.size * weights[rank]) - estimates[rank][place])
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        expected = [np.tensordot(weights, ranks, 1) for ranks in zip(*estimates, strict=True)]
        assert_close([ballots.flat(t.grad) for t in tensors], expected)
        assert_close(memories(optimizer, "estimate"), estimates[comm.rank])


@pytest.mark.parametrize("weighted", [False, True])
def test_ef21_converges_with_the_step_of_its_theory(comm: MPI.Comm, weighted: bool) -> None:
    """f_m = <a_m, x>^2 + |x|^2 / 4, on which naive top-1 diverges: |x|^2 falls at the rate 1 - lr mu, mu = 1/2."""
    if comm.size != 3:
        pytest.skip("three functions, three ranks")
    vectors = np.full((3, 3), 2.0) - 5.0 * np.eye(3)
    hessians = [2 * np.outer(a, a) + np.eye(3) / 2 for a in vectors]
    smoothness = [float(np.linalg.eigvalsh(h)[-1]) for h in hessians]
    whole = float(np.linalg.eigvalsh(np.mean(hessians, axis=0))[-1])
    lr = ef21_step_size(smoothness, 1 / 3, weighted=weighted, global_smoothness=whole)
    method = mpisign.ef21_w(smoothness, 1 / 3) if weighted else mpisign.ef21(1 / 3)
    (x,) = tensors = ballots.parameters((3,), dtypes=[torch.float64])
    x.data.fill_(1.0)
    optimizer, hessian = wrap(tensors, method, lr=lr), torch.from_numpy(hessians[comm.rank])
    for _ in range(300):
        step(optimizer, tensors, [hessian @ x.detach()])
    assert float(x.detach().norm()) < 3 * (1 - lr / 2) ** 150


# ---------------------------------------------------------------------------------------------------- DGC


@pytest.mark.parametrize("masking", [True, False], ids=["masking", "no masking"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "heavy ball"])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_dgc(comm: MPI.Comm, clip: float | None, nesterov: bool, masking: bool) -> None:
    """Algorithm 4: local clipping at clip / sqrt(M), momentum correction and masking, warm-up, vectors sent whole."""
    m, ratio, warmup = 0.9, 0.02, 2
    tensors = model(torch.float64)
    method = mpisign.dgc(ratio, m, nesterov, clip, warmup, masking, sample=0.5)
    optimizer = wrap(tensors, method)
    u, v = zeros(comm.size), zeros(comm.size)
    for at in range(2 * warmup + 2):
        epoch = at // 2
        compress = largest(0.25 * (ratio / 0.25) ** (min(epoch, warmup) / warmup))
        sent = zeros(comm.size)
        for rank, mine in enumerate(everyones(comm, at)):
            norm = math.sqrt(sum(float(g @ g) for g in mine))
            factor = min(1.0, clip * comm.size**-0.5 / norm) if clip else 1.0
            for place, g in enumerate(mine):
                clipped = factor * g
                if nesterov:
                    u[rank][place] = m * (u[rank][place] + clipped)
                    v[rank][place] += u[rank][place] + clipped
                else:
                    u[rank][place] = m * u[rank][place] + clipped
                    v[rank][place] += u[rank][place]
                message = compress(v[rank][place]) if len(SHAPES[place]) > 1 else v[rank][place].copy()
                sent[rank][place] = message
                v[rank][place] -= message
                if masking and len(SHAPES[place]) > 1:  # what is sent whole has momentum as without compression
                    u[rank][place][message != 0] = 0.0
        optimizer.set_epoch(epoch)
        step(optimizer, tensors, drawn(tensors, at, comm.rank))
        expected = [np.mean(ranks, axis=0) for ranks in zip(*sent, strict=True)]
        assert_close([ballots.flat(t.grad) for t in tensors], expected, 1e-5)
    assert_close(memories(optimizer, "velocity"), u[comm.rank], 1e-5)
    assert_close(memories(optimizer, "residual"), v[comm.rank], 1e-5)
