"""mpisign.local_steps on real ranks: steps are plain torch's, windows NumPy's, and what must be equal is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import mpisign
from mpisign import ConsistencyError, Method

from . import ballots
from .adam_steps import (
    ADAMW,
    EXCHANGES,
    NAN,
    Decide,
    drawn,
    flats,
    give,
    means,
    model,
    scaled_votes,
    train,
    wrap,
)
from .steps import assert_close, assert_same_everywhere

if TYPE_CHECKING:
    from mpi4py import MPI

    from .ballots import Floats

pytestmark = pytest.mark.mpi


def simulated(ranks: int, steps: int, every: int, decide: Decide, skips: Sequence[tuple[int, int]] = ()) -> Any:
    """All ranks' parameters after so many steps, and the common ones. ``skips``: (step, rank) without a local step."""
    local = [model() for _ in range(ranks)]
    adams = [AdamW(its, **ADAMW) for its in local]
    common = flats(model())
    for at in range(steps):
        for rank in range(ranks):
            if (at, rank) not in skips:
                give(local[rank], drawn(at, rank))
                adams[rank].step()
        if (at + 1) % every == 0:
            differences = [[c - p for c, p in zip(common, flats(its), strict=True)] for its in local]
            common = [c - d for c, d in zip(common, decide(differences, at // every), strict=True)]
            for its in local:
                for tensor, value in zip(its, common, strict=True):
                    tensor.data.copy_(torch.from_numpy(value).view(tensor.shape))
    return [flats(its) for its in local], common


# ------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_means_every_third_step_are_means_of_models(comm: MPI.Comm, exchange: str) -> None:
    """By hand: the average of all ranks' parameters, from which all go on."""
    tensors, own = model(), model()
    optimizer, adam = wrap(tensors, method=mpisign.mean(), exchange=exchange), AdamW(own, **ADAMW)
    for at in range(7):
        train(optimizer, tensors, range(at, at + 1), comm.rank)
        give(own, drawn(at, comm.rank))
        adam.step()
        if at % 3 == 2:
            for tensor in own:
                tensor.data = torch.tensor(np.mean(comm.allgather(tensor.detach().numpy()), axis=0))
            assert_same_everywhere(comm, tensors)
            assert optimizer.report.step == at // 3
            mpisign.check_consistency(nn.ParameterList(tensors), optimizer)
        elif comm.size > 1:
            assert len(set(comm.allgather(tensors[0].detach().numpy().tobytes()))) == comm.size, "replicas must differ"
        assert_close(flats(tensors), flats(own), 1e-12)


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize("every", [1, 3])
def test_scaled_votes_are_the_oracles(comm: MPI.Comm, every: int, exchange: str) -> None:
    tensors = model()
    optimizer = wrap(tensors, every, exchange=exchange, ties="positive")
    train(optimizer, tensors, range(7), comm.rank)
    local, common = simulated(comm.size, 7, every, scaled_votes)
    assert_close(flats(tensors), local[comm.rank], 1e-7)  # scales travel as fp32
    with optimizer.common_parameters():
        assert_close(flats(tensors), common, 1e-7)
        assert_same_everywhere(comm, tensors)
    assert_close(flats(tensors), local[comm.rank], 1e-7)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", [mpisign.scaled_vote(), mpisign.double_squeeze()], ids=lambda method: method.name)
def test_every_eighth_step_takes_a_two_hundredth_of_full_precision(comm: MPI.Comm, method: Method) -> None:
    """Than a ring all-reduce of fp32 gradients in each step. By counted bytes; a row of 256 has a scale."""
    weight = nn.Parameter(torch.zeros(512, 256))
    optimizer = mpisign.DistributedSignOptimizer(AdamW([weight]), every=8, method=method, exchange="two_phase")
    for at in range(8):
        weight.grad = torch.randn(weight.shape, generator=ballots.generator(at, comm.rank))
        optimizer.step()
    ring = 2 * (comm.size - 1) / comm.size * 4 * weight.numel()
    assert optimizer.report is not None
    assert 0 < optimizer.report.bytes_sent + optimizer.report.header_bytes <= 8 * ring / 200


def test_an_outer_nesterov_is_diloco(comm: MPI.Comm) -> None:
    """Algorithm 1 of Douillard et al. by hand: the momentum of mean differences, with a step ahead."""
    tensors = model()
    optimizer = wrap(
        tensors,
        method=mpisign.mean(),
        outer=lambda parameters: SGD(parameters, lr=0.7, momentum=0.9, nesterov=True),
    )
    train(optimizer, tensors, range(9), comm.rank)
    momentum = [0.0 * its for its in flats(tensors)]

    def nesterov(differences: list[list[Floats]], at: int) -> list[Floats]:
        mean = means(differences, at)
        momentum[:] = [0.9 * m + d for m, d in zip(momentum, mean, strict=True)]
        return [0.7 * (d + 0.9 * m) for m, d in zip(momentum, mean, strict=True)]

    local, _ = simulated(comm.size, 9, 3, nesterov)
    assert_close(flats(tensors), local[comm.rank], 1e-12)
    assert_same_everywhere(comm, tensors)


@pytest.mark.parametrize(
    "method",
    [
        mpisign.signum(0.5),
        mpisign.lion(vote=False),
        mpisign.ef_signsgd(),
        mpisign.double_squeeze(),
        mpisign.top_k(0.3),
        mpisign.dgc(0.3),
        mpisign.stc(0.3),
        mpisign.qsgd(),
        mpisign.median(0.0),
        mpisign.krum(0, 0.0),
        mpisign.centered_clipping(),
    ],
    ids=lambda method: method.name,
)
def test_by_every_method_all_go_on_from_the_same(comm: MPI.Comm, method: Method) -> None:
    if "krum" in method.name and comm.size < 3:
        pytest.skip("needs 3 ranks")
    tensors = model(torch.float32)
    optimizer = wrap(tensors, 2, method=method, outer=lambda parameters: SGD(parameters, lr=0.01))
    optimizer.set_epoch(0)
    before = flats(tensors)
    train(optimizer, tensors, range(4), comm.rank)
    assert_same_everywhere(comm, tensors)
    assert any(not np.array_equal(a, b) for a, b in zip(before, flats(tensors), strict=True))
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)


def test_all_exchanges_decide_the_same_bits(comm: MPI.Comm) -> None:
    seen = []
    for exchange in ("allgather", "two_phase", "hierarchical"):
        tensors = model(torch.float32)
        outer = lambda parameters: SGD(parameters, lr=0.01)  # noqa: E731
        train(wrap(tensors, 2, method=mpisign.signum(), outer=outer, exchange=exchange), tensors, range(5), comm.rank)
        seen.append([its.tolist() for its in flats(tensors)])
    assert seen[0] == seen[1] == seen[2]


def test_what_is_in_sixteen_bits_has_common_parameters_in_fp32(comm: MPI.Comm) -> None:
    """Else a difference of less than half a unit in the last place would be lost, exchange by exchange."""
    tensors = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16))]
    optimizer = wrap(tensors, 1, method=mpisign.mean(), wrapped=SGD(tensors, lr=1.0))
    for _ in range(4):  # one rank moves by 2^-7, half of what it is above 1; the mean of several is less
        tensors[0].grad = torch.full_like(tensors[0], 2.0**-7 if comm.rank == 0 else 0.0)
        optimizer.step()
    assert optimizer.outer is not None
    (common,) = optimizer.outer.param_groups[0]["params"]
    assert common.dtype == torch.float32
    assert torch.equal(tensors[0].detach(), common.detach().to(torch.bfloat16))
    assert_same_everywhere(comm, tensors)
    if comm.size == 2:
        assert common[0].item() == 1 - 2.0**-6


