"""The gradients of a layout's parameters, fit to be sent: dense, and in the wire's order."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_

import torch

from mpisign.bitmap.tensors import DTYPES, is_laid_as
from mpisign.errors import GradientError
from mpisign.layout import Layout

__all__ = ["Gradients"]

# Calls in C, as each look at a tensor from Python takes longer than what it finds out.
_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


def _looks_of(tensors: Sequence[torch.Tensor]) -> tuple[object, ...]:
    """Of which types they are, where, and how they are laid out."""
    layouts = list(map(_layout, tensors))
    dense = layouts.count(torch.strided) == len(layouts)  # others have no strides
    return (
        layouts,
        list(map(_dtype, tensors)),
        list(map(torch.Tensor.get_device, tensors)),
        list(map(torch.Tensor.stride, tensors)) if dense else None,
    )


class Gradients:
    """Reads ``p.grad`` on one rank.

    A model on a GPU has hundreds of tensors, and to look closely at one takes a microsecond. So each is looked at
    closely only if the gradients are not like those of the step before.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._looks: tuple[object, ...] | None = None  # of the latest gradients, which were fit
        self._shapes = [parameter.shape for parameter in layout.parameters]
        self._parameters_look = _looks_of(layout.parameters)
        self._held: tuple[list[int], list[tuple[int, ...]]] = [], []  # addresses and strides of parameters that look so

    def fits(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether these are the layout's parameters, and still look as they did when it was made."""
        kept = self._layout.parameters
        if len(kept) != len(parameters) or not all(map(is_, kept, parameters)):
            return False
        held = list(map(torch.Tensor.data_ptr, parameters)), list(map(torch.Tensor.stride, parameters))
        if held != self._held:  # new, or given other data by their owner
            shapes = [parameter.shape for parameter in parameters]
            if shapes != self._shapes or _looks_of(parameters) != self._parameters_look:
                return False
            self._held = held
        return True

    def read(self) -> list[torch.Tensor | None]:
        """By parameter, in wire order, or None.

        Raises:
            GradientError: one is sparse, of an unsupported type, or on another device.
        """
        gradients = [parameter.grad for parameter in self._layout.parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        complete = len(present) == len(gradients)
        if complete and _looks_of(present) == self._looks:
            return gradients
        gradients = [self._fit(place, gradient) for place, gradient in enumerate(gradients)]
        if complete:
            self._looks = _looks_of([gradient for gradient in gradients if gradient is not None])
        return gradients

    def _fit(self, place: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            return None
        name, parameter, strides = (
            self._layout.names[place],
            self._layout.parameters[place],
            self._layout.strides[place],
        )
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
        return gradient
