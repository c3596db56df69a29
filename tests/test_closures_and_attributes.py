"""Optimizers whose step needs a closure are refused; and the wrapper says where the wrapped one's attributes are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from voting import give_gradients, vectors

import mpisign
from mpisign import DistributedSignOptimizer, OptionError

pytestmark = pytest.mark.usefixtures("world")


class Demanding(SGD):
    """Its closure has no default, as the gradient is computed in the step."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        loss = closure()
        super().step()
        return loss


class Sam(SGD):
    """Sharpness-aware minimization as it is found in the wild: it says so only when it is called."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        return super().step(torch.enable_grad()(closure))


class Other(SGD):
    """Fails for a reason of its own."""

    def step(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("of its own")


class Rich(SGD):
    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.trust = 0.5

    def first_step(self) -> str:
        return "first"


def test_a_closure_without_default_is_refused_when_wrapped() -> None:
    SGD(vectors(3), lr=0.1)  # which lets torch put its own function around step()
    for kind in (Demanding, torch.optim.LBFGS):
        with pytest.raises(OptionError, match=rf"{kind.__name__} cannot be wrapped"):
            DistributedSignOptimizer(kind(vectors(3), lr=0.1))
    scheduled = Demanding(vectors(3), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)  # replaces step() by one of its own
    with pytest.raises(OptionError, match=r"Demanding cannot be wrapped, as its step\(\) demands a closure: .*drift"):
        DistributedSignOptimizer(scheduled)


def test_one_that_asks_for_a_closure_in_its_step_is_refused_there() -> None:
    (p,) = vectors(3)
    optimizer = DistributedSignOptimizer(Sam([p], lr=0.1))
    give_gradients([p])
    before = p.detach().clone()
    with pytest.raises(OptionError, match=r"Sam cannot be wrapped, as its step\(\) demands a closure") as caught:
        optimizer.step(lambda: torch.zeros(()))
    assert isinstance(caught.value.__cause__, AssertionError)
    assert torch.equal(p, before)


def test_other_errors_of_the_wrapped_optimizer_stay_as_they_are() -> None:
    (p,) = vectors(3)
    optimizer = DistributedSignOptimizer(Other([p], lr=0.1))
    give_gradients([p])
    with pytest.raises(RuntimeError, match=r"^of its own$"):
        optimizer.step()


def test_attributes_of_the_wrapped_optimizer_are_answered_with_advice() -> None:
    optimizer = DistributedSignOptimizer(Rich(vectors(3), lr=0.1))
    for name in ("trust", "first_step"):
        assert not hasattr(optimizer, name)
        assert getattr(optimizer, name, None) is None
        said = rf"^'DistributedSignOptimizer' object has no attribute '{name}'; the wrapped Rich has one: "
        with pytest.raises(AttributeError, match=said + rf"optimizer\.wrapped\.{name}$"):
            getattr(optimizer, name)
    assert optimizer.wrapped.trust == 0.5  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"^'DistributedSignOptimizer' object has no attribute 'no_such'$"):
        optimizer.no_such  # type: ignore[attr-defined]  # noqa: B018


def test_properties_whose_own_attribute_error_is_shown() -> None:
    """``__getattr__`` is also asked when a property fails; what was missing is named."""
    empty = DistributedSignOptimizer.__new__(DistributedSignOptimizer)
    with pytest.raises(AttributeError, match=r"no attribute '(wrapped|param_groups)'"):
        empty.param_groups  # noqa: B018


@pytest.mark.parametrize("method", [mpisign.signum(), mpisign.double_squeeze()], ids=str)
def test_copies_pickles_scalers_and_schedulers(method: mpisign.Method) -> None:
    model = nn.Linear(3, 2)
    optimizer = DistributedSignOptimizer(Rich(model.parameters(), lr=0.5), model.named_parameters(), method=method)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    copies = [copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for its in (*copies, torch.load(file, weights_only=False)):
        assert its.wrapped.first_step() == "first"
        with pytest.raises(AttributeError, match=r"optimizer\.wrapped\.first_step"):
            its.first_step()
        its.step()


@pytest.mark.filterwarnings("ignore:.* divides each coordinate", "ignore:.* averages votes")
def test_torchs_own_step_without_a_closure() -> None:
    """All of torch's own but two can."""
    for kind in vars(torch.optim).values():
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            continue
        parameters = [nn.Parameter(torch.ones(3, 3))]
        if kind in (torch.optim.LBFGS, torch.optim.SparseAdam):
            with pytest.raises(OptionError, match=rf"{kind.__name__} cannot be wrapped"):
                DistributedSignOptimizer(kind(parameters))
            continue
        optimizer = DistributedSignOptimizer(kind(parameters, lr=0.1))
        parameters[0].grad = torch.ones(3, 3)
        optimizer.step()
        assert (parameters[0] < 1.0).all(), kind
