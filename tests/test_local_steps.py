"""mpisign.local_steps at one rank: options, what is refused, and that a local step is torch's own.

A window of one rank by :func:`mpisign.mean` moves the common parameters to the local ones, so that with ``every`` all
is as it is without mpisign. That ranks go on from a common decision is in mpi/test_local_steps.py.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from methods_table import SOME, TABLE
from torch import nn
from torch.optim import SGD, AdamW
from windowed import backward, batch, layers, local, pair, same, train

import mpisign
from mpisign import DistributedSignOptimizer, GradientError, OptionError, SynchronizationError
from mpisign.local_steps import check_method

pytestmark = pytest.mark.usefixtures("world")

NAN = float("nan")


# ------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("every", [0, -1, 1.5, "8", True])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(OptionError, match="every="):
        local(layers(), every)


@pytest.mark.parametrize("delay", [3, 4, -1, 0.5])
def test_a_delay_is_shorter_than_a_window(delay: Any) -> None:
    with pytest.raises(OptionError, match="delay="):
        local(layers(), 3, delay=delay)


@pytest.mark.parametrize(
    "options", [{"outer": lambda its: SGD(its, lr=1.0)}, {"average_buffers": nn.BatchNorm1d(2)}, {"delay": 1}]
)
def test_options_of_local_steps_need_every(options: Any) -> None:
    with pytest.raises(OptionError, match="say every how many"):
        DistributedSignOptimizer(SGD(layers().parameters(), lr=1.0), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outer": lambda its: None}, "has made a NoneType"),
        ({"outer": lambda its: SGD(layers().parameters(), lr=1.0)}, "just the parameter groups"),
        ({"average_buffers": [torch.zeros(2)]}, "average_buffers=list is no module"),
        ({"overlap": True}, "overlap=True"),
        ({"backward_passes_per_step": 2}, "backward_passes_per_step=2 is for overlap"),
    ],
)
def test_impossible_options(options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        local(layers(), **options)


MAKES_SENSE = {"signsgd", "signum", "lion", "scaled_vote", "weighted_vote", "qsgd", "terngrad", "ef_signsgd"}
MAKES_SENSE |= {"double_squeeze", "top_k", "stc", "dgc", "mean", "median", "trimmed_mean", "krum", "multi_krum", "cge"}
MAKES_SENSE |= {"geometric_median", "centered_clipping", "nearest_neighbour_mixing"}
NEED_A_RATE = {"signsgd", "signum", "lion", "weighted_vote"}


@pytest.mark.parametrize("name", TABLE)
def test_methods_on_differences(name: str) -> None:
    """Each is taken or refused with a reason, and a vote without a scale wants to know how far to go."""
    method, kind = TABLE[name](SOME), name.split(maxsplit=1)[0]
    for outer in (None, lambda its: SGD(its, lr=0.01)):
        if kind in MAKES_SENSE and not (outer is None and kind in NEED_A_RATE):
            check_method(method, outer is not None)
            continue
        reason = "need a rate" if kind in NEED_A_RATE else "do not go together"
        with pytest.raises(OptionError, match=rf"every= and method={re.escape(method.name)}.* {reason}"):
            check_method(method, outer is not None)


def test_a_groups_method_is_looked_at_too() -> None:
    model = layers()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "method": mpisign.ef21()}]
    with pytest.raises(OptionError, match="every= and method=ef21"):
        local(model, wrapped=AdamW(groups))


def test_a_type_that_cannot_be_exchanged() -> None:
    tensor = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(GradientError, match=r"'group0\.param0' is torch\.complex64"):
        DistributedSignOptimizer(SGD([tensor], lr=0.1), every=2, method=mpisign.mean())


def test_adam_and_momentum_do_not_warn() -> None:
    """They see gradients here, and no votes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wrapped in (AdamW, lambda its: SGD(its, lr=0.1, momentum=0.9)):
            model = layers()
            train(model, local(model, wrapped=wrapped(model.parameters()), method=mpisign.scaled_vote()), range(4))


