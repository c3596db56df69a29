"""What mpisign.optimizer decides and applies, against NumPy. At one rank, where the same code votes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gpu_branch import gpu_branch, needs_compiler
from methods_table import FOUR, among, packs_signs
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import mpisign
from mpisign import DistributedSignOptimizer, Method

pytestmark = pytest.mark.usefixtures("world")

SIZES = [33, 1, 0, 700, 64]
PACKING = among(1, packs_signs)
each_of_four = pytest.mark.parametrize("method", FOUR, ids=lambda method: method.name)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
Update = Callable[[oracle.Floats, oracle.Floats], tuple[oracle.Floats, oracle.Floats]]

METHODS: dict[str, tuple[Method, Update]] = {
    "signsgd": (mpisign.signsgd(), lambda kept, g: (g, kept)),
    "signum": (mpisign.signum(0.9), lambda v, g: oracle.momentum(v, g, 0.9)),
    "lion": (mpisign.lion(0.9, 0.99), lambda m, g: oracle.lion(m, g, 0.9, 0.99)),
}


def random_gradient(step: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def decisions(gradients: list[list[oracle.Floats]], update: Update, **policy: Any) -> list[list[oracle.Ballot]]:
    """What one rank decides: by step, by parameter."""
    sizes = [len(g) for g in gradients[0]]
    starts = oracle.first_words(sizes)
    kept = [np.zeros(size) for size in sizes]
    result: list[list[oracle.Ballot]] = []
    for step, by_parameter in enumerate(gradients):
        result.append([])
        for i, g in enumerate(by_parameter):
            sent, kept[i] = update(kept[i], g)
            # What rounding could turn would make the comparison a matter of luck.
            assert (np.abs(sent[sent != 0]) > 1e-6).all()
            result[-1].append(oracle.decide([sent], step, starts[i], **policy)[0])
    return result


# ---------------------------------------------------------------------------------------- the algorithms


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "update"), METHODS.values(), ids=METHODS)
def test_sign_methods_follow_their_paper(method: Method, update: Update, dtype: torch.dtype, exchange: str) -> None:
    """x <- x - lr (sign + weight_decay x), Bernstein et al. 2018, Algorithm 1, and the same for Lion's signs."""
    lr, decay, steps = 2.0**-5, 2.0**-3, 6
    gradients = [[random_gradient(step, (size,), dtype) for size in SIZES] for step in range(steps)]
    expected = decisions([[g.double().numpy() for g in by_step] for by_step in gradients], update)

    parameters = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in SIZES]
    sgd = SGD(parameters, lr=lr, weight_decay=decay)
    optimizer = DistributedSignOptimizer(sgd, method=method, exchange=exchange, apply="optimizer")
    x = [np.ones(size) for size in SIZES]
    for by_parameter, signs in zip(gradients, expected, strict=True):
        for parameter, gradient in zip(parameters, by_parameter, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for i, parameter in enumerate(parameters):
            assert parameter.grad is not None
            assert parameter.grad.tolist() == signs[i].tolist()
            x[i] -= lr * (signs[i] + decay * x[i])
            np.testing.assert_allclose(parameter.detach().double().numpy(), x[i], rtol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("zeros", ["coin", "abstain", "positive"])
@pytest.mark.parametrize(("method", "update"), METHODS.values(), ids=METHODS)
def test_what_zeros_vote(method: Method, update: Update, zeros: str) -> None:
    gradients = [[random_gradient(step, (size,), torch.float32) for size in SIZES] for step in range(3)]
    for by_parameter in gradients:
        for g in by_parameter:
            g[::2] = 0.0
            g[::6] = -0.0
    as_numpy = [[g.double().numpy() for g in by_step] for by_step in gradients]
    expected = decisions(as_numpy, update, zeros=zeros, seed=-7)
    parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    optimizer = DistributedSignOptimizer(
        SGD(parameters, lr=1.0), method=method, zeros=zeros, seed=-7, apply="optimizer"
    )
    for by_parameter, signs in zip(gradients, expected, strict=True):
        for parameter, gradient in zip(parameters, by_parameter, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        assert [p.grad.tolist() for p in parameters if p.grad is not None] == [s.tolist() for s in signs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), lambda p: AdamW(p, lr=0.1)],
    ids=["SGD", "AdamW"],
)
def test_the_mean_of_one_rank_is_the_plain_optimizer_bit_for_bit(
    make: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype
) -> None:
    ours, theirs = ([nn.Parameter(torch.ones(size, dtype=dtype)) for size in SIZES] for _ in range(2))
    optimizer, plain = DistributedSignOptimizer(make(ours), method=mpisign.mean()), make(theirs)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = random_gradient(step, a.shape, dtype)
            b.grad = a.grad.clone()
        optimizer.step()
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
@pytest.mark.parametrize("of_gradient", DTYPES, ids=str)
@pytest.mark.parametrize("of_parameter", DTYPES, ids=str)
@each_of_four
def test_gradients_of_another_dtype(method: Method, of_parameter: torch.dtype, of_gradient: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=of_parameter))
    parameter.grad_dtype = of_gradient
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=method)
    gradient = torch.tensor([2.0, -0.5, 1.0], dtype=of_gradient)
    for _ in range(2):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert parameter.tolist() == (-2 * (gradient.sign() if method.elects else gradient)).tolist()


