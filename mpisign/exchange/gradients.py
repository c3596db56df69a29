"""The gradients of a layout's parameters, fit to be sent: dense, and in the wire's order."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch

from mpisign.bitmap.tensors import DTYPES, is_laid_as
from mpisign.errors import GradientError
from mpisign.layout import Layout

__all__ = ["Gradients", "looks_of"]

_kind = attrgetter("layout", "dtype", "device")
_form = attrgetter("dtype", "device", "shape")


def looks_of(parameters: Sequence[torch.Tensor]) -> list[object]:
    """Which tensors these are and how they are laid out: equal lists, equal tensors."""
    return [*map(id, parameters), *map(_form, parameters), *map(torch.Tensor.stride, parameters)]


class Gradients:
    """Reads ``p.grad`` on one rank.

    To look closely at a tensor takes Python a microsecond, and a model on a GPU has hundreds. So each is looked at
    closely only if the gradients are not like those of the step before.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._kinds = [(torch.strided, p.dtype, p.device) for p in layout.parameters]
        self._strides: list[tuple[int, ...]] = []  # of the latest ones, which were fit

    def read(self) -> list[torch.Tensor | None]:
        """By parameter, in wire order, or None.

        Raises:
            GradientError: one is sparse, of an unsupported type, or on another device.
        """
        gradients = [parameter.grad for parameter in self._layout.parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        if (
            len(present) == len(gradients)
            and list(map(_kind, present)) == self._kinds
            and list(map(torch.Tensor.stride, present)) == self._strides
        ):
            return gradients
        gradients = [self._fit(place, gradient) for place, gradient in enumerate(gradients)]
        self._strides = [() if gradient is None else gradient.stride() for gradient in gradients]
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
