"""mpisign.memory with feedback, on one rank: what is sent and what is kept add up, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

import mpisign
from mpisign import DistributedSignOptimizer, Method
from mpisign.backends.host import Host
from mpisign.memory import ef21_step_size

pytestmark = pytest.mark.usefixtures("world")

SHAPE = (20, 10)
Gradient = Callable[[torch.Tensor, int], torch.Tensor]


@pytest.fixture(params=[None, 64], ids=["", "small blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is done block by block is done in one here, and once more in several."""
    if request.param:
        monkeypatch.setattr(Host, "cache", request.param)


def wrap(x: torch.nn.Parameter, method: Method, lr: float = 0.1) -> DistributedSignOptimizer:
    return DistributedSignOptimizer(torch.optim.SGD([x], lr=lr), method=method)


def zeros(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape or SHAPE, dtype=torch.float64))


def gradients(steps: int) -> torch.Tensor:
    return torch.randn(steps, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(optimizer: DistributedSignOptimizer, x: torch.nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """Returns what was applied."""
    x.grad = gradient.clone()
    optimizer.step()
    return x.grad.clone()


def memory(optimizer: DistributedSignOptimizer, field: str) -> torch.Tensor:
    return optimizer.state_dict()["mpisign"]["memory"][0][field]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------- error feedback


@pytest.mark.parametrize("rates", [(0.1,) * 6, (0.1, 0.2, 0.05, 0.05, 1.0, 0.3)], ids=["constant", "changing"])
@pytest.mark.parametrize("method", [mpisign.ef_signsgd(), mpisign.top_k(0.05)], ids=lambda method: method.name)
def test_what_is_applied_and_what_is_owed_is_sgd(method: Method, rates: Sequence[float]) -> None:
    """x_t - lr e_t = x_0 - the sum of lr g, also as the rate changes: the error is rescaled."""
    x = zeros()
    optimizer, expected = wrap(x, method), torch.zeros(SHAPE, dtype=torch.float64)
    for rate, g in zip(rates, gradients(len(rates)), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        step(optimizer, x, g)
        expected -= rate * g
        assert_close(x.detach() - rate * memory(optimizer, "error"), expected)


def test_a_change_of_the_rate_rescales_the_error() -> None:
    x = zeros()
    optimizer = wrap(x, mpisign.ef_signsgd(), lr=0.1)
    first, second = gradients(2)
    step(optimizer, x, first)
    error = memory(optimizer, "error").clone()
    optimizer.param_groups[0]["lr"] = 0.4
    applied = step(optimizer, x, second)
    assert_close(applied + memory(optimizer, "error"), error / 4 + second)


# ------------------------------------------------------------------------------------------- EF21, DGC, Adam


@pytest.mark.parametrize(
    "method",
    [mpisign.ef21(0.1), mpisign.ef21(None), mpisign.ef21_sgdm(0.9, 0.1), mpisign.ef21_w([3.0])],
    ids=["top-k", "signs", "momentum", "weights"],
)
def test_ef21_applies_the_estimate(method: Method) -> None:
    x = zeros()
    optimizer = wrap(x, method)
    for g in gradients(4):
        applied = step(optimizer, x, g)
        assert_close(applied, memory(optimizer, "estimate"))
        assert_close(applied, memory(optimizer, "average"))


@pytest.mark.parametrize(("momentum", "ratio"), [(0.0, 0.1), (0.5, 0.1), (0.0, None)])
def test_ef21_finds_a_gradient_that_stays(momentum: float, ratio: float | None) -> None:
    x = zeros()
    optimizer = wrap(x, mpisign.ef21_sgdm(momentum, ratio))
    (g,) = gradients(1)
    gaps = [float((step(optimizer, x, g) - g).norm()) for _ in range(60)]
    assert gaps[-1] < 0.3 * gaps[0] if ratio is None else gaps[-1] < 1e-6


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_dgc_that_sends_all(nesterov: bool, masking: bool) -> None:
    """It is momentum SGD: what is always sent is never late, so that masking leaves its momentum alone."""
    x, y = zeros(), zeros()
    method = mpisign.dgc(1.0, 0.9, nesterov, warmup_epochs=0, masking=masking)
    optimizer = wrap(x, method)
    reference = torch.optim.SGD([y], lr=0.1, momentum=0.9, nesterov=nesterov)
    for g in gradients(4).float().double():
        step(optimizer, x, g)
        y.grad = g.clone()
        reference.step()
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_dgc_sends_every_momentum_once(nesterov: bool) -> None:
    x = zeros()
    optimizer = wrap(x, mpisign.dgc(0.05, 0.9, nesterov, warmup_epochs=0, masking=False))
    sent, velocity, total = (torch.zeros(SHAPE, dtype=torch.float64) for _ in range(3))
    for g in gradients(5):
        sent += step(optimizer, x, g)
        velocity = 0.9 * (velocity + g) if nesterov else 0.9 * velocity + g
        total += velocity + g if nesterov else velocity
        assert_close(sent + memory(optimizer, "residual"), total)
        assert_close(memory(optimizer, "velocity"), velocity)


def test_dgc_masks_the_momentum_of_what_was_sent() -> None:
    x = zeros()
    optimizer = wrap(x, mpisign.dgc(0.05, warmup_epochs=0))
    (g,) = gradients(1)
    sent = step(optimizer, x, g) != 0
    assert sent.count_nonzero() == 10
    assert_close(memory(optimizer, "velocity"), 0.9 * g * ~sent)


def test_dgc_clips_the_gradient_of_the_rank() -> None:
    x = zeros()
    optimizer = wrap(x, mpisign.dgc(1.0, 0.0, clip=2.0, warmup_epochs=0))
    (g,) = gradients(1)
    torch.testing.assert_close(step(optimizer, x, g), 2 * g / g.norm(), rtol=1e-6, atol=1e-6)


def test_dgc_sends_less_from_epoch_to_epoch_and_vectors_whole() -> None:
    weight, bias = zeros(100, 100), zeros(50)
    sgd = torch.optim.SGD([weight, bias], lr=0.1)
    optimizer = DistributedSignOptimizer(sgd, method=mpisign.dgc(0.01, warmup_epochs=2, sample=None))
    for epoch, share in enumerate((0.25, 0.05, 0.01, 0.01)):
        optimizer.set_epoch(epoch)
        weight.grad, bias.grad = (torch.randn_like(p) for p in (weight, bias))
        optimizer.step()
        assert weight.grad.count_nonzero() == 10_000 * share
        assert bias.grad.count_nonzero() == 50


@pytest.mark.parametrize("freeze_step", [10**9, 2])
def test_one_bit_adam_is_adam_until_it_freezes(freeze_step: int) -> None:
    x = zeros()
    optimizer = wrap(x, mpisign.one_bit_adam(freeze_step, 0.8, 0.99, 1e-6))
    m, v = (torch.zeros(SHAPE, dtype=torch.float64) for _ in range(2))
    for at, g in enumerate(gradients(4)):
        applied = step(optimizer, x, g)
        if at < freeze_step:
            m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g * g
            assert_close(applied, m / (v.sqrt() + 1e-6))
        else:
            assert_close(applied, memory(optimizer, "momentum") / (v.sqrt() + 1e-6))
            assert memory(optimizer, "error").any()
        assert_close(memory(optimizer, "variance"), v)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_step_size_of_ef21(weighted: bool) -> None:
    """alpha = 3/4 makes xi = 1; L_m = 1, 7 have the means 4 and 5."""
    assert ef21_step_size([1.0, 7.0], 0.75, weighted=weighted) == pytest.approx(1 / 8 if weighted else 1 / 9)
    assert ef21_step_size([1.0, 7.0], 1.0, weighted=weighted, global_smoothness=2.0) == pytest.approx(1 / 2)


# ---------------------------------------------------------------------------- where the sign alone goes wrong


def descend(method: Method, start: Sequence[float], gradient: Gradient, steps: int, lr: float) -> torch.Tensor:
    x = zeros(len(start))
    x.data.copy_(torch.tensor(start))
    optimizer = wrap(x, method, lr)
    for at in range(steps):
        step(optimizer, x, gradient(x.detach(), at))
        optimizer.param_groups[0]["lr"] = lr / (at + 2) ** 0.5
    return x.detach()


def test_rare_large_gradients_need_error_feedback() -> None:
    """f(x) = x / 4, whose gradient is 4 once in four steps and else -1: the sign climbs."""

    def gradient(x: torch.Tensor, at: int) -> torch.Tensor:
        return torch.full_like(x, 4.0 if at % 4 == 0 else -1.0)

    assert descend(mpisign.signsgd(), [0.0], gradient, 100, 0.1) > 0
    assert descend(mpisign.ef_signsgd(), [0.0], gradient, 100, 0.1) < 0


@pytest.mark.long
def test_a_sign_can_be_orthogonal_to_where_to_go() -> None:
    """f = eps |x1 + x2| + |x1 - x2| from (1, 1): the sign keeps x1 + x2 = 2 for ever."""

    def gradient(x: torch.Tensor, at: int) -> torch.Tensor:
        apart = torch.tensor([1.0, -1.0], dtype=x.dtype) * (1.0 if x[0] >= x[1] else -1.0)
        return 0.5 * torch.sign(x.sum()) + apart

    assert float(descend(mpisign.signsgd(), [1.0, 1.0], gradient, 500, 0.1).sum()) == pytest.approx(2.0)
    assert abs(float(descend(mpisign.ef_signsgd(), [1.0, 1.0], gradient, 500, 0.1).sum())) < 0.2


def test_signs_of_single_terms_may_never_descend() -> None:
    """f = <a1, x>^2 + <a2, x>^2 with a = +-(1, -1) + eps (1, 1), one term a step."""
    a = torch.tensor([[1.5, -0.5], [-0.5, 1.5]], dtype=torch.float64)

    def gradient(x: torch.Tensor, at: int) -> torch.Tensor:
        return 2 * (a[at % 2] @ x) * a[at % 2]

    def loss(x: torch.Tensor) -> float:
        return float((a @ x).square().sum())

    start = [1.0, 1.0]
    assert loss(descend(mpisign.signsgd(), start, gradient, 400, 0.05)) >= 2.0 - 1e-9
    assert loss(descend(mpisign.ef_signsgd(), start, gradient, 400, 0.05)) < 0.1


# --------------------------------------------------------------------------------- steps that do not count


@pytest.mark.parametrize("make", [mpisign.one_bit_adam, mpisign.zero_one_adam])
def test_momentum_is_not_owed_twice_when_a_nan_is_elsewhere(make: Callable[..., Method]) -> None:
    """The gradients of steps that did not count are, and come with the next: as many as there were."""
    x, other = zeros(), zeros(3)
    optimizer = DistributedSignOptimizer(torch.optim.SGD([x, other], lr=0.1), method=make(3))
    constant = torch.full(SHAPE, 0.5, dtype=torch.float64)

    def moved(bad: bool) -> float:
        before = x.detach().clone()
        x.grad, other.grad = constant.clone(), torch.ones(3, dtype=torch.float64)
        if bad:
            other.grad[0] = float("nan")
            x.grad[0, 0] = float("nan")
        optimizer.step()
        return float((x.detach() - before)[1:].abs().mean())

    for _ in range(200):
        usual = moved(False)
    sums = [moved(True) for _ in range(20)]
    assert sums == [0.0] * 20
    after = [moved(False) for _ in range(10)]
    owed = (1 - 0.9) * 20  # the gradients of 20 steps, each a tenth of the momentum that they have made
    assert after[0] < (1 + owed) * usual * 1.2
    assert sum(after) < (10 + 2.5 * owed / (1 - 0.9)) * usual
