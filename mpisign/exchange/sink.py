"""Where a decision goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from mpisign.bitmap.located import Located
from mpisign.bitmap.tensors import is_laid_as
from mpisign.layout import Layout

__all__ = ["GradientSink", "ModelSink", "NoSink", "Sink", "StepSink"]


class Sink(Protocol):
    """Gives a decision the memory it is written to."""

    def targets(self, places: tuple[int, ...], voted: Sequence[bool]) -> Sequence[torch.Tensor | None]:
        """Where the decisions on these parameters of a layout go, dense in the wire's order; None for nowhere.

        Args:
            voted: whether somebody has voted on it; if not, there is no decision.
        """

    def written(self, places: tuple[int, ...], targets: Sequence[torch.Tensor | None]) -> None:
        """They are there."""


class GradientSink:
    """Into ``p.grad``, which becomes None where nobody has voted, and is made where this rank had none.

    Args:
        gradients: what every ``p.grad`` is now, by parameter, if that is known.
    """

    def __init__(self, layout: Layout, gradients: Located | None = None) -> None:
        self._layout, self._gradients = layout, gradients

    def targets(self, places: tuple[int, ...], voted: Sequence[bool]) -> Sequence[torch.Tensor | None]:
        if self._gradients is not None and self._gradients.places.complete and all(voted):
            return self._gradients.chosen(places)
        return list(map(self._target, places, voted))

    def written(self, places: tuple[int, ...], targets: Sequence[torch.Tensor | None]) -> None:
        """They are where they belong."""

    def _target(self, place: int, voted: bool) -> torch.Tensor | None:
        parameter, strides = self._layout.parameters[place], self._layout.strides[place]
        if not voted:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = torch.empty_strided(
                parameter.shape, strides, dtype=parameter.dtype, device=parameter.device
            )
        return parameter.grad


class ModelSink:
    """Into the parameters themselves."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def targets(self, places: tuple[int, ...], voted: Sequence[bool]) -> Sequence[torch.Tensor | None]:
        return list(map(self._target, places, voted))

    def written(self, places: tuple[int, ...], targets: Sequence[torch.Tensor | None]) -> None:
        for place, target in zip(places, targets, strict=True):
            parameter = self._layout.parameters[place]
            if target is not None and target.data_ptr() != parameter.data_ptr():
                parameter.detach().copy_(target)

    def _target(self, place: int, voted: bool) -> torch.Tensor | None:
        if not voted:
            return None
        parameter, strides = self._layout.parameters[place].detach(), self._layout.strides[place]
        if is_laid_as(parameter, strides):
            return parameter
        return torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)


class StepSink:
    """Nowhere either: bits are applied to the parameters at once, as a step of SGD, and ``p.grad`` stays.

    Args:
        parameters: where they are now.
        rates, decays: by parameter, SGD's ``lr`` and ``weight_decay``.
    """

    def __init__(self, parameters: Located, rates: Sequence[float], decays: Sequence[float]) -> None:
        self._parameters, self._rates, self._decays = parameters, rates, decays

    def targets(self, places: tuple[int, ...], voted: Sequence[bool]) -> Sequence[torch.Tensor | None]:
        chosen = self._parameters.chosen(places)
        return chosen if all(voted) else [its if vote else None for its, vote in zip(chosen, voted, strict=True)]

    def numbers(self, places: Sequence[int]) -> tuple[list[float], list[float]]:
        """The rates and decays of these parameters."""
        return [self._rates[place] for place in places], [self._decays[place] for place in places]

    def written(self, places: tuple[int, ...], targets: Sequence[torch.Tensor | None]) -> None:
        for target in targets:
            if target is not None:
                torch.autograd.graph.increment_version(target)  # as an operation of torch's would


class NoSink:
    """Nowhere: for a rank that trains no more, and only keeps running memories up to date."""

    def __init__(self, layout: Layout, running: frozenset[int]) -> None:
        self._layout, self._running = layout, running

    def targets(self, places: tuple[int, ...], voted: Sequence[bool]) -> Sequence[torch.Tensor | None]:
        return list(map(self._target, places, voted))

    def written(self, places: tuple[int, ...], targets: Sequence[torch.Tensor | None]) -> None:
        """They were not needed."""

    def _target(self, place: int, voted: bool) -> torch.Tensor | None:
        if not voted or place not in self._running:
            return None
        parameter, strides = self._layout.parameters[place], self._layout.strides[place]
        return torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
