"""mpisign.optimizer and parameters: frozen, empty, shared, sparse, and changed between steps. At one rank."""

from __future__ import annotations

import pytest
import torch
from methods_table import ALONE, FOUR
from torch import nn
from torch.optim import SGD
from voting import give_gradients, values, vectors, voting

import mpisign
from mpisign import DistributedSignOptimizer

pytestmark = pytest.mark.usefixtures("world")


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
    for method in FOUR[1:]:
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


@pytest.mark.parametrize("method", ALONE.values(), ids=ALONE)
def test_sparse_gradients_are_refused(method: mpisign.Method) -> None:
    embedding, head = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1)
    before = embedding.weight.detach().clone()
    optimizer = DistributedSignOptimizer(SGD([*embedding.parameters(), *head.parameters()], lr=1.0), method=method)
    optimizer.set_epoch(0)
    head(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(mpisign.GradientError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state_dict()["mpisign"]["memory"], "no memory may have taken a part of it in"


def test_unsupported_parameters_are_refused_at_once() -> None:
    with pytest.raises(mpisign.GradientError, match=r"group0\.param1.*complex64"):
        voting([*vectors(3), nn.Parameter(torch.zeros(3, dtype=torch.complex64))])


def test_a_parameter_taken_out_is_forgotten() -> None:
    kept, gone = vectors(3, 4)
    optimizer = DistributedSignOptimizer(SGD([{"params": [kept]}, {"params": [gone]}], lr=1.0))
    for _ in range(2):
        kept.grad, gone.grad = torch.ones(3), torch.ones(4)
        optimizer.step()
        optimizer.param_groups[1:] = []
    assert list(optimizer.state_dict()["mpisign"]["memory"]) == [0]
