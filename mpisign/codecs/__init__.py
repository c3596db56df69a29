"""What one message holds. One encoding a file."""

from __future__ import annotations

from mpisign.codecs.codec import Codec, Part
from mpisign.codecs.counts import Counts
from mpisign.codecs.dense import Dense
from mpisign.codecs.quantized import Quantized
from mpisign.codecs.scaled_bits import ScaledBits
from mpisign.codecs.scaled_rows import ScaledRows
from mpisign.codecs.sign_bits import SignBits
from mpisign.codecs.sparse import TopK
from mpisign.codecs.sparse_ternary import SparseTernary
from mpisign.codecs.trits import Trits

__all__ = [
    "Codec",
    "Counts",
    "Dense",
    "Part",
    "Quantized",
    "ScaledBits",
    "ScaledRows",
    "SignBits",
    "SparseTernary",
    "TopK",
    "Trits",
]
