"""mpisign.layout: where every parameter lies on the wire, and what the fingerprint stands for."""

from __future__ import annotations

import sys
from collections.abc import Callable

import oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mpisign
from mpisign import DistributedSignOptimizer, GradientError, Method, layout
from mpisign.codecs import Codec, Dense, SignBits
from mpisign.layout import Layout
from mpisign.memory import Identity
from mpisign.rules import MajorityVote, Mean

SIZES = [1, 31, 0, 32, 33, 1000, 64, 5]
MANY = 1 << 20

Named = list[tuple[str, torch.Tensor]]


def vectors(sizes: list[int], dtype: torch.dtype = torch.float32) -> Named:
    return [(f"p{i}", torch.zeros(size, dtype=dtype)) for i, size in enumerate(sizes)]


def laid(named: Named, codec: Codec, cap: float) -> Layout:
    """All parameters by one method."""
    rule = MajorityVote() if codec.ballots else Mean()
    return Layout(named, [Method(Identity(), codec, rule)] * len(named), cap)


def in_order(wire: Layout) -> list[int]:
    return [segment.index for bucket in wire.buckets for segment in bucket.segments]


def test_segments_start_on_words_in_reverse_registration_order() -> None:
    (bucket,) = laid(vectors(SIZES), SignBits(), MANY).buckets
    assert [segment.index for segment in bucket.segments] == list(reversed(range(len(SIZES))))
    starts = oracle.first_words(SIZES)
    for segment in bucket.segments:
        size = SIZES[segment.index]
        assert segment.name == f"p{segment.index}"
        assert segment.numel == size
        assert segment.start == segment.first_word == starts[segment.index]
        assert segment.stop - segment.start == -(-size // 32)
    assert bucket.length == sum(-(-size // 32) for size in SIZES)
    assert bucket.dtype == torch.int32


@pytest.mark.parametrize("cap", [0, 1, 4, 5, 8, 12, 136, 10**9])
def test_buckets_close_when_they_have_reached_the_cap(cap: int) -> None:
    wire = laid(vectors(SIZES), SignBits(), cap)
    assert in_order(wire) == list(reversed(range(len(SIZES))))
    starts = oracle.first_words(SIZES)
    for at, bucket in enumerate(wire.buckets):
        assert bucket.index == at
        assert bucket.first_word == starts[bucket.segments[0].index]
        assert bucket.length == bucket.segments[-1].stop
        without_last = bucket.segments[-1].start * 4
        assert without_last < cap or len(bucket.segments) == 1, "it should have been closed before"
        assert bucket.length * 4 >= cap or at == len(wire.buckets) - 1, "it was closed too early"
        for segment in bucket.segments:
            assert bucket.first_word + segment.start == segment.first_word == starts[segment.index]


def test_a_parameter_is_never_split() -> None:
    wire = laid(vectors([10, 100_000, 10]), SignBits(), 64)
    assert [[segment.index for segment in bucket.segments] for bucket in wire.buckets] == [[2, 1], [0]]


def test_dense_buckets_are_cut_where_the_type_changes() -> None:
    types = [torch.float32, torch.bfloat16, torch.float64, torch.float64, torch.float16]
    named = [(f"p{i}", torch.zeros(10, dtype=dtype)) for i, dtype in enumerate(types)]
    wire = laid(named, Dense(), MANY)
    assert [(bucket.dtype, [segment.index for segment in bucket.segments]) for bucket in wire.buckets] == [
        (torch.float32, [4]),
        (torch.float64, [3, 2]),
        (torch.float32, [1, 0]),
    ]
    assert len(laid(named, SignBits(), MANY).buckets) == 1, "signs of all types are words"


def test_the_cap_counts_bytes_of_the_wire() -> None:
    assert len(laid(vectors([32] * 8), SignBits(), 16).buckets) == 2
    assert len(laid(vectors([32] * 8), Dense(), 256).buckets) == 4
    assert len(laid(vectors([32] * 8, torch.float64), Dense(), 256).buckets) == 8


def test_nothing_to_lay_out() -> None:
    wire = laid([], SignBits(), MANY)
    assert wire.buckets == ()
    assert wire.elements == 0
    assert laid(vectors([0]), SignBits(), MANY).elements == 0


def test_elements() -> None:
    assert laid([("w", torch.zeros(3, 4)), ("b", torch.zeros(()))], SignBits(), MANY).elements == 13


# --------------------------------------------------------------------------------------- methods by parameter

VOTE, AVERAGE, KRUM = mpisign.signum(), mpisign.mean(), mpisign.krum(0)
MIXED = [VOTE, AVERAGE, VOTE, VOTE, AVERAGE, KRUM, VOTE, KRUM]


@pytest.mark.parametrize("cap", [0, 4, 64, 200, MANY])
def test_messages_are_cut_by_method(cap: int) -> None:
    wire = Layout(vectors([40] * 8), MIXED, cap)
    for bucket in wire.buckets:
        assert all(MIXED[segment.index] is bucket.method for segment in bucket.segments)
    assert [bucket.index for bucket in wire.buckets] == list(range(len(wire.buckets)))
    last = [min(segment.index for segment in bucket.segments) for bucket in wire.buckets]
    assert last == sorted(last, reverse=True), "in the order in which backward completes them"
    for method in (VOTE, AVERAGE, KRUM):
        places = [at for bucket in wire.buckets if bucket.method is method for at in (s.index for s in bucket.segments)]
        assert places == [place for place in range(7, -1, -1) if MIXED[place] is method]
    assert [str(method) for method in wire.methods] == [str(KRUM), str(VOTE), str(AVERAGE)]


def test_words_are_numbered_whatever_the_cap_and_whatever_stands_between() -> None:
    """So that coins are the same ones."""
    numbers = []
    for cap in (0, 4, 64, 200, MANY):
        wire = Layout(vectors([40] * 8), MIXED, cap)
        numbers.append({s.name: s.first_word for bucket in wire.buckets for s in bucket.segments})
        spans = [range(b.first_word, b.first_word + b.length) for b in wire.buckets]
        assert len({word for span in spans for word in span}) == sum(map(len, spans)), "none has two meanings"
    assert all(number == numbers[0] for number in numbers)
    assert [numbers[0][f"p{place}"] for place in (7, 5, 6, 3, 2, 0, 4, 1)] == [0, 40, 80, 82, 84, 86, 88, 128]


def test_all_parameters_of_a_rule_on_whole_vectors_are_one_message() -> None:
    wire = Layout(vectors([40] * 8), MIXED, 0)
    assert [[s.index for s in bucket.segments] for bucket in wire.buckets if bucket.method is KRUM] == [[7, 5]]


# -------------------------------------------------------------------------------------------- fingerprint


def usual() -> Named:
    return [("weight", torch.zeros(4, 6)), ("bias", torch.zeros(4))]


def fingerprint(
    named: Named | None = None, codec: Codec | None = None, cap: int = MANY, settings: tuple[str, ...] = ("a", "b")
) -> int:
    return laid(usual() if named is None else named, codec or SignBits(), cap).fingerprint(settings)


def test_equal_layouts_have_equal_fingerprints_whatever_their_values() -> None:
    other_values = [("weight", torch.randn(4, 6)), ("bias", torch.nn.Parameter(torch.ones(4)))]
    assert fingerprint() == fingerprint(other_values)


def test_a_fingerprint_fits_a_signed_word_of_a_header() -> None:
    prints = {fingerprint(settings=(str(i),)) for i in range(1000)}
    assert len(prints) == 1000
    assert 0 <= min(prints) <= max(prints) < 2**63


@pytest.mark.parametrize(
    "other",
    {
        "name": lambda: fingerprint([("Weight", usual()[0][1]), usual()[1]]),
        "shape": lambda: fingerprint([("weight", torch.zeros(6, 4)), usual()[1]]),
        "size": lambda: fingerprint([usual()[0], ("bias", torch.zeros(5))]),
        "dtype": lambda: fingerprint([usual()[0], ("bias", torch.zeros(4, dtype=torch.bfloat16))]),
        "strides": lambda: fingerprint([("weight", torch.zeros(6, 4).t()), usual()[1]]),
        "order": lambda: fingerprint(usual()[::-1]),
        "one less": lambda: fingerprint(usual()[:1]),
        "one more, empty": lambda: fingerprint([*usual(), ("extra", torch.zeros(0))]),
        "codec": lambda: fingerprint(codec=Dense()),
        "cuts": lambda: fingerprint(cap=1),
        "a setting": lambda: fingerprint(settings=("a", "c")),
        "where settings end": lambda: fingerprint(settings=("ab",)),
    }.items(),
    ids=lambda other: other[0],
)
def test_the_fingerprint_notices(other: tuple[str, Callable[[], int]]) -> None:
    assert other[1]() != fingerprint()


def test_the_fingerprint_notices_the_version_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.setattr(layout, "FORMAT_VERSION", layout.FORMAT_VERSION + 1)
    assert fingerprint() != before


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("parameter", "complaint"),
    [
        (torch.zeros(3, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(3, device="meta"), "on the meta device"),
        (torch.zeros(3, 3).to_sparse(), "sparse"),
    ],
    ids=["integers", "complex", "another device", "sparse"],
)
def test_parameters_that_cannot_be_voted_on(parameter: torch.Tensor, complaint: str) -> None:
    with pytest.raises(GradientError, match=f"'odd' .*{complaint}"):
        laid([("fine", torch.zeros(3)), ("odd", parameter)], SignBits(), MANY)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("major", [12, 13])
def test_without_cupy_an_optimizer_of_cuda_parameters_names_what_to_install(
    major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is made, rather than in the middle of the first step."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", f"{major}.0")
    with FakeTensorMode():  # which has every device
        parameter = torch.nn.Parameter(torch.zeros(3, device="cuda"))
        sgd = torch.optim.SGD([parameter], lr=0.1)
        with pytest.raises(
            GradientError, match=f"CuPy, which cannot be imported .*in the checkout: pip install '\\.\\[cuda{major}\\]'"
        ):
            DistributedSignOptimizer(sgd)