# ----------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("left", [NAN, float("inf")])
def test_a_gradient_that_is_not_finite_is_not_applied(comm: MPI.Comm, left: float) -> None:
    """AdamW would keep the NaN; the rank's window goes on, and its other steps count."""
    tensors = model()
    optimizer = wrap(tensors, method=mpisign.mean())
    for at in range(6):
        gradients = drawn(at, comm.rank)
        if at == 1 and comm.rank == 0:
            gradients[2][5] = left
        give(tensors, gradients)
        optimizer.step()
    local, _ = simulated(comm.size, 6, 3, means, skips=[(1, 0)])
    assert_close(flats(tensors), local[comm.rank], 1e-12)
    assert not optimizer.report.abstentions


def test_a_difference_that_is_not_finite_is_no_vote(comm: MPI.Comm) -> None:
    """Rank 0 has a NaN in the last parameter, the first on the wire: it does not vote, and goes on from the others."""
    tensors = model()
    optimizer = wrap(tensors, 2, method=mpisign.mean())
    train(optimizer, tensors, range(1), comm.rank)
    if comm.rank == 0:
        tensors[3].data.fill_(NAN)
    train(optimizer, tensors, range(1, 2), comm.rank)
    assert_same_everywhere(comm, tensors)
    assert all(bool(t.isfinite().all()) for t in tensors)
    assert set(optimizer.report.ended_at) | set(optimizer.report.abstentions) == {0}
    if comm.size > 1:
        _, common = simulated(comm.size, 2, 2, lambda its, at: means(its[1:], at))
        assert_close(flats(tensors), common, 1e-12)
    else:
        assert_close(flats(tensors), flats(model()), 0)