@pytest.mark.parametrize("cap", [1e-6, 1e-3, 1.0])
def test_buckets_do_not_change_the_coins(cap: float) -> None:
    parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    optimizer = DistributedSignOptimizer(
        SGD(parameters, lr=1.0), method=mpisign.signsgd(), bucket_cap_mb=cap, apply="optimizer"
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = decisions([[np.zeros(size) for size in SIZES]], METHODS["signsgd"][1])[0]
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [s.tolist() for s in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "update"), METHODS.values(), ids=METHODS)
def test_large_parameters(method: Method, update: Update, dtype: torch.dtype) -> None:
    """Past half a million elements memory and codec work piece by piece."""
    size = 1_200_001
    parameter = nn.Parameter(torch.zeros(size, dtype=dtype))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=method, apply="optimizer")
    zero = [*range(0, size, 20_011), size - 1]
    kept = np.zeros(size)
    for step in range(2):
        gradient = random_gradient(step, (size,), dtype)
        gradient[gradient.abs() < 2**-6] = 1.0
        gradient[zero] = 0.0
        parameter.grad = gradient.clone()
        optimizer.step()
        sent, kept = update(kept, gradient.double().numpy())
        decisive = np.abs(sent) > 1e-5
        assert decisive.mean() > 0.999
        assert (parameter.grad.double().numpy() == np.sign(sent))[decisive].all()
        key = oracle.coin_key(0, step, oracle.zeros_stream(0))
        coins = [1.0 if oracle.coin_word(key, i // 32) >> i % 32 & 1 else -1.0 for i in zero]
        assert parameter.grad[zero].tolist() == coins


# --------------------------------------------------------------------------------------- memory layouts

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "row-major": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "with gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "at an offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
@each_of_four
def test_layouts_in_memory(method: Method, of_parameter: str, of_gradient: str) -> None:
    shape = (4, 3, 2, 5)
    parameter = nn.Parameter(LAYOUTS[of_parameter](torch.zeros(shape)))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=method)
    for _ in range(2):
        gradient = random_gradient(1, shape, torch.float32)
        parameter.grad = LAYOUTS[of_gradient](gradient)
        optimizer.step()
    expected = gradient.sign() if method.elects else gradient
    torch.testing.assert_close(parameter.detach(), -2 * expected, rtol=0, atol=0)


def test_coins_follow_the_parameter_s_own_order() -> None:
    """The order on the wire is the memory's, so a coin belongs to a place in memory."""
    parameter = nn.Parameter(torch.zeros(4, 3, 2, 5).contiguous(memory_format=torch.channels_last))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=mpisign.signsgd(), apply="optimizer")
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected, _ = oracle.decide([np.zeros(120)], step=0)
    assert parameter.grad.permute(0, 2, 3, 1).flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_gradients(dtype: torch.dtype) -> None:
    """``p.sum().backward()`` gives a gradient whose elements all lie in the same place."""
    parameter = nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0))
    parameter.grad = torch.tensor([[2.0], [-2.0], [2.0]], dtype=dtype).expand(3, 4)
    optimizer.step()
    assert parameter.tolist() == [[-1.0] * 4, [1.0] * 4, [-1.0] * 4]


