"""Numbers with units, as they are typed."""

from __future__ import annotations

import pytest

from mpisign import quantities
from mpisign.errors import OptionError


@pytest.mark.parametrize(
    ("text", "value"),
    [("25.6M", 25_600_000), ("7B", 7 * 10**9), ("1_000", 1000), ("4k", 4000), ("3", 3), ("1e6", 10**6), ("2 G", 2e9)],
)
def test_numbers(text: str, value: int):
    assert quantities.number(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("20us", 20e-6), ("20µs", 20e-6), ("100ms", 0.1), ("1.5 s", 1.5), ("500ns", 5e-7), ("0s", 0.0)]
)
def test_times(text: str, value: float):
    assert quantities.seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10Gbit", 1.25e9),
        ("10gbit", 1.25e9),
        ("100Mbit/s", 12.5e6),
        ("100Mb/s", 12.5e6),
        ("1 Gbps", 125e6),
        ("20GB/s", 20e9),
        ("20 Gbytes/s", 20e9),
        ("1MiB/s", 2.0**20),
        ("8bit", 1.0),
    ],
)
def test_bandwidths(text: str, value: float):
    assert quantities.bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "text", "advice"),
    [
        (quantities.number, "many", "write 25.6M"),
        (quantities.number, "0", "at least 1"),
        (quantities.number, "0.2", "at least 1"),
        (quantities.number, "-4", "write 25.6M"),
        (quantities.number, "1e999", "write 25.6M"),
        (quantities.number, "3ms", "write 25.6M"),
        (quantities.count, "two", "write 4"),
        (quantities.count, "0", "write 4"),
        (quantities.count, "2.5", "write 4"),
        (quantities.count, "-1", "write 4"),
        (quantities.seconds, "20", "write 20us"),
        (quantities.seconds, "-1s", "write 20us"),
        (quantities.seconds, "20Gbit", "write 20us"),
        (quantities.bandwidth, "10", "write 10Gbit"),
        (quantities.bandwidth, "10G", "write 10Gbit"),
        (quantities.bandwidth, "0Gbit", "write 10Gbit"),
        (quantities.bandwidth, "10Xbit", "write 10Gbit"),
        (quantities.bandwidth, "", "write 10Gbit"),
    ],
)
def test_nonsense_says_what_to_type(read, text: str, advice: str):
    with pytest.raises(OptionError, match=advice):
        read(text)


def test_they_are_said_as_they_are_read():
    for value in (1, 999, 4000, 25_600_000, 7 * 10**9):
        assert quantities.number(quantities.spoken_number(value)) == value
    for value in (12.5e6, 1.25e9, 1e3):
        assert quantities.bandwidth(quantities.spoken_bandwidth(value)) == pytest.approx(value)
