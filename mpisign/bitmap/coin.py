"""The fair coin: a counter-based hash that gives every bit of a bitmap a reproducible random value.

Zero gradients and tied votes are settled by coins. A coin must not depend on how the work is cut
(buckets, shards, ranks that do the counting, host or GPU), so it is a pure function of *where* the bit is::

    h(x)                    = mix(x + G)                           SplitMix64: one output of state x
    key(seed, step, stream) = h(h(h(seed) ^ step) ^ stream)
    pair j                  = h(key + j * G)                       64 coins: words 2j (low half), 2j + 1

All arithmetic is modulo 2**64, and::

    G      = 0x9E3779B97F4A7C15
    mix(z) : z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
             z = (z ^ (z >> 27)) * 0x94D049BB133111EB
             return z ^ (z >> 31)

A word is a little-endian uint32 of the layout's global numbering; bit *i* of word *w* is the coin of the
element that bit stands for. ``stream`` is 0 for ties (the same coin on every rank) and ``identity + 1``
for zeros (an independent coin on every rank); ``2**32 + identity`` seeds a rank's noise. A rank's identity is its
number, until others leave. Seed, step and stream are
taken modulo 2**64.

Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["TIES", "coin_key", "coin_words", "noise_stream", "zeros_stream"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB

TIES = 0
"""The stream of the ties' coin, common to all ranks."""


def zeros_stream(identity: int) -> int:
    """The stream of the coin with which a rank votes on elements whose gradient is exactly zero."""
    return identity + 1


def noise_stream(identity: int) -> int:
    """The stream that seeds the random numbers of a rank's memory (noise, sampling)."""
    return (1 << 32) + identity


def _h(x: int) -> int:
    z = (x + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MUL1) & _MASK
    z = ((z ^ (z >> 27)) * _MUL2) & _MASK
    return z ^ (z >> 31)


def coin_key(seed: int, step: int, stream: int) -> int:
    """The 64-bit key of one step's coins in one stream (see the module's formula)."""
    return _h(_h(_h(seed & _MASK) ^ (step & _MASK)) ^ (stream & _MASK))


_table: npt.NDArray[np.uint64] = np.empty(0, np.uint64)


def _multiples(count: int) -> npt.NDArray[np.uint64]:
    """0, G, 2 G, ...: (count,) uint64. Kept, as it is the same for every key and place."""
    global _table
    if _table.size < count:
        _table = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)
    multiples: npt.NDArray[np.uint64] = _table[:count]
    return multiples


def coin_words(key: int, first_word: int, count: int) -> npt.NDArray[np.uint32]:
    """Coins for the words ``first_word .. first_word + count - 1``: (count,) uint32."""
    first_pair, last_pair = first_word >> 1, (first_word + count + 1) >> 1
    z = _multiples(last_pair - first_pair) + np.uint64((key + (first_pair + 1) * _GOLDEN) & _MASK)
    t = z >> np.uint64(30)
    z ^= t
    z *= np.uint64(_MUL1)
    np.right_shift(z, np.uint64(27), out=t)
    z ^= t
    z *= np.uint64(_MUL2)
    np.right_shift(z, np.uint64(31), out=t)
    z ^= t
    start = first_word & 1
    words: npt.NDArray[np.uint32] = z.astype("<u8", copy=False).view(np.dtype("<u4"))
    return words[start : start + count]