def test_a_parameter_without_gradients_all_window_long_is_no_vote(comm: MPI.Comm) -> None:
    """As a gradient that is None: of a rank it is no zero, of all ranks the parameter stays as it is."""
    tensors = model()
    optimizer = wrap(tensors, 2, method=mpisign.mean())
    for at in range(2):
        gradients: list[torch.Tensor | None] = [*drawn(at, comm.rank)]
        gradients[2] = None
        if comm.rank > 0:
            gradients[0] = None
        give(tensors, gradients)
        optimizer.step()
    local, _ = simulated(1, 2, 2, means)
    assert_close(flats(tensors)[:1], local[0][:1], 1e-12)
    assert_close(flats(tensors)[2:3], flats(model())[2:3], 0)
    assert_same_everywhere(comm, tensors)


# ----------------------------------------------------------------------------------------------------- joining


@pytest.mark.mpi(min_size=2)
def test_a_rank_out_of_batches_ends_its_window_and_sits_out(comm: MPI.Comm) -> None:
    """Rank 0 has one step, the others five, in windows of two: its difference counts in the first exchange only."""
    tensors = model()
    buffers = nn.BatchNorm1d(3).double()
    optimizer = wrap(tensors, 2, method=mpisign.mean(), average_buffers=buffers)
    buffers.running_mean.fill_(comm.rank)
    train(optimizer, tensors, range(1 if comm.rank == 0 else 5), comm.rank)
    last = optimizer.join()
    assert last == 1
    assert_same_everywhere(comm, tensors)

    skips = [(at, 0) for at in range(1, 6)] + [(5, rank) for rank in range(1, comm.size)]

    def of_those_who_have_some(differences: list[list[Floats]], at: int) -> list[Floats]:
        return means(differences if at == 0 else differences[1:], at)

    _, common = simulated(comm.size, 6, 2, of_those_who_have_some, skips)
    assert_close(flats(tensors), common, 1e-12)
    assert set(comm.allgather(buffers.running_mean[0].float().item())) == {(comm.size - 1) / 2}
    train(optimizer, tensors, range(6, 10), comm.rank)  # and all go on, in step
    assert_same_everywhere(comm, tensors)
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)


def test_joining_within_a_window_leaves_equal_ranks(comm: MPI.Comm) -> None:
    tensors = model()
    optimizer = wrap(tensors, 8, method=mpisign.mean())
    train(optimizer, tensors, range(3), comm.rank)
    optimizer.join()
    _, common = simulated(comm.size, 3, 3, means)
    assert_close(flats(tensors), common, 1e-12)
    optimizer.join()
    assert_close(flats(tensors), common, 1e-12)
    assert_same_everywhere(comm, tensors)


