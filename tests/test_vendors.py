"""mpisign.vendors: every MPI is told its own words, and no other's."""

from __future__ import annotations

import dataclasses
import re

import pytest

from mpisign.vendors import words_of

OWN = {
    "Open MPI": r"--|openmpi|pmix",
    "MPICH": r"(?<!-)-bind-to|MPIR_CVAR|mpich",
    "Intel MPI": r"I_MPI_|impi-rt",
}


@pytest.mark.parametrize("vendor", [*OWN, "MVAPICH"])
def test_words_are_its_own(vendor: str) -> None:
    said = " ".join(dataclasses.astuple(words_of(vendor)))
    assert [other for other, words in OWN.items() if re.search(words, said)] == [vendor] * (vendor in OWN)


@pytest.mark.usefixtures("world")
def test_mpi4py_calls_them_so() -> None:
    from mpi4py import MPI

    assert MPI.get_vendor()[0] in OWN
