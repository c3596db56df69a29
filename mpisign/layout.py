"""Where each parameter lies on the wire: segments in buckets, and a fingerprint that all ranks must share.

Every parameter is one segment. Segments fill buckets in reverse registration order, the order in which
backward produces gradients. A bucket is one message; it is cut when it reaches the cap, or where the type of
the wire changes (fp64 among fp32 under a dense codec). Buckets are cut once, when the layout is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpisign.bitmap.tensors import DTYPES, strides_of
from mpisign.codecs import Codec
from mpisign.errors import GradientError

__all__ = ["FORMAT_VERSION", "Bucket", "Layout", "Segment"]

FORMAT_VERSION = 1
"""Version of the wire format; ranks that run different ones refuse each other."""


@dataclass(frozen=True)
class Segment:
    """One parameter on the wire: items ``start .. stop`` of its bucket's message.

    ``index``: place among the layout's parameters; ``numel``: elements; ``first_word``: the same start in the
    numbering that runs through all buckets, from which the coins are drawn.
    """

    index: int
    name: str
    numel: int
    start: int
    stop: int
    first_word: int


@dataclass(frozen=True)
class Bucket:
    """One message: ``length`` items of ``dtype``; ``first_word`` is the global number of item 0."""

    index: int
    dtype: np.dtype[np.generic]
    length: int
    first_word: int
    segments: tuple[Segment, ...]


class Layout:
    """The wire layout of some parameters under a codec.

    Args:
        parameters: (name, parameter) in registration order, the same on every rank.
        codec: decides how many items of which type a parameter takes.
        cap_bytes: a bucket is closed when one plane of its message reaches this size.

    Attributes:
        parameters: the tensors, in registration order.
        buckets: the messages, in the order in which they are sent.

    Raises:
        GradientError: a parameter's dtype, device or layout cannot be voted on.
    """

    def __init__(self, parameters: Sequence[tuple[str, torch.Tensor]], codec: Codec, cap_bytes: float) -> None:
        self.names = tuple(name for name, _ in parameters)
        self.parameters = tuple(parameter for _, parameter in parameters)
        self.strides = tuple(strides_of(parameter) for parameter in self.parameters)
        for name, parameter in parameters:
            _check_supported(name, parameter)
        self.buckets = tuple(self._cut(codec, cap_bytes))

    def _cut(self, codec: Codec, cap_bytes: float) -> Iterator[Bucket]:
        index = first_word = length = 0
        dtype: np.dtype[np.generic] | None = None
        segments: list[Segment] = []
        for place in reversed(range(len(self.parameters))):
            parameter = self.parameters[place]
            wire = codec.wire_dtype(parameter.dtype)
            if segments and (wire != dtype or length * wire.itemsize >= cap_bytes):
                assert dtype is not None
                yield Bucket(index, dtype, length, first_word, tuple(segments))
                index, first_word, length, segments = index + 1, first_word + length, 0, []
            dtype = wire
            stop = length + codec.length(parameter.numel())
            segments.append(Segment(place, self.names[place], parameter.numel(), length, stop, first_word + length))
            length = stop
        if segments:
            assert dtype is not None
            yield Bucket(index, dtype, length, first_word, tuple(segments))

    @property
    def elements(self) -> int:
        """Coordinates in all."""
        return sum(parameter.numel() for parameter in self.parameters)

    def lines(self) -> list[str]:
        """One line a parameter and a bucket: all that must be equal on every rank for its bits to mean the same."""
        parameters = [
            f"{name!r} {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')} strides {strides}"
            for name, p, strides in zip(self.names, self.parameters, self.strides, strict=True)
        ]
        return parameters + [f"bucket {b.index} of {b.length} {b.dtype} items" for b in self.buckets]

    def fingerprint(self, settings: Sequence[str]) -> int:
        """63 bits that stand for the wire format, the parameters, the buckets and ``settings`` (any text)."""
        digest = hashlib.blake2b(digest_size=8)
        for line in (f"format {FORMAT_VERSION}", *settings, *self.lines()):
            digest.update(line.encode() + b"\0")
        return int.from_bytes(digest.digest(), "little") >> 1


def _check_supported(name: str, parameter: torch.Tensor) -> None:
    if parameter.dtype not in DTYPES:
        raise GradientError(
            f"parameter {name!r} is {parameter.dtype}: only float32, float64, float16 and bfloat16 can be voted "
            f"on; give it to an optimizer of its own"
        )
    if parameter.device.type != "cpu":
        raise GradientError(
            f"parameter {name!r} is on {parameter.device}: this release votes on CPU tensors only; "
            f"move the model with model.cpu()"
        )
    if parameter.layout != torch.strided:
        raise GradientError(f"parameter {name!r} has layout {parameter.layout}: only dense tensors can be voted on")
