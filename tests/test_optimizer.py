"""mpisign.optimizer keeps torch's contract. At one rank, where the same code votes alone.

What is decided is in test_optimizer_votes.py, what is saved and copied in test_optimizer_state.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from methods_table import FOUR
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR

import mpisign
from mpisign import DistributedSignOptimizer, OptionError, SynchronizationError

pytestmark = pytest.mark.usefixtures("world")

Parameters = list[nn.Parameter]


def vectors(*sizes: int) -> Parameters:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


def voting(parameters: Iterable[Any], lr: float = 1.0, **options: Any) -> DistributedSignOptimizer:
    """signSGD, so that a step of size 1 moves every coordinate by its gradient's sign."""
    return DistributedSignOptimizer(SGD(parameters, lr=lr), method=mpisign.signsgd(), **options)


def give_gradients(parameters: Iterable[torch.Tensor], value: float = 3.0) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)


def values(parameter: torch.Tensor) -> set[float]:
    return set(parameter.detach().flatten().tolist())


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
    ids=str,
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


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


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
    "a dict": (lambda m: dict(m.named_parameters()), "named_parameters must give"),
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


# --------------------------------------------------------------------------------------- parameter groups


def test_groups_have_options_of_their_own() -> None:
    a, b = vectors(3, 4)
    optimizer = voting([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=2.0)
    give_gradients([a, b])
    optimizer.step()
    assert (values(a), values(b)) == ({-0.5}, {-2.0})
    optimizer.param_groups[0]["lr"] = 8.0
    give_gradients([a, b], -3.0)
    optimizer.step()
    assert (values(a), values(b)) == ({7.5}, {0.0})


@pytest.mark.parametrize("add_to", ["wrapper", "wrapped optimizer"])
def test_a_group_added_later(add_to: str) -> None:
    a, b = vectors(3, 4)
    optimizer = DistributedSignOptimizer(SGD([a], lr=1.0), method=mpisign.signum(0.9))
    give_gradients([a])
    optimizer.step()
    (optimizer if add_to == "wrapper" else optimizer.wrapped).add_param_group({"params": [b], "lr": 0.5})
    give_gradients([a, b], -3.0)
    optimizer.step()
    assert values(a) == {-1.0 + 1.0}, "the momentum 0.9 * 0.3 - 0.3 is below zero"
    assert values(b) == {0.5}
    give_gradients([a], 0.2)
    optimizer.step()
    assert values(a) == {0.0 + 1.0}, "-0.03 * 0.9 + 0.02 would be above zero, had the memory been lost"


def test_errors_tell_the_group_added_later() -> None:
    model = two_layers()
    optimizer = voting(model[0].parameters())
    optimizer.add_param_group({"params": model[1].parameters()})
    model[1].bias.grad = model[1].bias.detach().to_sparse()
    with pytest.raises(mpisign.GradientError, match=r"'group1\.param1'"):
        optimizer.step()


def test_a_named_group_added_later() -> None:
    model = two_layers()
    optimizer = voting(model[0].named_parameters())
    optimizer.add_param_group({"params": [(f"second.{name}", p) for name, p in model[1].named_parameters()]})
    model[1].bias.grad = model[1].bias.detach().to_sparse()
    with pytest.raises(mpisign.GradientError, match=r"'second\.bias'"):
        optimizer.step()


# --------------------------------------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 5),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=1.0, total_steps=8),
}