def test_synchronize_says_what_to_do() -> None:
    model = layers()
    optimizer = local(model)
    backward(model, 0)
    with pytest.raises(SynchronizationError, match=r"before optimizer\.step\(\), which exchanges"):
        optimizer.synchronize()
    with pytest.raises(SynchronizationError), optimizer.skip_synchronize():
        optimizer.step()


# ------------------------------------------------------------------------------------------------ windows by hand


def test_windows_of_scaled_votes_are_numpys() -> None:
    """One rank's vote: signs times the mean magnitude of its difference, from which it goes on; errors are lost."""
    tensor = nn.Parameter(torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    rate, every = 0.1, 3
    optimizer = DistributedSignOptimizer(SGD([tensor], lr=rate), every=every, method=mpisign.scaled_vote())
    common = expected = tensor.detach().numpy().copy()
    for at in range(7):
        gradient = np.random.default_rng(at).normal(size=10)
        tensor.grad = torch.from_numpy(gradient)
        optimizer.step()
        expected = expected - rate * gradient
        if at % every == every - 1:
            common = expected = common - oracle.scaled_vote([common - expected], np.zeros(10, int), at // every)
        np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=0, atol=1e-8)
        assert (optimizer.report is None) == (at < every - 1)
        if optimizer.report is not None:
            assert optimizer.report.step == (at + 1) // every - 1


def test_an_outer_rate_scales_votes() -> None:
    tensor = nn.Parameter(torch.zeros(4))
    method = mpisign.signsgd()
    optimizer = DistributedSignOptimizer(
        SGD([tensor], lr=1.0), every=2, method=method, outer=lambda its: SGD(its, lr=0.25)
    )
    for _ in range(2):
        tensor.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
        optimizer.step()
    assert tensor.tolist() == [-0.25, 0.25, -0.25, 0.25]
    assert optimizer.outer is not None
    optimizer.outer.param_groups[0]["lr"] = 0.5  # as a schedule of its own does
    for _ in range(2):
        tensor.grad = torch.ones(4)
        optimizer.step()
    assert tensor.tolist() == [-0.75, -0.25, -0.75, -0.25]


def test_residuals_follow_the_outer_rate_alone() -> None:
    """What error feedback owes is in units of parameters, whatever the wrapped optimizer's rate does."""
    model = layers()
    optimizer = local(model, 1, method=mpisign.ef_signsgd())
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict()["mpisign"]["memory"])
    for p in model.parameters():
        p.grad = None
    optimizer.param_groups[0]["lr"] = 1e-4
    optimizer.step()
    after = optimizer.state_dict()["mpisign"]["memory"]
    assert before
    assert all(torch.equal(before[place]["error"], after[place]["error"]) for place in before)


# ---------------------------------------------------------------------------------- as with the plain optimizer


@pytest.mark.parametrize("every", [1, 3])
def test_steps_are_the_wrapped_optimizers(every: int) -> None:
    ours, optimizer, theirs, plain = pair(every)
    train(ours, optimizer, range(7))
    train(theirs, plain, range(7))
    assert same(ours, theirs)


def test_buffers_that_were_expanded_are_averaged() -> None:
    model = layers()
    model.register_buffer("statistics", torch.ones(3, 1).expand(3, 4))
    train(model, local(model, 1, average_buffers=model), range(2))
    assert torch.equal(model.get_buffer("statistics"), torch.ones(3, 4))


def test_closures_schedules_and_clipping() -> None:
    ours, optimizer, theirs, plain = pair()
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(it, 6) for it in (optimizer, plain)]
    for at in range(6):
        loss = optimizer.step(lambda at=at: backward(ours, at))
        assert loss.item() == pytest.approx(plain.step(lambda at=at: backward(theirs, at)).item(), abs=1e-12)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    train(ours, optimizer, range(6, 9), clip=0.01)
    train(theirs, plain, range(6, 9), clip=0.01)
    assert same(ours, theirs)


