"""Numbers as people write them: ``25.6M``, ``10Gbit``, ``20us``."""

from __future__ import annotations

import re
from math import isfinite

from mpisign.errors import OptionError

__all__ = ["bandwidth", "count", "number", "seconds", "spoken_bandwidth", "spoken_number"]

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9, "min": 60.0}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
_NUMBER = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*(\D*?)\s*")

_BANDWIDTH = re.compile(r"(.*?)(bits?|bps|b|bytes?|B)(?:/s)?")


def number(text: str) -> int:
    """How many: ``25.6M``, ``7B``, ``1_000``. Raises :class:`OptionError` unless it is at least 1."""
    value, unit = _split(text)
    if unit not in _PREFIXES or round(value * _PREFIXES[unit]) < 1:
        raise OptionError(f"{text!r} is not a number of at least 1: write 25.6M, 7B, or 1000")
    return round(value * _PREFIXES[unit])


def count(text: str) -> int:
    """How many of what one has a few of, such as ranks: ``4``. Raises :class:`OptionError` unless it is at least 1."""
    if not (text.isdecimal() and int(text)):
        raise OptionError(f"{text!r} is not a number of at least 1: write 4")
    return int(text)


def seconds(text: str) -> float:
    """A time: ``20us``, ``100ms``, ``1.5s``. Raises :class:`OptionError` unless it has a unit."""
    value, unit = _split(text)
    if unit not in _TIMES:
        raise OptionError(f"{text!r} is not a time: write 20us, 100ms or 1.5s")
    return value * _TIMES[unit]


def bandwidth(text: str) -> float:
    """Bytes a second, of ``10Gbit`` or ``100Mbit/s`` (bits) or ``20GB/s`` or ``1MiB/s`` (bytes).

    Raises :class:`OptionError` if it has no unit or is 0.
    """
    value, unit = _split(text)
    found = _BANDWIDTH.fullmatch(unit)
    factor = {**_PREFIXES, "m": 1e6, "g": 1e9, **_BINARY}.get(found[1]) if found else None
    if found is None or factor is None or not value:
        raise OptionError(f"{text!r} is not a bandwidth: write 10Gbit, 100Mbit or 20GB/s")
    return value * factor / (8.0 if found[2].startswith("b") and "yte" not in found[2] else 1.0)


def _split(text: str) -> tuple[float, str]:
    found = _NUMBER.fullmatch(text)
    value = float(found[1]) if found else float("nan")
    return (value, found[2]) if found and isfinite(value) else (0.0, "?")


def spoken_number(value: float) -> str:
    """``25.6M`` for 25_600_000."""
    for letter in ("G", "M", "k"):
        if value >= _PREFIXES[letter]:
            return f"{value / _PREFIXES[letter]:.4g}{letter}"
    return f"{value:.4g}"


def spoken_bandwidth(value: float) -> str:
    """``10 Gbit/s`` for 1.25e9 bytes a second."""
    bits = 8 * value
    for name in ("G", "M", "k"):
        if bits >= _PREFIXES[name]:
            return f"{bits / _PREFIXES[name]:.4g} {name}bit/s"
    return f"{bits:.4g} bit/s"