@pytest.mark.parametrize("reload", [False, True], ids=["", "after load_state_dict"])
@pytest.mark.parametrize("attach", ["before wrapping", "to the wrapped", "to the wrapper"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(make: Callable[[Optimizer], LRScheduler], attach: str, reload: bool) -> None:
    (p,) = vectors(3)
    sgd = SGD([p], lr=1.0, momentum=0.5)  # OneCycleLR turns the momentum too
    scheduler = make(sgd) if attach == "before wrapping" else None
    optimizer = DistributedSignOptimizer(sgd, method=mpisign.signsgd())
    scheduler = scheduler or make(sgd if attach == "to the wrapped" else optimizer)

    (q,) = vectors(3)
    plain = SGD([q], lr=1.0, momentum=0.5)
    plain_scheduler = make(plain)

    for step in range(6):
        if reload and step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        give_gradients([p], 7.0)
        give_gradients([q], 1.0)  # what the vote makes of it
        for one in (optimizer, scheduler, plain, plain_scheduler):
            one.step()
        assert torch.equal(p, q)
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert len({optimizer.param_groups[0]["lr"], 1.0}) == 2, "the schedule should have moved"


def test_reduce_on_plateau() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.25)
    for _ in range(2):
        give_gradients(parameters)
        optimizer.step()
        scheduler.step(1.0)
    assert optimizer.wrapped.param_groups[0]["lr"] == 0.25


# ------------------------------------------------------------------------------------- closures and hooks


def test_a_closure_is_called_once_before_the_vote() -> None:
    (p,) = vectors(3)
    optimizer = voting([p])
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (2 * p).sum() + 5
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == 5.0
    assert values(p) == {-1.0}
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    (p,) = vectors(3)
    optimizer = voting([p], zeros="abstain")
    give_gradients([p])
    optimizer.step()
    gradient = p.grad
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert p.grad is None
    else:
        assert p.grad is gradient
        assert values(p.grad) == {0.0}
    (p * 2).sum().backward()
    optimizer.step()
    assert values(p) == {-2.0}


def test_step_hooks_run_once_around_each_step() -> None:
    (p,) = vectors(3)
    optimizer = voting([p])
    seen: list[tuple[str, Any, set[float]]] = []
    for name, target in (("outer", optimizer), ("inner", optimizer.wrapped)):
        for when, register in (("before", target.register_step_pre_hook), ("after", target.register_step_post_hook)):
            register(lambda o, args, kwargs, at=f"{when} {name}": seen.append((at, o, values(p.grad))))
    give_gradients([p])
    optimizer.step()
    assert seen == [
        ("before outer", optimizer, {3.0}),
        ("before inner", optimizer.wrapped, {1.0}),
        ("after inner", optimizer.wrapped, {1.0}),
        ("after outer", optimizer, {1.0}),
    ]


def test_a_step_pre_hook_may_change_the_arguments() -> None:
    (p,) = vectors(3)
    optimizer = voting([p])
    give_gradients([p])
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "from the hook"), kwargs))
    assert optimizer.step() == "from the hook"
    handle.remove()
    assert optimizer.step() is None


# ------------------------------------------------------------------- accumulation, synchronize(), clipping


def test_gradients_accumulate_over_several_backwards() -> None:
    (p,) = vectors(2)
    optimizer = voting([p])
    for weights in ([3.0, 1.0], [-1.0, -4.0], [-1.0, 1.0]):  # the sums are 1 and -2, the last alone is -1 and 1
        (p * torch.tensor(weights)).sum().backward()
    optimizer.step()
    assert p.tolist() == [-1.0, 1.0]
    assert optimizer.report is not None
    assert optimizer.report.step == 0, "one vote for three backwards"


def test_clipping_between_synchronize_and_step() -> None:
    (p,) = vectors(4)
    optimizer = voting([p])
    give_gradients([p])
    optimizer.synchronize()
    assert p.grad is not None
    assert values(p.grad) == {1.0}
    assert values(p) == {0.0}
    assert nn.utils.clip_grad_norm_([p], 1.0) == 2.0
    with optimizer.skip_synchronize():
        optimizer.step()
    assert p.tolist() == pytest.approx([-0.5] * 4)
    give_gradients([p])
    optimizer.step()
    assert p.tolist() == pytest.approx([-1.5] * 4)


def test_synchronize_twice_would_vote_on_votes() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    give_gradients(parameters)
    optimizer.synchronize()
    for again in (optimizer.synchronize, optimizer.step):
        with pytest.raises(SynchronizationError, match="skip_synchronize"):
            again()
    assert values(parameters[0]) == {0.0}
    optimizer.zero_grad()
    give_gradients(parameters)
    optimizer.step()
    assert values(parameters[0]) == {-1.0}


