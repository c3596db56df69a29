"""mpisign.optimizer keeps torch's contract: what it wraps, options and names. At one rank, where it votes alone.

How it steps is in test_optimizer_steps.py, whatever may happen to parameters in test_optimizer_parameters.py, what is
decided in test_optimizer_votes.py, and what is saved and copied in test_optimizer_state.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from voting import give_gradients, two_layers, values, vectors, voting

import mpisign
from mpisign import DistributedSignOptimizer, OptionError

pytestmark = pytest.mark.usefixtures("world")

# ---------------------------------------------------------------------------------------- what it wraps


def test_it_is_an_optimizer() -> None:
    (p,) = vectors(3)
    sgd = SGD([p], lr=0.5, momentum=0.25)
    optimizer = DistributedSignOptimizer(sgd)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.wrapped is sgd
    assert optimizer.param_groups is sgd.param_groups
    assert optimizer.state is sgd.state
    assert optimizer.defaults is sgd.defaults
    assert optimizer.report is None
    give_gradients([p])
    optimizer.step()
    assert set(optimizer.state) == {p}
    assert optimizer.state[p]["momentum_buffer"].tolist() == [1.0] * 3, "the wrapped optimizer's, over votes"


def test_what_is_set_on_it_is_set_on_the_wrapped() -> None:
    optimizer = voting(vectors(3))
    for name in ("param_groups", "state", "defaults"):
        other = copy.copy(getattr(optimizer, name))
        setattr(optimizer, name, other)
        assert getattr(optimizer.wrapped, name) is other


def test_repr_says_what_it_does() -> None:
    optimizer = DistributedSignOptimizer(SGD(vectors(3), lr=0.125), zeros="abstain", ties="zero", exchange="allgather")
    for part in ("signum", "zeros='abstain'", "ties='zero'", "exchange='allgather'", "SGD", "lr: 0.125"):
        assert part in repr(optimizer)


def test_what_it_does_not_know_is_an_error() -> None:
    with pytest.raises(AttributeError):
        voting(vectors(3)).no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.LBFGS([p]), "LBFGS .* curvature"),
        (lambda p: torch.optim.SparseAdam([p]), "SparseAdam .* dense"),
        (lambda p: voting([p]), "already"),
        (lambda p: nn.Linear(2, 2), r"Linear is not a torch\.optim\.Optimizer"),
    ],
    ids=["LBFGS", "SparseAdam", "twice", "no optimizer"],
)
def test_what_cannot_be_wrapped(make: Callable[[nn.Parameter], Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        DistributedSignOptimizer(make(vectors(3)[0]))


@pytest.mark.parametrize("adaptive", [torch.optim.Adam, AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_an_adaptive_optimizer_warns_once(adaptive: type[Optimizer]) -> None:
    parameters = vectors(3)
    with pytest.warns(UserWarning, match=f"{adaptive.__name__} divides .* magnitude") as warned:
        optimizer = DistributedSignOptimizer(adaptive(parameters, lr=0.1))
    assert len(warned) == 1
    assert warned[0].filename == __file__, "it should point at the line that wraps"
    for _ in range(2):
        give_gradients(parameters)
        optimizer.step()
    DistributedSignOptimizer(adaptive(parameters, lr=0.1), method=mpisign.mean())


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "signum"}, r"method='signum' .*mpisign\.signum"),
        ({"method": mpisign.signum}, "is not a Method"),
        ({"zeros": "negative"}, "zeros='negative' .*'coin', 'abstain', 'positive'"),
        ({"ties": "abstain"}, "ties='abstain' .*'coin', 'zero', 'positive'"),
        ({"exchange": "ring"}, "exchange='ring' .*'auto', 'allgather', 'two_phase'"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb=0"),
        ({"bucket_cap_mb": -1.0}, r"bucket_cap_mb=-1\.0"),
        ({"bucket_cap_mb": float("nan")}, "bucket_cap_mb=nan"),
        ({"bucket_cap_mb": "1"}, "bucket_cap_mb='1'"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_options_are_checked_when_it_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DistributedSignOptimizer(SGD(vectors(3), lr=1.0), **options)


@pytest.mark.parametrize("cap", [1e-9, 0.5, 10**6, float("inf")])
def test_any_positive_cap_will_do(cap: float) -> None:
    parameters = vectors(3, 100, 5)
    optimizer = voting(parameters, bucket_cap_mb=cap)
    give_gradients(parameters)
    optimizer.step()
    assert all(values(p) == {-1.0} for p in parameters)


def test_before_init_and_after_shutdown() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    give_gradients(parameters)
    mpisign.shutdown()
    with pytest.raises(mpisign.NotInitializedError, match="DistributedSignOptimizer"):
        voting(parameters)
    with pytest.raises(mpisign.NotInitializedError, match="step"):
        optimizer.step()
    assert values(parameters[0]) == {0.0}
    mpisign.init()
    optimizer.step()
    assert values(parameters[0]) == {-1.0}, "it goes on in the new job"


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("named_in_torch", [False, True])
def test_errors_use_the_names(named_in_torch: bool) -> None:
    model = two_layers()
    held = model.named_parameters() if named_in_torch else model.parameters()
    optimizer = voting(held, named_parameters=None if named_in_torch else model.named_parameters())
    model[1].weight.grad = model[1].weight.detach().to_sparse()
    with pytest.raises(mpisign.GradientError, match=r"rank 0: .*'1\.weight'"):
        optimizer.step()


def test_without_names_errors_tell_group_and_place() -> None:
    model = two_layers()
    optimizer = voting([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    model[1].bias.grad = model[1].bias.detach().to_sparse()
    with pytest.raises(mpisign.GradientError, match=r"group1\.param1"):
        optimizer.step()


NAMINGS: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "twice": (lambda m: [*m.named_parameters(), ("again", m[0].weight)], "named twice, '0.weight' and 'again'"),
    "two of one name": (lambda m: [(name[2:], p) for name, p in m.named_parameters()], "two parameters .*'weight'"),
    "too few": (lambda m: list(m.named_parameters())[:3], r"the optimizer has 'group0\.param3'"),
    "too many": (lambda m: [*m.named_parameters(), ("x", vectors(2)[0])], "named_parameters has 'x', .*does not"),
    "no names": (lambda m: m.parameters(), "named_parameters must give"),
    "names alone": (lambda m: [name for name, _ in m.named_parameters()], "named_parameters must give"),
    "no parameters": (
        lambda m: [(name, at) for at, (name, _) in enumerate(m.named_parameters())],
        "named_parameters must give",
    ),
    "a dict": (lambda m: dict(m.named_parameters()), "named_parameters=dict has no"),
}


@pytest.mark.parametrize(("naming", "message"), NAMINGS.values(), ids=NAMINGS)
def test_misnamed(naming: Callable[[nn.Sequential], Any], message: str) -> None:
    model = two_layers()
    with pytest.raises(OptionError, match=message):
        voting(model.parameters(), named_parameters=naming(model))


def test_frozen_parameters_may_be_named_without_being_held() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    optimizer = voting(model[1].parameters(), named_parameters=model.named_parameters())
    give_gradients(model[1].parameters())
    optimizer.step()
