"""mpisign.differences: who is in the minority, and what differs first."""

from __future__ import annotations

from typing import Any

import pytest

from mpisign.differences import first_difference, minority


@pytest.mark.parametrize(
    ("values", "odd", "usual"),
    [
        ([1], [], 1),
        ([1, 1, 1], [], 1),
        ([1, 2, 1], [1], 1),
        ([2, 1, 1], [0], 1),
        ([1, 2], [1], 1),
        ([2, 1, 1, 2], [1, 2], 2),
        ([1, 2, 3, 3], [0, 1], 3),
        ([3, 1, 2], [1, 2], 3),
        (["a", "b", "b"], [0], "b"),
    ],
)
def test_the_minority_is_who_has_not_what_most_have(values: list[Any], odd: list[int], usual: Any) -> None:
    assert minority(values) == (odd, usual)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (["a", "b"], ["a", "c"], ("b", "c")),
        (["a", "b", "x"], ["c", "b", "y"], ("a", "c")),
        (["a"], ["a", "b"], ("nothing more", "b")),
        (["a", "b"], ["a"], ("b", "nothing more")),
        ([], ["a"], ("nothing more", "a")),
        (["a"], ["a"], ("nothing more", "nothing more")),
        (["a", "x", "y", "b"], ["a", "b"], ("x", "none")),
        (["a", "b"], ["a", "x", "b"], ("none", "x")),
        (["a", "b"], ["b", "a"], ("a", "b")),
        (["a", "a", "b"], ["a", "b"], ("a", "none")),
    ],
)
def test_the_first_difference(mine: list[str], theirs: list[str], expected: tuple[str, str]) -> None:
    assert first_difference(mine, theirs) == expected