def test_a_step_that_skips_must_have_synchronized() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    give_gradients(parameters)
    with optimizer.skip_synchronize():
        with pytest.raises(SynchronizationError, match=r"call optimizer\.synchronize\(\) first"):
            optimizer.step()
        assert values(parameters[0]) == {0.0}
        optimizer.synchronize()
        optimizer.step()
        with pytest.raises(SynchronizationError):
            optimizer.step()
    assert values(parameters[0]) == {-1.0}


def test_an_error_under_skip_synchronize_ends_it() -> None:
    parameters = vectors(3)
    optimizer = voting(parameters)
    with pytest.raises(ZeroDivisionError), optimizer.skip_synchronize():
        raise ZeroDivisionError
    give_gradients(parameters)
    optimizer.step()
    assert values(parameters[0]) == {-1.0}


# --------------------------------------------------------------------------------- parameters of all kinds


def test_frozen_parameters_stay() -> None:
    frozen, trained = vectors(3, 3)
    frozen.requires_grad_(False)
    optimizer = voting([frozen, trained])
    give_gradients([trained])
    optimizer.step()
    assert (values(frozen), values(trained)) == ({0.0}, {-1.0})

    frozen.requires_grad_(True)
    give_gradients([frozen, trained])
    optimizer.step()
    assert (values(frozen), values(trained)) == ({-1.0}, {-2.0}), "thawed, it votes"


def test_a_parameter_frozen_with_a_gradient_does_not_take_it_unvoted() -> None:
    """The gradient is this rank's own: applying it would let the replicas drift apart."""
    a, b = vectors(3, 3)
    optimizer = voting([a, b])
    give_gradients([a, b])
    a.requires_grad_(False)
    optimizer.step()
    assert values(a) in ({0.0}, {-1.0}), "left alone, or voted on; not moved by the raw gradient"
    assert values(b) == {-1.0}


def test_empty_and_0_d_parameters() -> None:
    empty, scalar = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.tensor(2.0))
    for method in (mpisign.signum(), mpisign.lion(), mpisign.mean()):
        optimizer = DistributedSignOptimizer(SGD([empty, scalar], lr=1.0), method=method)
        give_gradients([empty, scalar], 1.0)
        optimizer.step()
    assert scalar.item() == -1.0


@pytest.mark.parametrize("gradient", [None, torch.zeros(0)])
def test_a_model_of_nothing_but_empty_tensors(gradient: torch.Tensor | None) -> None:
    (p,) = vectors(0)
    optimizer = voting([p])
    p.grad = gradient
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.skipped == (gradient is None)


def test_everything_frozen() -> None:
    (p,) = vectors(3)
    p.requires_grad_(False)
    optimizer = voting([p])
    optimizer.step()
    assert values(p) == {0.0}


def test_a_parameter_shared_between_modules_votes_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = voting(model.parameters(), named_parameters=model.named_parameters())
    before = model[0].weight.detach().clone()
    model(torch.randn(2, 4)).sum().backward()
    direction = model[0].weight.grad.sign()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - direction)


methods = pytest.mark.parametrize("method", FOUR, ids=lambda method: method.name)


def momentum_of(optimizer: DistributedSignOptimizer) -> torch.Tensor:
    return optimizer.state_dict()["mpisign"]["memory"][0]["momentum"]


@methods
def test_a_parameter_may_change_its_type_between_steps(method: mpisign.Method) -> None:
    (p,) = vectors(50)
    optimizer = DistributedSignOptimizer(SGD([p], lr=1.0), method=method)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        p.grad = None
        p.data = p.data.to(dtype)
        give_gradients([p], 1.0)
        optimizer.step()
        assert p.dtype == dtype
        if method.memory.fields:
            assert momentum_of(optimizer).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert values(p) == {-4.0}


