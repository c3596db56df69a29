"""mpisign.group on real ranks, whose nodes are what a map says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

import mpisign
from mpisign.group import Group
from mpisign.session import NODE_MAP_VARIABLE, current

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

# Of (rank, size) the number of the rank's node. None: nobody says, so that it is MPI who does.
MAPS: dict[str, Callable[[int, int], int]] = {
    "all but one + 1": lambda rank, size: int(rank == size - 1),
    "1 + all but one": lambda rank, size: int(rank > 0),
    "2 + 2 + ...": lambda rank, size: rank // 2,
    "4 + 2 + 1": lambda rank, size: 0 if rank < 4 else 1 if rank < 6 else 2,
    "interleaved": lambda rank, size: rank % 2,
    "backwards": lambda rank, size: 10 * (size - rank),
    "each on its own": lambda rank, size: rank,
    "one node": lambda rank, size: 5,
}
ALL_MAPS = pytest.mark.parametrize("place", MAPS.values(), ids=MAPS)


def members_of(node_of: Sequence[int]) -> list[list[int]]:
    """The ranks of each node, nodes in the order of their lowest rank."""
    nodes: dict[int, list[int]] = {}
    for rank, node in enumerate(node_of):
        nodes.setdefault(node, []).append(rank)
    return list(nodes.values())


def assert_places(group: Group, node_of: Sequence[int], comm: MPI.Comm) -> None:
    """The group's numbers and communicators, and what the public functions say. **Collective** over ``comm``."""
    nodes = members_of(node_of)
    number = next(number for number, members in enumerate(nodes) if comm.rank in members)
    local = nodes[number].index(comm.rank)
    lane = [members[local] for members in nodes if local < len(members)]
    assert (group.rank, group.size) == (comm.rank, comm.size)
    assert group.node_of == tuple(next(n for n, its in enumerate(nodes) if r in its) for r in range(comm.size))
    assert group.comm.allgather(comm.rank) == list(range(comm.size))
    assert group.node.allgather(comm.rank) == nodes[number]
    assert group.lane.allgather(comm.rank) == lane
    assert (group.node.rank, group.lane.rank) == (local, lane.index(comm.rank))
    assert (mpisign.local_rank(), mpisign.local_size()) == (local, len(nodes[number]))
    assert (mpisign.node_rank(), mpisign.num_nodes()) == (number, len(nodes))


@ALL_MAPS
def test_a_map_makes_nodes_and_lanes(comm: MPI.Comm, place: Callable[[int, int], int]) -> None:
    node_of = [place(rank, comm.size) for rank in range(comm.size)]
    mpisign.shutdown()
    mpisign.init(node_of=node_of)
    group = current().group
    assert_places(group, node_of, comm)
    assert (group.generation, group.identities, group.identity) == (0, tuple(range(comm.size)), comm.rank)


def test_without_a_map_ranks_that_share_memory_are_a_node(comm: MPI.Comm) -> None:
    from mpi4py import MPI

    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    node_of = comm.allgather(min(shared.allgather(comm.rank)))
    shared.Free()
    assert_places(current().group, node_of, comm)


def test_the_variable_is_another_way_to_say_so(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    node_of = [rank % 2 for rank in range(comm.size)]
    monkeypatch.setenv(NODE_MAP_VARIABLE, ",".join(map(str, node_of)))
    mpisign.shutdown()
    mpisign.init()
    assert_places(current().group, node_of, comm)


def test_what_the_script_says_counts_more_than_the_variable(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_MAP_VARIABLE, "nonsense")
    mpisign.shutdown()
    mpisign.init(node_of=range(comm.size))
    assert mpisign.num_nodes() == comm.size


@pytest.mark.parametrize("told", ["0", "x", "0,,0", "-1"])
def test_a_variable_that_does_not_fit_is_refused(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv(NODE_MAP_VARIABLE, ",".join([told] * (comm.size + (told == "0"))))
    mpisign.shutdown()
    with pytest.raises(mpisign.OptionError, match=f"for each of the {comm.size} ranks"):
        mpisign.init()
    assert not mpisign.is_initialized()
    monkeypatch.delenv(NODE_MAP_VARIABLE)
    mpisign.init()


@pytest.mark.parametrize(
    "wrong", [lambda size: [0] * (size + 1), lambda size: [0] * (size - 1), lambda size: [-1] + [0] * (size - 1)]
)
def test_a_map_that_does_not_fit_is_refused(comm: MPI.Comm, wrong: Callable[[int], list[int]]) -> None:
    mpisign.shutdown()
    with pytest.raises(mpisign.OptionError, match=f"for each of the {comm.size} ranks"):
        mpisign.init(node_of=wrong(comm.size))
    mpisign.init(node_of=[0] * comm.size)
    assert mpisign.allgather_object(comm.rank) == list(range(comm.size))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("odd", ["another node", "another number", "none"])
def test_different_maps_are_an_error_on_every_rank(comm: MPI.Comm, odd: str) -> None:
    """And all can try again."""
    mpisign.shutdown()
    mine: list[int] | None = [0] * comm.size
    if comm.rank == comm.size - 1:
        mine = {"another node": [0] * (comm.size - 1) + [1], "another number": [1] * comm.size, "none": None}[odd]
    with pytest.raises(mpisign.ConsistencyError, match=rf"different maps .*this is rank {comm.rank}\).*same node_of="):
        mpisign.init(node_of=mine)
    assert not mpisign.is_initialized()
    mpisign.init(node_of=[0] * comm.size)
    assert mpisign.allgather_object(comm.rank) == list(range(comm.size))


@pytest.mark.mpi(min_size=2)
def test_a_sub_communicators_ranks_and_map_are_its_own(comm: MPI.Comm) -> None:
    """Numbered backwards, so that none of its ranks is the whole's."""
    half = comm.Split(comm.rank % 2, -comm.rank)
    mpisign.shutdown()
    mpisign.init(half, node_of=[rank // 2 for rank in range(half.size)])
    assert_places(current().group, [rank // 2 for rank in range(half.size)], half)
    assert current().group.identity == half.rank
    mpisign.shutdown()
    half.Free()


@ALL_MAPS
def test_a_step_does_not_depend_on_the_map(comm: MPI.Comm, place: Callable[[int, int], int]) -> None:
    """Not before an exchange goes by it; and communicators that nobody uses do not disturb."""
    import torch

    mpisign.shutdown()
    mpisign.init(node_of=[place(rank, comm.size) for rank in range(comm.size)])
    parameter = torch.nn.Parameter(torch.zeros(70))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0), method=mpisign.signsgd())
    parameter.grad = torch.arange(70.0) - 30.5
    optimizer.step()
    assert torch.equal(parameter.detach(), -torch.sign(torch.arange(70.0) - 30.5))


def test_a_group_gives_its_communicators_back(comm: MPI.Comm) -> None:
    from mpi4py import MPI

    group = current().group
    mpisign.shutdown()
    assert [its == MPI.COMM_NULL for its in (group.comm, group.node, group.lane)] == [True] * 3
