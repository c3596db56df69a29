"""mpisign.errors: one clause catches them all, and each is what Python programmers expect of its kind."""

from __future__ import annotations

import pytest

import mpisign
from mpisign import errors


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_public_and_one_of_ours(name: str) -> None:
    error = getattr(errors, name)
    assert getattr(mpisign, name) is error
    assert issubclass(error, mpisign.MpisignError)


def test_wrong_values_are_value_errors_and_wrong_moments_runtime_errors() -> None:
    assert issubclass(mpisign.OptionError, ValueError)
    for error in (mpisign.NotInitializedError, mpisign.SynchronizationError, mpisign.CheckpointError):
        assert issubclass(error, RuntimeError)