def test_buffers_are_averaged_if_asked(comm: MPI.Comm) -> None:
    """Those with a NaN are left out; what is no floating-point number stays each rank's own."""
    tensors = model()
    layer = nn.BatchNorm1d(4)
    optimizer = wrap(tensors, 2, average_buffers=layer)
    layer.running_mean.fill_(comm.rank)
    layer.running_var.fill_(NAN if comm.rank == 0 else 2.0)
    layer.num_batches_tracked.fill_(comm.rank)
    train(optimizer, tensors, range(1), comm.rank)
    assert layer.running_mean[0] == comm.rank
    train(optimizer, tensors, range(1, 2), comm.rank)
    if comm.size > 1:
        assert set(layer.running_mean.tolist()) == {(comm.size - 1) / 2}
        assert set(layer.running_var.tolist()) == {2.0}
    assert layer.num_batches_tracked == comm.rank


def test_a_mask_that_is_not_finite_keeps_no_other_buffer_from_its_mean(comm: MPI.Comm) -> None:
    tensors = model()
    module = nn.Module()
    module.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    module.register_buffer("mean", torch.full((3,), float(comm.rank)))
    train(wrap(tensors, 1, average_buffers=module), tensors, range(1), comm.rank)
    assert set(module.get_buffer("mean").tolist()) == {(comm.size - 1) / 2}
    assert torch.equal(module.get_buffer("mask"), torch.full((2, 2), -float("inf")).triu(1))


# --------------------------------------------------------------------------------------------- ranks that differ


@pytest.mark.mpi(min_size=2)
def test_ranks_with_other_windows_are_told(comm: MPI.Comm) -> None:
    tensors = model()
    optimizer = wrap(tensors, 2 if comm.rank == 0 else 3)
    with pytest.raises(ConsistencyError, match="'every' of parameter group 0"):
        train(optimizer, tensors, range(3), comm.rank)


@pytest.mark.mpi(min_size=2)
def test_common_parameters_that_differ_are_found(comm: MPI.Comm) -> None:
    """Within a window the model's own may differ, and the common ones must not."""
    tensors = model()
    holder = nn.ParameterList(tensors)
    optimizer = wrap(tensors, 3)
    train(optimizer, tensors, range(4), comm.rank)
    mpisign.check_consistency(holder, optimizer)
    with optimizer.common_parameters():
        mpisign.check_consistency(holder, optimizer)
        mpisign.check_consistency(holder)
    with pytest.raises(ConsistencyError, match="parameter '0'"):
        mpisign.check_consistency(holder)
    assert optimizer.outer is not None
    if comm.rank == 1:
        optimizer.outer.param_groups[0]["params"][1].data[0, 0] += 1
    with pytest.raises(ConsistencyError, match="the common 'p1'"):
        mpisign.check_consistency(holder, optimizer)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("steps", [3, 4])
def test_ranks_that_come_anew_get_all_that_is_common(comm: MPI.Comm, steps: int) -> None:
    """At a window's end, and within one."""
    tensors = model()

    def optimizer_of(tensors: Sequence[torch.Tensor]) -> mpisign.DistributedSignOptimizer:
        outer = lambda parameters: SGD(parameters, lr=0.7, momentum=0.9)  # noqa: E731
        return wrap(tensors, 3, method=mpisign.mean(), outer=outer)

    optimizer = optimizer_of(tensors)
    train(optimizer, tensors, range(steps), comm.rank)
    before, tensors = (tensors, optimizer.state_dict()), model()
    optimizer = optimizer_of(tensors)
    if comm.rank == 0:
        optimizer.load_state_dict(before[1])
        for new, old in zip(tensors, before[0], strict=True):
            new.data.copy_(old)
    mpisign.broadcast_parameters(ballots.named(tensors))
    mpisign.broadcast_optimizer_state(optimizer)
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)
    assert_same_everywhere(comm, tensors)
    train(optimizer, tensors, range(steps, 6), comm.rank)
    assert_same_everywhere(comm, tensors)
    assert optimizer.report.step == 1
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)