def test_the_option_clips_as_torch_does() -> None:
    ours, theirs = layers(), layers()
    build = lambda model: SGD(model.parameters(), lr=0.1)  # noqa: E731
    train(ours, local(ours, 3, build(ours), clip_grad_norm=0.01), range(4))
    train(theirs, build(theirs), range(4), clip=0.01)
    assert same(ours, theirs, 1e-6)  # torch divides by the norm and a little more


def test_accumulated_gradients() -> None:
    ours, optimizer, theirs, plain = pair(2)
    for at in range(4):
        for model in (ours, theirs):
            model.zero_grad()
        for part in range(2):
            with optimizer.no_sync():
                ours(batch(2 * at + part)).square().mean().backward()
            theirs(batch(2 * at + part)).square().mean().backward()
        optimizer.step()
        plain.step()
    assert same(ours, theirs)


def test_sparse_gradients() -> None:
    def build() -> nn.Embedding:
        torch.manual_seed(0)
        return nn.Embedding(5, 3, sparse=True)

    ours, theirs = build(), build()
    optimizer, plain = local(ours, 2, SGD(ours.parameters(), lr=0.1)), SGD(theirs.parameters(), lr=0.1)
    for _ in range(3):
        for model, its in ((ours, optimizer), (theirs, plain)):
            model.zero_grad()
            model(torch.tensor([1, 1, 4])).square().sum().backward()
            its.step()
    assert same(ours, theirs, 1e-6)


def test_sparse_gradients_are_clipped_by_their_sums() -> None:
    """A row that comes a hundred times has one gradient, by which it moves."""
    table = nn.Embedding(5, 4, sparse=True)
    before = table.weight.detach().clone()
    optimizer = local(table, 2, SGD(table.parameters(), lr=1.0), clip_grad_norm=1.0)
    table(torch.full((100,), 2)).sum().backward()
    optimizer.step()
    assert (table.weight.detach() - before).norm() == pytest.approx(1.0, rel=1e-5)


def test_a_closure_that_fails_leaves_the_window_as_it_was() -> None:
    ours, optimizer, theirs, plain = pair(2)
    train(ours, optimizer, range(1))

    def fail() -> torch.Tensor:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        optimizer.step(fail)
    train(ours, optimizer, range(1, 3))
    train(theirs, plain, range(3))
    assert same(ours, theirs)
    assert optimizer.state_dict()["mpisign"]["local_steps"]["position"] == 1


# ---------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_grad_scaler_works_as_with_the_plain_optimizer(unscaled_before: bool) -> None:
    """Also where it finds an inf: it takes the scale down, the step is left out, and the window counts it."""
    ours, optimizer, theirs, plain = pair(3)
    scales = []
    for model, its in ((ours, optimizer), (theirs, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for at in range(7):
            model.zero_grad()
            loss = model(batch(at)).square().mean()
            scaler.scale(loss * (float("inf") if at == 1 else 1.0)).backward()
            if unscaled_before:
                scaler.unscale_(its)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(its)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**11] * 2, "halved once, doubled twice"
    assert same(ours, theirs)
    assert optimizer.report.step == 1, "of two windows"


def test_a_loss_scale_is_not_taken_out_of_float16() -> None:
    """As torch refuses to: it is there for what float16 could not hold without it."""
    tensor = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = DistributedSignOptimizer(SGD([tensor], lr=1.0), [("weight", tensor)], every=2, method=mpisign.mean())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    tensor.grad = torch.full_like(tensor, 2.0**-10)
    with pytest.raises(GradientError, match=r"rank 0: the gradient of 'weight' is torch\.float16.* in float32"):
        scaler.step(optimizer)
    optimizer.step()
    assert tensor.tolist() == [-(2.0**-10)] * 3


def test_a_nan_is_no_step_and_a_window_of_them_no_vote() -> None:
    ours, optimizer, theirs, plain = pair(2)
    train(ours, optimizer, range(1))
    train(theirs, plain, range(1))
    for _ in range(3):
        backward(ours, 1)
        ours[0].weight.grad[0, 0] = NAN
        optimizer.step()
    assert same(ours, theirs)
    assert optimizer.report.skipped
    train(ours, optimizer, range(1, 4))
    train(theirs, plain, range(1, 4))
    assert same(ours, theirs)