def test_a_channels_last_model_keeps_its_gradients_where_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)).to(memory_format=torch.channels_last)
    optimizer = DistributedSignOptimizer(SGD(model.parameters(), lr=1.0), method=mpisign.signsgd())
    model(torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
    before = [(p.detach().clone(), p.grad, p.grad.data_ptr(), p.grad.sign()) for p in model.parameters()]
    optimizer.step()
    for parameter, (value, gradient, address, sign) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert gradient.data_ptr() == address
        torch.testing.assert_close(parameter.detach(), value - sign)


# --------------------------------------------------------------------------------- who does not vote


def momentum_of(optimizer: DistributedSignOptimizer) -> list[list[float]]:
    memory = optimizer.state_dict()["mpisign"]["memory"]
    return [memory[i]["momentum"].flatten().tolist() for i in sorted(memory)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_of_four
def test_nothing_moves_when_every_gradient_is_bad(method: Method, bad: float, dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in SIZES]
    sgd = SGD(parameters, lr=0.5, momentum=0.5, weight_decay=0.5)
    optimizer = DistributedSignOptimizer(sgd, method=method)
    inner_steps = []
    sgd.register_step_post_hook(lambda *_: inner_steps.append(optimizer.report))

    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient

    def step(value: float) -> None:
        for gradient in gradients:
            gradient.fill_(value)
        optimizer.step()

    step(1.0)
    values = [p.detach().clone() for p in parameters]
    buffers = [sgd.state[p]["momentum_buffer"].clone() for p in parameters]
    memory = momentum_of(optimizer) if method.memory.fields else None
    step(bad)
    assert optimizer.report is not None
    assert optimizer.report.skipped
    assert optimizer.report.abstentions == {0: "non-finite gradient"}
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True)), "a CUDA graph would write there"
    assert len(inner_steps) == 1, "the wrapped optimizer must not even be asked"
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
    assert all(torch.equal(sgd.state[p]["momentum_buffer"], b) for p, b in zip(parameters, buffers, strict=True))
    if memory is not None:
        assert momentum_of(optimizer) == memory
    step(1.0)
    assert not optimizer.report.skipped
    assert all((p < value).all() for p, value in zip(parameters, values, strict=True))
    assert all(torch.isfinite(p).all() for p in parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [10, 1_200_000])
def test_one_bad_value_withdraws_the_ballot_and_does_not_enter_the_memory(size: int, dtype: torch.dtype) -> None:
    good, bad = (nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (5, size))
    optimizer = DistributedSignOptimizer(SGD([good, bad], lr=1.0), method=mpisign.signum(0.5))
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    bad.grad[size // 2] = torch.nan
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.skipped
    assert not good.any()
    assert not bad.any()
    assert torch.isfinite(torch.tensor(momentum_of(optimizer)[1])).all()
    assert momentum_of(optimizer)[1][size // 2] == 0.0
    good.grad, bad.grad = -torch.ones_like(good), -torch.ones_like(bad)
    optimizer.step()
    assert bad[size // 2] == 1.0


def test_huge_finite_gradients_vote() -> None:
    parameter = nn.Parameter(torch.zeros(100))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=mpisign.signum(0.5))
    for _ in range(3):
        parameter.grad = torch.full((100,), torch.finfo(torch.float32).max)
        optimizer.step()
        assert optimizer.report is not None
        assert optimizer.report.voters == (0,)


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=needs_compiler)])
def test_a_memory_that_overflows_costs_one_vote_only(gpu: bool) -> None:
    parameter = nn.Parameter(torch.zeros(100))
    voted = []
    with gpu_branch(gpu):
        optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=mpisign.signum(0.5))
        for sign in (1.0, -1.0, -1.0):  # the average crosses the whole range of floats, and its difference does not fit
            parameter.grad = torch.full((100,), sign * torch.finfo(torch.float32).max)
            optimizer.step()
            assert optimizer.report is not None
            voted.append(optimizer.report.voters)
    assert voted == [(0,), (), (0,)]


