"""Where a decision goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mpisign.bitmap.tensors import is_laid_as
from mpisign.layout import Layout

__all__ = ["GradientSink", "ModelSink", "NoSink", "Sink", "StepSink"]


class Sink(Protocol):
    """Gives a decision the memory it is written to."""

    def target(self, place: int, voted: bool) -> torch.Tensor | None:
        """Where the decision on a layout's parameter goes, dense in the wire's order; None for nowhere.

        Args:
            voted: somebody has voted on it; if not, there is no decision.
        """

    def written(self, place: int, target: torch.Tensor) -> None:
        """It is there."""


class GradientSink:
    """Into ``p.grad``, which becomes None where nobody has voted, and is made where this rank had none."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def target(self, place: int, voted: bool) -> torch.Tensor | None:
        parameter, strides = self._layout.parameters[place], self._layout.strides[place]
        if not voted:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = torch.empty_strided(
                parameter.shape, strides, dtype=parameter.dtype, device=parameter.device
            )
        return parameter.grad

    def written(self, place: int, target: torch.Tensor) -> None:
        """It is where it belongs."""


class ModelSink:
    """Into the parameters themselves."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def target(self, place: int, voted: bool) -> torch.Tensor | None:
        if not voted:
            return None
        parameter, strides = self._layout.parameters[place].detach(), self._layout.strides[place]
        if is_laid_as(parameter, strides):
            return parameter
        return torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)

    def written(self, place: int, target: torch.Tensor) -> None:
        parameter = self._layout.parameters[place]
        if target.data_ptr() != parameter.data_ptr():
            parameter.detach().copy_(target)


class StepSink:
    """Nowhere either: bits are applied to the parameters at once, as a step of SGD, and ``p.grad`` stays.

    Args:
        rates, decays: by parameter, SGD's ``lr`` and ``weight_decay``.
    """

    def __init__(self, layout: Layout, rates: Sequence[float], decays: Sequence[float]) -> None:
        self._layout, self._rates, self._decays = layout, rates, decays

    def target(self, place: int, voted: bool) -> torch.Tensor | None:
        return self._layout.parameters[place].detach() if voted else None

    def numbers(self, places: Sequence[int]) -> tuple[list[float], list[float]]:
        """The rates and decays of these parameters."""
        return [self._rates[place] for place in places], [self._decays[place] for place in places]

    def written(self, place: int, target: torch.Tensor) -> None:
        torch.autograd.graph.increment_version(target)  # as an operation of torch's would


class NoSink:
    """Nowhere: for a rank that trains no more, and only keeps running memories up to date."""

    def __init__(self, layout: Layout, running: frozenset[int]) -> None:
        self._layout, self._running = layout, running

    def target(self, place: int, voted: bool) -> torch.Tensor | None:
        if not voted or place not in self._running:
            return None
        parameter, strides = self._layout.parameters[place], self._layout.strides[place]
        return torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)

    def written(self, place: int, target: torch.Tensor) -> None:
        """It was not needed."""
