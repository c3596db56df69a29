"""The gradients of a layout's parameters, fit to be sent: dense, and in the wire's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_

import torch

from mpisign.bitmap.located import Located, locate
from mpisign.bitmap.tensors import DTYPES, is_laid_as
from mpisign.errors import GradientError
from mpisign.layout import Layout
from mpisign.method import Method

__all__ = ["Gradients"]

# Calls in C, as each look at a tensor from Python takes longer than what it finds out.
_gradient, _dtype = attrgetter("grad"), attrgetter("dtype")


def _form(parameter: torch.Tensor) -> tuple[object, ...]:
    return parameter.shape, parameter.dtype, parameter.device, parameter.stride()


@dataclass
class _Look:
    """What gradients look like; two are equal even if they lie elsewhere.

    Attributes:
        absent: by parameter, whether there is none; the others have an entry for each that there is.
    """

    absent: list[bool]
    dtypes: list[torch.dtype]
    elements: list[int]
    strides: list[tuple[int, ...]]
    negative: bool
    inference: bool
    addresses: list[int] = field(compare=False)


def _look_at(gradients: Sequence[torch.Tensor | None]) -> _Look | None:
    """None if one has no strides."""
    absent = [gradient is None for gradient in gradients]
    present = [gradient for gradient in gradients if gradient is not None]
    try:
        return _Look(
            absent,
            list(map(_dtype, present)),
            list(map(torch.Tensor.numel, present)),
            list(map(torch.Tensor.stride, present)),
            any(map(torch.Tensor.is_neg, present)),
            bool(present) and present[0].is_inference(),
            list(map(torch.Tensor.data_ptr, present)),
        )
    except RuntimeError:  # sparse
        return None


class Gradients:
    """Reads ``p.grad`` on one rank.

    A model on a GPU has hundreds of tensors, and to look closely at one takes a microsecond. So it is done only if the
    gradients do not look like those of the step before.

    Attributes:
        parameters: the layout's, and where they lie since they have fitted the last time.
    """

    def __init__(self, layout: Layout, methods: Sequence[Method], rank: int) -> None:
        self._layout, self._rank = layout, rank
        self.methods = methods
        self._look: _Look | None = None  # at the latest gradients, which were fit
        self._places = locate([]).places  # of those
        self._forms = list(map(_form, layout.parameters))
        self._held: list[int] = []  # addresses of parameters of that form
        self.parameters = Located(layout.parameters, locate(layout.parameters).places)

    def fits(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether these are the layout's parameters, and still look as they did when it was made."""
        kept = self._layout.parameters
        if len(kept) != len(parameters) or not all(map(is_, kept, parameters)):
            return False
        held = list(map(torch.Tensor.data_ptr, parameters))
        if held != self._held:  # new, or given other data by their owner
            if list(map(_form, parameters)) != self._forms:
                return False
            self._held = held
            self.parameters = Located(parameters, self.parameters.places.moved(held))
        return True

    def read(self) -> Located:
        """One for each parameter, or None; its elements lie in the wire's order.

        Raises:
            GradientError: one is sparse, of an unsupported type, or on another device.
        """
        gradients = list(map(_gradient, self._layout.parameters))
        look, before = _look_at(gradients), self._look
        if look is None or before is None or look != before:
            gradients = [self._fit(place, gradient) for place, gradient in enumerate(gradients)]
            look, self._places = _look_at(gradients), locate(gradients).places
        elif look.addresses != before.addresses:
            self._places = self._places.moved(look.addresses)
        self._look = look
        return Located(gradients, self._places)

    def chosen(self, places: Sequence[int]) -> Located:
        """Of some parameters, as soon as they are there. Raises as :meth:`read` does."""
        return locate([self._fit(place, self._layout.parameters[place].grad) for place in places])

    def models(self) -> Located:
        """The parameters themselves, in wire order."""
        pairs = zip(self._layout.parameters, self._layout.strides, strict=True)
        return locate([p.detach() if is_laid_as(p, strides) else p.detach().contiguous() for p, strides in pairs])

    def _fit(self, place: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            return None
        name, parameter, strides = (
            self._layout.names[place],
            self._layout.parameters[place],
            self._layout.strides[place],
        )
        if gradient.is_neg():
            parameter.grad = gradient = gradient.resolve_neg()
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