@each_of_four
def test_a_parameter_without_a_gradient_is_left_alone(method: Method) -> None:
    with_gradient, without = (nn.Parameter(torch.ones(3)) for _ in range(2))
    sgd = SGD([with_gradient, without], lr=1.0, momentum=0.9, weight_decay=0.5)
    optimizer = DistributedSignOptimizer(sgd, method=method)
    with_gradient.grad = torch.ones(3)
    optimizer.step()
    assert without.tolist() == [1.0] * 3
    assert without.grad is None
    assert without not in optimizer.state
    assert with_gradient.tolist() == [-0.5] * 3


def test_no_gradient_at_all_skips_the_step() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0, weight_decay=0.5))
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.skipped
    assert optimizer.report.abstentions == {0: "no gradient"}
    assert parameter.tolist() == [1.0] * 3


# --------------------------------------------------------------------------------------------- GradScaler


def scaled_step(
    scaler: torch.amp.GradScaler, optimizer: DistributedSignOptimizer, parameter: nn.Parameter, loss: torch.Tensor
) -> None:
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("method", [mpisign.signum(0.5), mpisign.mean()], ids=["signum", "mean"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "after unscale_()"])
def test_grad_scaler(method: Method, unscale: bool) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = torch.tensor([4.0, -2.0, 1.0])
    scaler.scale((parameter * weights).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_([parameter], 3.0)
        weights = weights.clamp(-3.0, 3.0)
    scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == (-weights.sign() if method.elects else -weights).tolist()
    if method.elects:
        assert momentum_of(optimizer) == [(weights / 2).tolist()], "the memory must not hold scaled gradients"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", PACKING.values(), ids=PACKING)
def test_grad_scaler_lets_no_small_gradient_underflow(method: Method, dtype: torch.dtype) -> None:
    """What a loss scale is for: in fp16 these gradients exist only while they are scaled."""
    size = 600_000  # more than one piece
    parameter = nn.Parameter(torch.zeros(size, dtype=dtype))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=method, zeros="abstain")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    signs = torch.tensor([1.0, -1.0, 1.0]).repeat(size // 3)
    parameter.grad = (signs * 2.0**-12).to(dtype)  # of gradients of 2 ** -28, whose share in a memory is smaller
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach().float(), -signs)
    if method.memory.fields:
        momentum = optimizer.state_dict()["mpisign"]["memory"][0]["momentum"]
        kept = 1 - method.memory.betas[1]
        torch.testing.assert_close(momentum.float(), signs * kept * 2.0**-28, rtol=1e-6, atol=0)


def test_grad_scaler_with_an_inf_skips_and_backs_off() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaled_step(scaler, optimizer, parameter, (parameter * 1024.0).sum())
    assert optimizer.report is not None
    assert optimizer.report.skipped
    assert optimizer.report.abstentions == {0: "inf found by GradScaler"}
    assert parameter.tolist() == [0.0] * 3
    assert scaler.get_scale() == 2.0**126
    scaler.update(1024.0)
    scaled_step(scaler, optimizer, parameter, (parameter * 1024.0).sum())
    assert parameter.tolist() == [-1.0] * 3
    assert not optimizer.report.skipped


def test_grad_scaler_without_a_gradient_here() -> None:
    """On another rank there may be one, so this rank must vote, or abstain, and not die."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert optimizer.report is not None
    assert optimizer.report.abstentions == {0: "no gradient"}


@each_of_four
def test_grad_scaler_with_clipping_between_synchronize_and_step(method: Method) -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = DistributedSignOptimizer(SGD([parameter], lr=1.0), method=method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    optimizer.synchronize()
    nn.utils.clip_grad_norm_([parameter], 1.0)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    assert parameter.tolist() == pytest.approx([-0.5] * 4)
