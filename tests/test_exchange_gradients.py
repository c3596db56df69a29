"""mpisign.exchange.gradients: which gradients are fit to be sent, which are put in order, which are refused."""

from __future__ import annotations

from collections.abc import Callable

import parts
import pytest
import torch
from parts import DTYPES, SHAPES
from torch import nn

import mpisign
from mpisign import GradientError
from mpisign.bitmap.located import locate
from mpisign.exchange.gradients import Gradients


def read(given: Gradients, tensors: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """As every step does."""
    assert given.fits(tensors)
    return given.read()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_in_order_is_read_where_it_lies(dtype: torch.dtype) -> None:
    tensors = parts.parameters(*SHAPES, dtypes=[dtype])
    given = parts.gradients_of(tensors)
    assert isinstance(given, Gradients)
    for step in range(3):
        parts.give(tensors, [*parts.draw(tensors, step)[:-1], None])
        gradients = read(given, tensors)
        assert gradients[-1] is None
        assert all(gradient is tensor.grad for gradient, tensor in zip(gradients, tensors, strict=True))


def disordered(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The same numbers, 0, 1, 2, ... in reading order, laid out in other ways."""
    values = torch.arange(24.0).view(shape)
    gaps = torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(values)
    turned = torch.zeros(shape[::-1]).permute(3, 2, 1, 0).copy_(values)
    return {"channels last": values.to(memory_format=torch.channels_last), "gaps": gaps, "turned": turned}


@pytest.mark.parametrize("how", ["channels last", "gaps", "turned"])
def test_what_lies_otherwise_is_put_in_order_and_becomes_the_gradient(how: str) -> None:
    (tensor,) = tensors = parts.parameters((2, 3, 2, 2))
    given = parts.gradients_of(tensors)
    for step in range(2):
        tensor.grad = disordered((2, 3, 2, 2))[how].add_(step)
        assert not tensor.grad.is_contiguous()
        (gradient,) = read(given, tensors)
        assert gradient is tensor.grad
        assert gradient is not None
        assert gradient.is_contiguous()
        assert gradient.flatten().tolist() == [float(i + step) for i in range(24)]


def test_one_number_for_all_elements_is_spread_out() -> None:
    """``loss = p.sum()`` may leave one; a decision written into it would be read by its neighbours."""
    (tensor,) = tensors = parts.parameters((3, 4))
    tensor.grad = torch.ones(1, 1).expand(3, 4)
    (gradient,) = read(parts.gradients_of(tensors), tensors)
    assert gradient is not None
    assert gradient.is_contiguous()
    assert (gradient == 1.0).all()
    assert gradient is tensor.grad


def test_the_order_is_the_parameters_own() -> None:
    weight = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    given = parts.gradients_of([weight])
    weight.grad = torch.arange(24.0).view(2, 3, 2, 2)
    (gradient,) = read(given, [weight])
    assert gradient is not None
    assert gradient.stride() == weight.stride()
    assert torch.equal(gradient, torch.arange(24.0).view(2, 3, 2, 2))


def test_strides_of_dimensions_of_one_say_nothing() -> None:
    (tensor,) = tensors = parts.parameters((5, 1, 3))
    odd = torch.zeros(15).as_strided((5, 1, 3), (3, 77, 1))
    tensor.grad = odd
    (gradient,) = read(parts.gradients_of(tensors), tensors)
    assert gradient is odd


def test_a_negative_view_is_read_as_what_it_stands_for_in_every_step() -> None:
    (tensor,) = tensors = parts.parameters((3, 4))
    given = parts.gradients_of(tensors)
    for step in range(3):
        values = torch.arange(12.0).view(3, 4) + step
        tensor.grad = torch._neg_view(values) if step != 1 else values
        (gradient,) = read(given, tensors)
        assert gradient is tensor.grad
        assert gradient is not None
        assert not gradient.is_neg()
        assert torch.equal(gradient, values if step == 1 else -values)


def test_what_is_read_is_known_by_where_it_lies() -> None:
    """Whoever packs or unpacks takes these numbers and does not ask the tensors."""
    tensors = parts.parameters((4, 3), (5,), (0,))
    given = parts.gradients_of(tensors)
    for step, absent in enumerate([None, None, 1, 0, None]):
        drawn: list[torch.Tensor | None] = [*parts.draw(tensors, step)]
        if absent is not None:
            drawn[absent] = None
        parts.give(tensors, drawn)
        located = given.read()
        places = located.places
        assert places.complete == (absent is None)
        assert places.at.tolist() == [0 if g is None else g.data_ptr() for g in located]
        assert places.elements.tolist() == [-1 if g is None else g.numel() for g in located]
        for order in ((2, 0), (1, 2, 0), (0, 1, 2)):
            chosen = located.chosen(order)
            assert all(mine is located[place] for mine, place in zip(chosen, order, strict=True))
            assert chosen.places.same(locate(list(chosen)).places)


# ------------------------------------------------------------------------------------------------------ refusals


def sparse(tensor: nn.Parameter) -> None:
    tensor.grad = torch.zeros_like(tensor).to_sparse()


def integer(tensor: nn.Parameter) -> None:
    tensor.grad = None
    tensor.grad_dtype = torch.int32
    tensor.grad = torch.ones(tensor.shape, dtype=torch.int32)


REFUSED: list[tuple[Callable[[nn.Parameter], None], str]] = [(sparse, "sparse=False")]
if hasattr(torch.Tensor, "grad_dtype"):  # torch 2.10 and later
    REFUSED.append((integer, "torch.int32 on cpu"))


@pytest.mark.parametrize(("spoil", "says"), REFUSED)
@pytest.mark.parametrize("known", [False, True], ids=["first step", "later step"])
def test_what_cannot_be_voted_on_is_refused_and_changes_nothing(
    spoil: Callable[[nn.Parameter], None], says: str, known: bool
) -> None:
    tensors = parts.parameters((4, 3), (40,), (5,))
    given = parts.gradients_of(tensors, rank=3)
    if known:
        parts.give(tensors, parts.draw(tensors, 0))
        read(given, tensors)
    parts.give(tensors, parts.draw(tensors, 1))
    spoil(tensors[1])
    held, before = [t.grad for t in tensors], parts.copies([tensors[0].grad, tensors[2].grad])
    assert given.fits(tensors)
    for _ in range(2):
        with pytest.raises(GradientError, match=rf"rank 3: the gradient of 'p1' is .*{says}"):
            given.read()
    assert all(tensor.grad is gradient for tensor, gradient in zip(tensors, held, strict=True))
    assert parts.same([tensors[0].grad, tensors[2].grad], before)
    tensors[1].grad = None
    assert read(given, tensors)[1] is None, "the next step is fine again"


# --------------------------------------------------------------------------------------------- whether it still fits


def test_other_parameters_do_not_fit() -> None:
    tensors = parts.parameters((4, 3), (40,))
    given = parts.gradients_of(tensors)
    assert given.fits(tensors)
    assert given.fits(list(tensors))
    assert not given.fits(tensors[:1])
    assert not given.fits([*tensors, *parts.parameters((2,))])
    assert not given.fits(tensors[::-1])
    assert not given.fits([tensors[0], *parts.parameters((40,))]), "one like it is not it"
    assert given.fits(tensors)


@pytest.mark.parametrize(
    "data",
    [torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, 4).t(), torch.zeros(4, 6)[:, ::2]],
    ids=["shape", "dtype", "strides", "gaps"],
)
def test_parameters_given_another_form_do_not_fit(data: torch.Tensor) -> None:
    tensors = parts.parameters((4, 3), (40,))
    given = parts.gradients_of(tensors)
    assert given.fits(tensors)
    tensors[0].data = data
    assert not given.fits(tensors)


def test_parameters_given_other_data_of_the_same_form_fit() -> None:
    tensors = parts.parameters((4, 3), (40,))
    given = parts.gradients_of(tensors)
    assert given.fits(tensors)
    tensors[0].data = torch.ones(4, 3)
    assert given.fits(tensors)


def test_gradients_that_only_look_alike_in_part_are_looked_at_again() -> None:
    """None here, then there; another size of storage; another order: nothing is taken for what it was."""
    tensors = parts.parameters((4, 3), (4, 3))
    given = parts.gradients_of(tensors)
    ones = torch.ones(4, 3)
    for gradients in ([ones, None], [None, ones], [ones, ones], [None, None], [ones, ones]):
        parts.give(tensors, gradients)
        assert [g is None for g in read(given, tensors)] == [g is None for g in gradients]
    tensors[0].grad = torch.arange(12.0).view(3, 4).t()
    gradient, _ = read(given, tensors)
    assert gradient is not None
    assert gradient.is_contiguous()


def test_what_was_in_order_for_one_parameter_may_not_be_for_another() -> None:
    """Of equal shape, but one lies turned; then one and then the other has a gradient that looks the same."""
    plain, turned = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3, 4).t())
    given = parts.gradients_of([plain, turned])
    values = torch.arange(12.0).view(4, 3)
    parts.give([plain, turned], [values, None])
    read(given, [plain, turned])
    plain.grad, turned.grad = None, values.clone()
    _, gradient = read(given, [plain, turned])
    assert gradient is not None
    assert gradient.stride() == turned.stride()
    assert torch.equal(gradient, values)


# ------------------------------------------------------------------------------------------------------- models


def test_models_are_the_parameters_themselves_where_they_are_dense() -> None:
    dense, gaps = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 6)[:, ::2])
    first, second = parts.gradients_of([dense, gaps], mpisign.monna(0)).models()
    assert first is not None
    assert second is not None
    assert first.data_ptr() == dense.data_ptr()
    assert second.is_contiguous()
    assert second.data_ptr() != gaps.data_ptr()
    assert not first.requires_grad
    assert not second.requires_grad
