"""The largest coordinates and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from mpisign.backends import Flag, backend_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.errors import GradientError, OptionError
from mpisign.policy import StepContext

__all__ = ["TopK", "top_k"]

FEW = 4096
"""Entries that are looked through sooner than a sample of them."""

DEVIATIONS = 4.0
"""By so many standard deviations a sample's threshold is lower than its best guess, which is too high half the time."""


@dataclass(frozen=True)
class TopK(Codec):
    """The ``k = max(1, round(ratio n))`` entries of largest magnitude: k indices, then k fp32 values, 64 bits each.

    Where that is no shorter than the n values themselves, those are sent. fp64 values travel as fp32.

    Args:
        ratio: share of each parameter's coordinates that is sent, in (0, 1].
        sample: guess a threshold from this share of the coordinates, and look for the k largest among those above
            it only (they are found all the same); None for the default: 0.01 on the host, all on a GPU.
        vectors: whether parameters of one dimension (biases, norms) are sparse too; if not they are sent whole.

    Raises:
        OptionError: ``ratio`` or ``sample`` is out of range.
    """

    ratio: float = 0.01
    sample: float | None = None
    vectors: bool = True
    name = "top_k"

    def __post_init__(self) -> None:
        for name, value in (("ratio", self.ratio), ("sample", 1.0 if self.sample is None else self.sample)):
            if not (isinstance(value, Real) and 0.0 < value <= 1.0):
                raise OptionError(f"{name}={value!r} must be in (0, 1], e.g. {name}=0.001 for one coordinate in 1000")

    def of(self, parameter: torch.Tensor) -> TopK:
        check_places(self.name, parameter)
        return self if self.vectors or parameter.dim() > 1 else TopK(1.0)

    def count(self, elements: int) -> int:
        """How many coordinates of ``elements`` are sent."""
        return min(elements, max(1, round(self.ratio * elements)))

    def length(self, elements: int) -> int:
        return min(elements, 2 * self.count(elements))

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        if message[0].numel() == values.numel():
            return backend_for(values.device).all_finite(message[0].view(torch.float32).copy_(values))
        chosen = top_k(values, self.count(values.numel()), self.sample)
        indices, sent = _parts(message)
        indices.copy_(chosen)
        sent.copy_(values[chosen])
        return backend_for(values.device).all_finite(sent)

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        if message.shape[1] == out.numel():
            out.add_(message[0].view(torch.float32), alpha=alpha)
        else:
            indices, values = _parts(message)
            within = indices.clamp(
                0, out.numel() - 1
            )  # another rank's may be any bits, and a GPU does not survive them
            out.index_add_(0, within, values.to(out.dtype), alpha=alpha)

    def clear(self, message: torch.Tensor, out: torch.Tensor) -> None:
        """Set ``out`` (n,) to 0 where the message has values."""
        if message.shape[1] == out.numel():
            out.zero_()
        else:
            out.index_fill_(0, _parts(message)[0].long(), 0.0)


def check_places(codec: str, parameter: torch.Tensor) -> None:
    """Raise :class:`GradientError` if a parameter has more elements than a place in 32 bits can tell."""
    if parameter.numel() >= 2**31:
        raise GradientError(
            f"{codec} sends places in 32 bits, and a parameter of shape {tuple(parameter.shape)} has more elements "
            f"than they can tell: give its group another method, such as mpisign.signum()"
        )


def top_k(values: torch.Tensor, count: int, sample: float | None = None) -> torch.Tensor:
    """The indices (count,) of the entries of ``values`` (n,) with the largest magnitude, in no particular order.

    With ``sample``, or on the host unless they are few, the k-th largest magnitude is first guessed from evenly spaced
    entries, low enough to have enough candidates almost always; if they are too few after all, all are looked at.

    Source: Lin et al., "Deep Gradient Compression", 2018, section 5 (hierarchical selection).
    """
    backend = backend_for(values.device)
    if sample is None and values.numel() > FEW:
        sample = backend.sample
    if sample is not None and count < values.numel():
        few = values[:: max(1, int(1.0 / sample))].abs()
        expected = count * few.numel() / values.numel()  # of the k largest; their number is a Poisson variable
        rank = min(few.numel(), int(expected + DEVIATIONS * (1 + expected**0.5)))
        candidates = backend.at_least(values, few.topk(rank, sorted=False).values.min())
        if count <= candidates.numel() < values.numel():
            return candidates[values[candidates].abs().topk(count, sorted=False).indices]
    return values.abs().topk(count, sorted=False).indices


def _parts(message: Planes) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a message: indices (k,) int32, values (k,) fp32."""
    half = message[0].numel() // 2
    return message[0][:half], message[0][half:].view(torch.float32)
