"""mpisign.group without ranks: what a map of ranks to nodes says of each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import mpisign
from mpisign.group import Channels, Group, check_node_map

# By map: (node_rank, local_rank, local_size) of each rank, written down by hand.
MAPS: dict[str, tuple[tuple[int, ...], list[tuple[int, int, int]]]] = {
    "alone": ((0,), [(0, 0, 1)]),
    "3 + 1": ((0, 0, 0, 1), [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 1)]),
    "1 + 3": ((0, 1, 1, 1), [(0, 0, 1), (1, 0, 3), (1, 1, 3), (1, 2, 3)]),
    "4 + 2 + 1": (
        (0, 0, 0, 0, 1, 1, 2),
        [(0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 0, 2), (1, 1, 2), (2, 0, 1)],
    ),
    "interleaved": ((0, 1, 0, 1, 0), [(0, 0, 3), (1, 0, 2), (0, 1, 3), (1, 1, 2), (0, 2, 3)]),
    "each on its own": ((0, 1, 2), [(0, 0, 1), (1, 0, 1), (2, 0, 1)]),
}
ALL_MAPS = pytest.mark.parametrize(("node_of", "expected"), MAPS.values(), ids=MAPS)


def groups(node_of: tuple[int, ...], identities: Sequence[int] | None = None) -> list[Group]:
    """What each rank would have, without communicators."""
    nobody: Any = None
    known = tuple(range(len(node_of)) if identities is None else identities)
    return [
        Group(
            nobody,
            nobody,
            nobody,
            Channels(*(nobody,) * 7),
            rank,
            len(node_of),
            node_of,
            generation=0,
            identities=known,
        )
        for rank in range(len(node_of))
    ]


@ALL_MAPS
def test_a_map_tells_every_ranks_place(node_of: tuple[int, ...], expected: list[tuple[int, int, int]]) -> None:
    every = groups(node_of)
    assert [(group.node_rank, group.local_rank, group.local_size) for group in every] == expected
    assert {group.num_nodes for group in every} == {1 + max(node for node, _, _ in expected)}
    for group in every:
        assert group.ranks_by_node is group.ranks_by_node, "it is asked for by every message of a plan"
        assert group.neighbours == tuple(rank for rank, node in enumerate(node_of) if node == group.node_rank)


def test_a_rank_is_called_what_its_identity_says() -> None:
    assert [group.identity for group in groups((0, 0, 0))] == [0, 1, 2]
    assert [group.identity for group in groups((0, 0), identities=(2, 5))] == [2, 5]


def test_a_group_never_changes() -> None:
    group = groups((0, 0, 1))[0]
    for name in (field.name for field in dataclasses.fields(Group)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, name, 1)


def test_alone() -> None:
    comm = object()
    group = Group.alone(comm, gpus=True)
    assert (group.comm, group.node, group.lane) == (comm, comm, comm)
    assert (group.rank, group.size, group.identity, group.generation, group.gpus) == (0, 1, 0, 0, True)
    assert (group.node_rank, group.num_nodes, group.local_rank, group.local_size) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    "given",
    [[7, 7, 0], (7, 7, 0), np.array([7, 7, 0], np.int32), iter([7, 7, 0])],
    ids=["list", "tuple", "array", "iterator"],
)
def test_a_map_may_be_any_sequence_of_integers(given: Any) -> None:
    places = check_node_map(given, 3)
    assert places == (7, 7, 0)
    assert all(type(place) is int for place in places)


def test_no_map_is_none() -> None:
    assert check_node_map(None, 3) is None


@pytest.mark.parametrize(
    "given",
    [
        [],
        [0, 0],
        [0, 0, 0, 1],
        [0, 0, -1],
        [0, 0, 2**31],
        [0, 0, 0.5],
        [0, 0, None],
        ["0", "0", "1"],
        "001",
        1,
    ],
    ids=repr,
)
def test_a_map_that_does_not_fit_is_refused(given: Any) -> None:
    with pytest.raises(mpisign.OptionError, match=r"one number of a node .* for each of the 3 ranks, e\.g\. \[0"):
        check_node_map(given, 3)


def test_the_largest_number_of_a_node() -> None:
    assert check_node_map([2**31 - 1], 1) == (2**31 - 1,)