@methods
def test_a_parameter_may_change_its_layout_between_steps(method: mpisign.Method) -> None:
    """The memory follows it: nothing may be mixed up."""
    shape = (4, 3, 2, 5)
    still, turned = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    optimizers = [DistributedSignOptimizer(SGD([p], lr=1.0), method=method) for p in (still, turned)]
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        if step == 2:
            turned.data = turned.data.contiguous(memory_format=torch.channels_last)
        for parameter, optimizer in zip((still, turned), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(still, turned)
        if method.memory.fields:
            one, other = map(momentum_of, optimizers)
            assert torch.equal(one, other)
            assert other.stride() == turned.stride()


@methods
def test_a_parameter_may_change_its_layout_under_its_gradient(method: mpisign.Method) -> None:
    """The gradient's own memory stays, as after ``zero_grad(set_to_none=False)`` or a step that was skipped."""
    shape = (4, 3, 2, 5)
    still, turned = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    optimizers = [DistributedSignOptimizer(SGD([p], lr=1.0), method=method) for p in (still, turned)]
    for parameter in (still, turned):
        parameter.grad = torch.zeros(shape)
    for step in range(3):
        if step == 1:
            turned.data = turned.data.contiguous(memory_format=torch.channels_last)
        for parameter, optimizer in zip((still, turned), optimizers, strict=True):
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            parameter.grad.copy_(drawn if step else drawn.fill_(torch.inf))
            optimizer.step()
        assert torch.equal(still, turned)
    if method.memory.fields:
        one, other = map(momentum_of, optimizers)
        assert torch.equal(one, other)


@methods
@pytest.mark.parametrize(("before", "after"), [(3, 100), (100, 3)])
def test_a_parameter_may_change_its_size_between_steps(method: mpisign.Method, before: int, after: int) -> None:
    (p,) = vectors(before)
    optimizer = DistributedSignOptimizer(SGD([p], lr=1.0), method=method)
    give_gradients([p], 1.0)
    optimizer.step()
    p.grad = None
    p.data = torch.zeros(after)
    give_gradients([p], -1.0)
    optimizer.step()
    assert values(p) == {1.0}, "its memory starts afresh"


@pytest.mark.parametrize("method", [mpisign.signum(), mpisign.mean()], ids=str)
def test_sparse_gradients_are_refused(method: mpisign.Method) -> None:
    embedding, head = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)
    before = embedding.weight.detach().clone()
    optimizer = DistributedSignOptimizer(SGD([*embedding.parameters(), *head.parameters()], lr=1.0), method=method)
    head(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(mpisign.GradientError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state_dict()["mpisign"]["memory"], "no memory may have taken a part of it in"


def test_unsupported_parameters_are_refused_at_once() -> None:
    with pytest.raises(mpisign.GradientError, match=r"group0\.param1.*complex64"):
        voting([*vectors(3), nn.Parameter(torch.zeros(3, dtype=torch.complex64))])


@pytest.mark.usefixtures("world")
def test_a_closure_under_skip_synchronize_is_refused() -> None:
    (parameter,) = vectors(3)
    optimizer = voting([parameter])
    parameter.grad = torch.ones(3)
    optimizer.synchronize()
    with optimizer.skip_synchronize(), pytest.raises(mpisign.SynchronizationError, match="closure"):
        optimizer.step(lambda: 0.0)
    assert parameter.tolist() == [0.0] * 3


@pytest.mark.usefixtures("world")
def test_a_parameter_taken_out_is_forgotten() -> None:
    kept, gone = vectors(3, 4)
    optimizer = DistributedSignOptimizer(SGD([{"params": [kept]}, {"params": [gone]}], lr=1.0))
    for _ in range(2):
        kept.grad, gone.grad = torch.ones(3), torch.ones(4)
        optimizer.step()
        optimizer.param_groups[1:] = []
    assert list(optimizer.state_dict()["mpisign"]["memory"]) == [0]


@pytest.mark.usefixtures("world")
def test_join_leaves_the_last_report_whole() -> None:
    (parameter,) = vectors(3)
    optimizer = voting([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.join()
    assert optimizer.report is not None
    assert optimizer.report.agreement() == [1.0]
