"""Where each parameter lies on the wire: segments in buckets, and a fingerprint that all ranks must share.

Every parameter is one segment. Segments fill buckets in reverse registration order, the order in which backward
produces gradients, whatever groups an optimizer has. A bucket is one message, of one method; it is cut when it reaches
the cap, or where the type of the wire changes (fp64 among fp32 under a dense codec). Buckets are cut once, when the
layout is made.

Words are numbered method by method, so that neither the cap nor where other methods' parameters stand changes a coin.

A message whose items mean something only together (a scale and its bits) cannot be cut into shards anywhere. Where
such messages shall be decided shard by shard, the segments themselves are cut at the shards' borders, at multiples of
32 elements, into pieces. Their coins are numbered by words of elements, so that cuts do not change them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mpisign.backends import BACKENDS, backend_for
from mpisign.bitmap.host import words_for
from mpisign.bitmap.tensors import DTYPES, strides_of, unreadable
from mpisign.codecs import Codec
from mpisign.errors import GradientError
from mpisign.method import Method
from mpisign.rules import PieceRule, VectorRule

__all__ = ["FORMAT_VERSION", "Bucket", "Layout", "Segment", "check_supported"]

FORMAT_VERSION = 4
"""Version of the wire format; ranks that run different ones refuse each other."""


@dataclass(frozen=True)
class Piece:
    """Elements ``lo .. hi`` of a parameter as items ``start .. stop`` of its bucket's message, in ``codec``.

    ``first_word``: its place in the numbering that runs through all buckets, from which coins are drawn.
    """

    lo: int
    hi: int
    start: int
    stop: int
    first_word: int
    codec: Codec


@dataclass(frozen=True)
class Segment:
    """One parameter on the wire: its place among the layout's parameters, its elements, its pieces (usually one)."""

    index: int
    name: str
    numel: int
    codec: Codec
    pieces: tuple[Piece, ...]

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        return self.pieces[-1].stop

    @property
    def first_word(self) -> int:
        return self.pieces[0].first_word


@dataclass(frozen=True)
class Bucket:
    """One message of ``method``: ``length`` items of ``dtype``; ``first_word`` is the global number of item 0."""

    index: int
    method: Method
    dtype: torch.dtype
    length: int
    first_word: int
    segments: tuple[Segment, ...]


