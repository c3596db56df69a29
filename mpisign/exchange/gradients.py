"""The gradients of a layout's parameters, fit to be sent: dense, and in the wire's order."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_

import torch

from mpisign.bitmap.tensors import DTYPES, is_laid_as
from mpisign.errors import GradientError
from mpisign.layout import Layout
from mpisign.method import Method

__all__ = ["Gradients"]

# Calls in C, as each look at a tensor from Python takes longer than what it finds out.
_gradient, _dtype = attrgetter("grad"), attrgetter("dtype")


def _form(parameter: torch.Tensor) -> tuple[object, ...]:
    return parameter.shape, parameter.dtype, parameter.device, parameter.stride()


def _signature_of(gradients: Sequence[torch.Tensor | None]) -> tuple[object, ...] | None:
    """Which there are, of which types and sizes, where, and how laid out; None if one has no strides."""
    present = [gradient for gradient in gradients if gradient is not None]
    try:
        return (
            [gradient is None for gradient in gradients],
            list(map(_dtype, present)),
            list(map(torch.Tensor.numel, present)),
            list(map(torch.Tensor.get_device, present)),
            list(map(torch.Tensor.stride, present)),
            bool(present) and present[0].is_inference(),
        )
    except RuntimeError:  # sparse
        return None


class Gradients:
    """Reads ``p.grad`` on one rank.

    A model on a GPU has hundreds of tensors, and to look closely at one takes a microsecond. So it is done only if the
    gradients do not look like those of the step before.
    """

    def __init__(self, layout: Layout, methods: Sequence[Method], rank: int) -> None:
        self._layout, self._rank = layout, rank
        self.methods = methods
        self._signature: tuple[object, ...] | None = None  # of the latest gradients, which were fit
        self._forms = list(map(_form, layout.parameters))
        self._held: tuple[list[int], list[tuple[int, ...]]] = [], []  # addresses and strides of parameters of that form

    def fits(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether these are the layout's parameters, and still look as they did when it was made."""
        kept = self._layout.parameters
        if len(kept) != len(parameters) or not all(map(is_, kept, parameters)):
            return False
        held = list(map(torch.Tensor.data_ptr, parameters)), list(map(torch.Tensor.stride, parameters))
        if held != self._held:  # new, or given other data by their owner
            if list(map(_form, parameters)) != self._forms:
                return False
            self._held = held
        return True

    def read(self) -> list[torch.Tensor | None]:
        """One for each parameter, or None; its elements lie in the wire's order.

        Raises:
            GradientError: one is sparse, of an unsupported type, or on another device.
        """
        gradients = list(map(_gradient, self._layout.parameters))
        if self._signature is None or _signature_of(gradients) != self._signature:
            gradients = [self._fit(place, gradient) for place, gradient in enumerate(gradients)]
            self._signature = _signature_of(gradients)
        return gradients

    def models(self) -> list[torch.Tensor | None]:
        """The parameters themselves, in wire order."""
        return [
            p.detach() if is_laid_as(p, strides) else p.detach().contiguous()
            for p, strides in zip(self._layout.parameters, self._layout.strides, strict=True)
        ]

    def _fit(self, place: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            return None
        name, parameter, strides = (
            self._layout.names[place],
            self._layout.parameters[place],
            self._layout.strides[place],
        )
        gradient = gradient.resolve_neg()
        if gradient.layout != torch.strided:
            raise GradientError(
                f"rank {self._rank}: the gradient of {name!r} is {gradient.layout}; use sparse=False in the embedding, "
                f"or densify it with p.grad = p.grad.to_dense()"
            )
        if gradient.dtype not in DTYPES or gradient.device != self._layout.device:
            raise GradientError(
                f"rank {self._rank}: the gradient of {name!r} is {gradient.dtype} on {gradient.device}; only "
                f"floating-point tensors on the parameter's device can be voted on"
            )
        if not is_laid_as(gradient, strides):
            # Another order of elements than the others expect (or overlapping memory): put it in order.
            ordered = torch.empty_strided(parameter.shape, strides, dtype=gradient.dtype, device=gradient.device)
            parameter.grad = gradient = ordered.copy_(gradient)
        if gradient.is_inference():  # as one that a decision can be written to
            parameter.grad = gradient = gradient.clone()
        return gradient
