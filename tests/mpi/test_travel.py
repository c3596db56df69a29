"""mpisign.travel on real ranks: decisions that come some steps late are NumPy's, whatever has left before its step."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from resumable import assert_resuming_is_exact
from torch import nn
from torch.optim import SGD, AdamW

import mpisign
from mpisign import ConsistencyError, Method
from mpisign.travel import Travel

from . import ballots
from .adam_steps import (
    ADAMW,
    EXCHANGES,
    NAN,
    AdamJob,
    Decide,
    drawn,
    flats,
    give,
    means,
    model,
    nesterov,
    scaled_votes,
    train,
    wrap,
)
from .steps import assert_close, assert_same_everywhere

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def simulated(ranks: int, steps: int, every: int, delay: int, decide: Decide) -> Any:
    """All ranks' parameters after so many steps, and the common ones."""
    local, common, sent = [model() for _ in range(ranks)], flats(model()), None
    adams = [AdamW(its, **ADAMW) for its in local]
    for at in range(steps):
        for rank in range(ranks):
            give(local[rank], drawn(at, rank))
            adams[rank].step()
        if sent is not None and (at + 1) % every == delay:
            decided = decide([[c - p for c, p in zip(common, its, strict=True)] for its in sent], at // every - 1)
            common = [c - d for c, d in zip(common, decided, strict=True)]
            for its, was in zip(local, sent, strict=True):
                for tensor, value, then in zip(its, common, was, strict=True):
                    moved = value + ballots.flat(tensor) - then
                    tensor.data.copy_(torch.from_numpy(moved).view(tensor.shape))
            sent = None
        if (at + 1) % every == 0:
            sent = [[values.copy() for values in flats(its)] for its in local]
    return [flats(its) for its in local], common


def travel_of(optimizer: Any) -> Travel:
    its: Travel = optimizer._local.inner._overlap
    return its


def loaded_again(optimizer: Any) -> None:
    """As in a new process: what has left is nothing to it, and must be dropped."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("decide", [means, scaled_votes])
def test_late_decisions_are_the_oracles(comm: MPI.Comm, decide: Decide, delay: int, exchange: str) -> None:
    tensors = model()
    method = mpisign.mean() if decide is means else mpisign.scaled_vote()
    optimizer = wrap(tensors, delay=delay, method=method, exchange=exchange, ties="positive")
    for at in range(11):
        train(optimizer, tensors, range(at, at + 1), comm.rank)
        local, common = simulated(comm.size, at + 1, 3, delay, decide)
        assert_close(flats(tensors), local[comm.rank], 1e-7)
        with optimizer.common_parameters():
            assert_close(flats(tensors), common, 1e-7)
            assert_same_everywhere(comm, tensors)
        assert_close(flats(tensors), local[comm.rank], 1e-7)
        mpisign.check_consistency(nn.ParameterList(tensors), optimizer)
        undecided = at >= 2 and (at + 1) % 3 < delay
        assert optimizer._local.windows.is_undecided == undecided
        if undecided and at > 4 and comm.size > 1:  # all have agreed on the plan
            assert travel_of(optimizer)._round is not None
            assert travel_of(optimizer)._round.submitted > 0
    assert optimizer.report.step == 2


@pytest.mark.parametrize(
    "method",
    [
        mpisign.signum(0.5),
        mpisign.scaled_vote(error_feedback=True),
        mpisign.ef_signsgd(),
        mpisign.double_squeeze(),
        mpisign.top_k(0.3),
        mpisign.dgc(0.3, clip=1.0),
        mpisign.stc(0.3),
        mpisign.qsgd(),
        mpisign.krum(0),
        mpisign.centered_clipping(),
    ],
    ids=lambda method: method.name,
)
def test_what_has_left_early_is_what_leaves_in_the_step(comm: MPI.Comm, method: Method) -> None:
    """Bit for bit: with rounds that are dropped on one rank, or on all, and where an outer rate changes meanwhile."""
    if "krum" in method.name and comm.size < 3:
        pytest.skip("needs 3 ranks")
    seen = []
    for droppers in ((), (0,), range(comm.size)):
        tensors = model(torch.float32)
        optimizer = wrap(
            tensors, 2, delay=1, method=method, outer=lambda parameters: SGD(parameters, lr=0.1, momentum=0.5)
        )
        optimizer.set_epoch(0)
        for at in range(9):
            train(optimizer, tensors, range(at, at + 1), comm.rank)
            if optimizer._local.windows.is_undecided:
                if at >= 5:
                    optimizer.outer.param_groups[0]["lr"] *= 0.5
                if comm.rank in droppers:
                    loaded_again(optimizer)
        optimizer.join()
        assert_same_everywhere(comm, tensors)
        seen.append([its.tolist() for its in flats(tensors)])
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("delay", [1, 3])
def test_resuming_is_exact(folder: Path, delay: int) -> None:
    """Saved after two steps of six: with a decision on its way, and before."""
    assert_resuming_is_exact(
        folder, lambda: AdamJob(mpisign.double_squeeze(), delay + 1, outer=nesterov, delay=delay), until=10
    )


def test_what_is_saved_of_the_common_parameters_leaves_out_what_is_on_its_way(comm: MPI.Comm) -> None:
    tensors = model()
    optimizer = wrap(tensors, delay=2, method=mpisign.mean())
    train(optimizer, tensors, range(7), comm.rank)
    with optimizer.common_parameters():
        common = flats(tensors)
        state = optimizer.state_dict()
    assert (state["mpisign"]["local_steps"]["position"], state["mpisign"]["local_steps"]["sent"]) == (0, {})
    for tensor, value in zip(tensors, common, strict=True):
        tensor.data.copy_(torch.from_numpy(value).view(tensor.shape))
    optimizer.load_state_dict(state)
    optimizer.join()
    assert_close(flats(tensors), common, 0)


@pytest.mark.mpi(min_size=2)
def test_a_rank_out_of_batches_waits_for_what_is_on_its_way(comm: MPI.Comm) -> None:
    """Rank 0 ends with its second window undecided and a step of the third done; the others have six steps more."""
    tensors = model()
    optimizer = wrap(tensors, delay=2, method=mpisign.mean())
    train(optimizer, tensors, range(7 if comm.rank == 0 else 13), comm.rank)
    assert optimizer.join() == 1
    assert_same_everywhere(comm, tensors)
    assert optimizer.report.step == 4
    train(optimizer, tensors, range(13, 19), comm.rank)
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)
    optimizer.join()
    assert_same_everywhere(comm, tensors)


def test_a_rank_that_has_sent_what_is_not_finite_goes_on_from_the_others(comm: MPI.Comm) -> None:
    tensors = model()
    optimizer = wrap(tensors, 2, delay=1, method=mpisign.mean())
    train(optimizer, tensors, range(3), comm.rank)
    if comm.rank == 0:
        tensors[3].data.fill_(NAN)
    train(optimizer, tensors, range(3, 5), comm.rank)
    assert set(optimizer.report.ended_at) | set(optimizer.report.abstentions) == {0}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    optimizer.join()
    assert_same_everywhere(comm, tensors)


def test_sixteen_bits_do_not_move_by_being_sent(comm: MPI.Comm) -> None:
    """A parameter that has no gradient any more is what is common, bit for bit."""
    tensors = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))]
    optimizer = wrap(tensors, 2, delay=1, method=mpisign.mean(), wrapped=SGD(tensors, lr=1.0))
    for at in range(7):
        give(tensors, [torch.full_like(tensors[0], 0.003 * (comm.rank + 1)) if at < 2 else None, torch.ones(3)])
        optimizer.step()
    (common, _) = optimizer.outer.param_groups[0]["params"]
    assert torch.equal(tensors[0].detach(), common.detach().to(torch.bfloat16))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("least, said", [(0, "delay= True"), (1, "'delay' of parameter group 0")])
def test_ranks_with_other_delays_are_told(comm: MPI.Comm, least: int, said: str) -> None:
    tensors = model()
    optimizer = wrap(tensors, 3, delay=least + min(comm.rank, 1))
    with pytest.raises(ConsistencyError, match=said):
        train(optimizer, tensors, range(5), comm.rank)


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("steps", [6, 7])
def test_new_ranks_get_what_is_common_and_what_is_on_its_way_is_given_up(
    comm: MPI.Comm, steps: int, model_first: bool
) -> None:
    """Within a window and where none has begun: then, all go on from the common parameters, whatever they hold."""
    tensors = model()
    optimizer = wrap(tensors, delay=2, method=mpisign.mean())
    train(optimizer, tensors, range(steps), comm.rank)
    with optimizer.common_parameters():
        common = flats(tensors)
    if model_first:
        mpisign.broadcast_parameters(ballots.named(tensors))
    mpisign.broadcast_optimizer_state(optimizer)
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)
    if steps == 6:
        assert_close(flats(tensors), common, 0)
    if steps == 6 or model_first:
        assert_same_everywhere(comm, tensors)
    train(optimizer, tensors, range(steps, 12), comm.rank)
    optimizer.join()
    assert_same_everywhere(comm, tensors)
    mpisign.check_consistency(nn.ParameterList(tensors), optimizer)