class Layout:
    """The wire layout of some parameters under their methods.

    Args:
        parameters: (name, parameter) in registration order, the same on every rank.
        methods: by parameter. Their codecs decide how many items of which type a parameter takes; all parameters whose
            rule needs whole vectors are one bucket.
        cap_bytes: a bucket is closed when one plane of its message reaches this size.
        shards_of: into how many parts of equal length, in none of which a piece ends early, a method's buckets are cut.

    Attributes:
        parameters: the tensors, in registration order.
        methods: the different ones, in the order in which backward reaches them.
        buckets: the messages, in the order in which they are sent.

    Raises:
        GradientError: a parameter's dtype, device or layout cannot be voted on, or they lie on several devices.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, torch.Tensor]],
        methods: Sequence[Method],
        cap_bytes: float,
        shards_of: Callable[[Method], int] = lambda method: 1,
    ) -> None:
        self.names = tuple(name for name, _ in parameters)
        self.parameters = tuple(parameter for _, parameter in parameters)
        for name, parameter in parameters:
            check_supported(name, parameter)
        self.strides = tuple(strides_of(parameter) for parameter in self.parameters)
        self.device = _common_device(parameters)
        self._codecs = [method.codec.of(p) for method, p in zip(methods, self.parameters, strict=True)]
        self._shards_of = shards_of
        # Ranks tell methods by their text, and a user's own need not be hashable.
        self._told = [str(method) for method in methods]
        self.methods = tuple({text: methods[at] for at, text in reversed([*enumerate(self._told)])}.values())
        self.buckets = self._cut(methods, cap_bytes)

    def _cut(self, methods: Sequence[Method], cap_bytes: float) -> tuple[Bucket, ...]:
        """Fill buckets with whole parameters and close them where they are full or the type changes."""
        closed: list[tuple[Method, list[int], torch.dtype]] = []
        for method in self.methods:
            places = [place for place in reversed(range(len(methods))) if self._told[place] == str(method)]
            types = {place: self._codecs[place].wire_dtype(self.parameters[place].dtype) for place in places}
            whole = isinstance(method.rule, VectorRule)
            if whole:
                types = dict.fromkeys(places, max(types.values(), key=lambda dtype: dtype.itemsize))
            filled: list[int] = []
            length = 0
            for place in places:
                full = length * types[place].itemsize >= cap_bytes and not whole
                if filled and (full or types[place] != types[filled[0]]):
                    closed.append((method, filled, types[filled[0]]))
                    filled, length = [], 0
                filled.append(place)
                length += self._codecs[place].length(self.parameters[place].numel())
            closed.append((method, filled, types[filled[0]]))
        buckets: list[Bucket] = []
        first_word = 0
        for method, places, dtype in closed:
            buckets.append(self._fill(method, first_word, places, dtype))
            by_words = isinstance(method.rule, PieceRule)
            first_word += sum(map(self._words, places)) if by_words else buckets[-1].length
        buckets.sort(key=lambda bucket: -bucket.segments[-1].index)  # as backward completes them
        return tuple(dataclasses.replace(bucket, index=index) for index, bucket in enumerate(buckets))

    def _fill(self, method: Method, first_word: int, places: Sequence[int], dtype: torch.dtype) -> Bucket:
        """Lay the parameters at ``places`` one after the other, into each shard as many words as into the others."""
        sizes = {place: self.parameters[place].numel() for place in places}
        shards = self._shards_of(method)
        quota = -(-sum(words_for(size) for size in sizes.values()) // shards)
        spans: list[list[tuple[int, int, int]]] = [[]]  # (place, lo, hi) by shard
        room = quota
        for place, size in sizes.items():
            lo = 0
            while shards > 1 and words_for(size - lo) > room:
                if room:
                    spans[-1].append((place, lo, lo + 32 * room))
                    lo += 32 * room
                spans.append([])
                room = quota
            spans[-1].append((place, lo, size))
            room -= words_for(size - lo)
        cut = [[(place, lo, hi, self._codecs[place].part(lo, hi)) for place, lo, hi in shard] for shard in spans]
        length = max(sum(codec.length(hi - lo) for _, lo, hi, codec in shard) for shard in cut)
        ends = itertools.accumulate(map(self._words, places), initial=first_word)
        words = dict(zip(places, ends, strict=False))
        pieces: dict[int, list[Piece]] = {place: [] for place in places}
        for number, shard in enumerate(cut):
            start = number * length
            for place, lo, hi, codec in shard:
                stop = start + codec.length(hi - lo)
                first = words[place] + lo // 32 if isinstance(method.rule, PieceRule) else first_word + start
                pieces[place].append(Piece(lo, hi, start, stop, first, codec))
                start = stop
        segments = tuple(Segment(at, self.names[at], sizes[at], self._codecs[at], tuple(pieces[at])) for at in places)
        return Bucket(0, method, dtype, length * shards, first_word, segments)

    def _words(self, place: int) -> int:
        """How far a parameter that may be cut moves the numbering on: by its words, and one for a scale."""
        return words_for(self.parameters[place].numel()) + 1

    @functools.cached_property
    def elements(self) -> int:
        """Coordinates in all."""
        return sum(parameter.numel() for parameter in self.parameters)

    def lines(self) -> list[str]:
        """One line a parameter and a bucket: all that must be equal on every rank for its bits to mean the same."""
        parameters = [
            f"{name!r} {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')} strides {strides}"
            for name, p, strides in zip(self.names, self.parameters, self.strides, strict=True)
        ]
        buckets = [f"bucket {b.index} of {b.length} {str(b.dtype).removeprefix('torch.')} items" for b in self.buckets]
        return parameters + buckets

    def fingerprint(self, settings: Sequence[str]) -> int:
        """63 bits that stand for the wire format, the parameters, the buckets and ``settings`` (any text)."""
        digest = hashlib.blake2b(digest_size=8)
        for line in (f"format {FORMAT_VERSION}", *settings, *self.lines()):
            digest.update(line.encode() + b"\0")
        return int.from_bytes(digest.digest(), "little") >> 1


def check_supported(name: str, parameter: torch.Tensor) -> None:
    """Raise :class:`GradientError` if a parameter cannot be voted on."""
    if problem := unreadable(parameter):
        raise GradientError(f"parameter {name!r} is {problem}")
    if parameter.dtype not in DTYPES:
        raise GradientError(
            f"parameter {name!r} is {parameter.dtype}: only float32, float64, float16 and bfloat16 can be voted "
            f"on; give it to an optimizer of its own"
        )
    if parameter.device.type not in BACKENDS:
        raise GradientError(
            f"parameter {name!r} is on {parameter.device}: only CPU and CUDA tensors can be voted on; move the model "
            f"with model.to(mpisign.device())"
        )


def _common_device(parameters: Sequence[tuple[str, torch.Tensor]]) -> torch.device:
    devices: dict[torch.device, str] = {}
    for name, parameter in parameters:
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        told = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise GradientError(
            f"the parameters lie on several devices ({told}): give those of each device an optimizer of their own"
        )
    device = next(iter(devices), torch.device("cpu"))
    backend_for(device).prepare()  # now, rather than in the middle of the first step
    return device
