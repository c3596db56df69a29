"""mpisign.calibration on real ranks, whose nodes are what a map says. What it measures is judged only for its shape."""

from __future__ import annotations

import dataclasses
from math import inf
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign
from mpisign import calibration
from mpisign.calibration import calibrate, links_of, wanted
from mpisign.cost import Links
from mpisign.errors import ConsistencyError
from mpisign.session import current

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi


def joined(node_of: list[int]) -> None:
    mpisign.shutdown()
    mpisign.init(node_of=node_of)


def test_what_is_there_is_measured_the_same_on_all_ranks(comm: MPI.Comm) -> None:
    size = comm.size
    maps = {
        "one node": [0] * size,
        "each on its own": list(range(size)),
        "all but one + 1": [0] * (size - 1) + [1],
        "interleaved": [rank % 2 for rank in range(size)],
    }
    for name, node_of in maps.items():
        joined(node_of)
        links = calibrate(current())
        assert comm.allgather(links) == [links] * size, name
        across, inside = len(set(node_of)) > 1, len(set(node_of)) < size
        for there, wait, overhead, bandwidth in (
            (inside, links.node_latency, links.node_overhead, links.node_bandwidth),
            (across, links.network_latency, links.network_overhead, links.network_bandwidth),
        ):
            if there:
                assert wait + overhead > 0, name
                assert 1e3 < bandwidth < 1e13, name
            else:
                assert (wait, overhead, bandwidth) == (0.0, 0.0, inf), name


def test_without_time_it_ends_with_its_first_transfers(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    original = calibration._Trial._transfer

    def counted(self: object, comm: MPI.Comm, sent: object, received: object) -> None:
        transfers.append(len(sent))  # type: ignore[arg-type]
        original(self, comm, sent, received)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration._Trial, "_transfer", counted)
    joined([rank % 2 for rank in range(comm.size)])
    links = calibrate(current(), budget=0.0)
    kinds = (comm.size > 2) + (comm.size > 1)
    assert len(transfers) == calibration.LEAST * kinds
    assert comm.allgather(links) == [links] * comm.size
    firsts = (calibration.NETWORK.first, calibration.NODE.first)
    assert set(transfers) <= {first // ranks * ranks for first in firsts for ranks in range(1, comm.size + 1)}


def test_it_is_measured_once_for_the_same_nodes(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(calibration.VARIABLE, "1")
    calls = []

    def counted(session: object) -> Links:
        calls.append(session)
        return Links(network_latency=float(len(calls)))

    monkeypatch.setattr(calibration, "calibrate", counted)
    session = current()
    links = links_of(session)
    if comm.size == 1:
        assert links is None
        assert not calls
        return
    assert links == Links(network_latency=1.0)
    assert links_of(session) is links
    assert len(calls) == 1
    before = session.group
    session.group = dataclasses.replace(before, node_of=tuple(rank % 2 for rank in range(comm.size)))
    assert links_of(session) == Links(network_latency=2.0), "ranks have moved to other nodes"
    joined([0] * comm.size)
    assert links_of(current()) == Links(network_latency=3.0), "another job"


def test_fewer_ranks_of_the_same_nodes_have_the_same_links() -> None:
    links = Links(network_latency=1.0)
    known = {identity: (node, links) for identity, node in enumerate((0, 0, 1, 1, 2))}

    def remembered(identities: tuple[int, ...], node_of: tuple[int, ...]) -> Links | None:
        group = dataclasses.replace(current().group, size=len(node_of), rank=0, identities=identities, node_of=node_of)
        return calibration._remembered(known, group)

    assert remembered((0, 1, 2, 3, 4), (0, 0, 1, 1, 2)) is links
    assert remembered((1, 2, 3), (0, 1, 1)) is links, "ranks and a node are gone"
    assert remembered((2, 4), (0, 1)) is links
    assert remembered((0, 1, 2), (0, 1, 1)) is None, "places have changed"
    assert remembered((0, 2), (0, 0)) is None, "two nodes are one"
    assert remembered((0, 1), (0, 1)) is None, "one node is two"
    assert remembered((0, 7), (0, 1)) is None, "a rank that was not there"


def test_rank_0_decides_whether(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(calibration.VARIABLE, "0" if comm.rank == 0 else "1")
    assert wanted() == (comm.rank > 0)
    assert links_of(current()) is None
    monkeypatch.setenv(calibration.VARIABLE, "1" if comm.rank == 0 else "0")
    links = links_of(current())
    assert comm.allgather(links) == [links] * comm.size
    assert (links is None) == (comm.size == 1)


@pytest.mark.parametrize("said", ["0", "off", " No ", "FALSE"])
def test_it_can_be_turned_off(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(calibration.VARIABLE, said)
    assert not wanted()
    monkeypatch.delenv(calibration.VARIABLE)
    assert wanted()


def test_ranks_that_do_something_else_are_told(comm: MPI.Comm) -> None:
    if comm.size == 1:
        pytest.skip("nobody else")
    with pytest.raises(ConsistencyError, match=r"ranks \[0\] are in calibration"):
        calibrate(current()) if comm.rank == 0 else mpisign.barrier()


def test_the_first_step_measures_and_chooses_by_it(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two slow nodes that several ranks share counting inside is soonest across; without them it is all-gather."""
    measured: list[int] = []

    def links(session: Any) -> Links:
        measured.append(session.size)
        return Links(network_latency=1e-5, network_bandwidth=1e6)

    monkeypatch.setenv(calibration.VARIABLE, "1")
    monkeypatch.setattr(calibration, "calibrate", links)
    joined([rank % 2 for rank in range(comm.size)])
    weight = torch.nn.Parameter(torch.zeros(1 << 17))
    for exchange, number in (("two_phase", 0), ("auto", 1), ("auto", 1)):
        optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([weight], lr=1.0), exchange=exchange)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert len(measured) == (number if comm.size > 1 else 0)
    assert optimizer.report is not None
    (chosen,), why = optimizer.report.exchange, optimizer.report.exchange_reason
    assert why.startswith(f"{chosen}: ")
    assert ("takes allgather" in why) == (comm.size > 1)
    assert chosen == {1: "allgather", 2: "allgather", 3: "two_phase"}.get(comm.size, "hierarchical")


@pytest.mark.parametrize("measured", [True, False])
def test_what_another_optimizer_has_found(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    """Where some ranks have made their plan anew since, such as for a state that was loaded, and others have not."""
    monkeypatch.setenv(calibration.VARIABLE, str(int(measured)))
    monkeypatch.setattr(calibration, "calibrate", lambda session: Links(network_latency=1e-5, network_bandwidth=1e6))
    joined([rank % 2 for rank in range(comm.size)])
    weights = [torch.nn.Parameter(torch.zeros(1 << 20)) for _ in range(4)]  # each fills the least message
    first, second = (
        mpisign.DistributedSignOptimizer(torch.optim.SGD(some, lr=1.0), seed=seed)
        for seed, some in enumerate((weights[:2], weights[2:]))
    )
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    first.step()
    if comm.rank == comm.size - 1:
        second.load_state_dict(second.state_dict())
    second.step()
    assert first.report is not None
    assert second.report is not None
    assert second.report.exchange_reason == first.report.exchange_reason
    assert all(bool((weight == -1).all()) for weight in weights)
