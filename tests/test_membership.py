"""mpisign.membership: jobs that go on when ranks die, in jobs of their own; see surviving.py for what they do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from methods_table import among, exchanges
from mpi4py import MPI
from mpirun import Result, outlived

import mpisign
from mpisign.membership import QUORUM_EXIT_CODE, has_quorum

needs_ulfm = pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")

FLAT = ("handshake", "after the handshake", "encode", "exchange", "late in the exchange", "close")
DEATHS: list[tuple[str, dict[str, Any]]] = [
    *(
        (where, {"exchange": "two_phase"})
        for where in ("before", "handshake", "encode", *FLAT[4:], "decided", "applied")
    ),
    *((where, {"exchange": "hierarchical"}) for where in ("handshake", "hierarchy 1", "hierarchy 3", "hierarchy 9")),
    *((where, {"exchange": "two_phase", "overlap": True}) for where in ("encode", *FLAT[4:])),
    *((where, {"exchange": "allgather", "apply": "optimizer"}) for where in ("encode", "close")),
]


def event(rank: int, step: int, where: str, what: str = "kill") -> dict[str, Any]:
    return {"rank": rank, "step": step, "where": where, "what": what}


def frights(where: tuple[str, ...], ranks: int) -> list[dict[str, Any]]:
    """A false alarm in each of the first steps, and then two decisions that some ranks do not hear of."""
    last = len(where) + 1
    alarms = [event(place % ranks, place + 1, spot, "alarm") for place, spot in enumerate(where)]
    return [*alarms, event(0, last, "", "deaf"), event(1, last + 2, "", "deaf"), event(ranks - 1, last + 2, "", "deaf")]


def votes(name: str, steps: int, events: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return {"kind": "votes", "name": name, "steps": steps, "events": events, "options": options}


def run(ranks: int, scenarios: list[dict[str, Any]], *, nodes: str = "", timeout: float = 200.0) -> Result:
    """Run a job that must end by itself and leave nothing."""
    env = {"MPISIGN_NODE_OF": nodes} if nodes else {}
    return outlived(ranks, "surviving.py", scenarios, env=env, timeout=timeout)


def ends(result: Result) -> dict[int, list[list[int]]]:
    """By the ranks that have come to the end, whom they have lost."""
    found = re.findall(r"rank (\d+): has lost (\[.*\]) and ends", result.text)
    return {int(rank): json.loads(lost) for rank, lost in found}


def told(result: Result, name: str) -> list[Any]:
    """What ranks have said of a training, which is the same on all."""
    said = [json.loads(its) for its in re.findall(rf"rank \d+: {re.escape(name)}: (.*)", result.text)]
    assert said, result.text
    assert all(its == said[0] for its in said), result.text
    return list(said[0])


@pytest.mark.parametrize(
    ("here", "members", "may"),
    [
        ((0, 1, 2), (0, 1, 2), True),
        ((1, 2), (0, 1, 2), True),
        ((0,), (0, 1, 2), False),
        ((0,), (0, 1), True),
        ((1,), (0, 1), False),
        ((1, 3), (1, 2, 3, 4), True),
        ((2, 4), (1, 2, 3, 4), False),
        ((2, 3, 4), (1, 2, 3, 4), True),
        ((7, 8, 9), (1, 2, 3), False),
    ],
)
def test_more_than_half_go_on_or_half_with_the_lowest(here: Any, members: Any, may: bool) -> None:
    assert has_quorum(here, members) is may


@needs_ulfm
def test_ranks_die_one_after_the_other_wherever_they_are() -> None:
    """In flat and hierarchical exchanges, overlapped and at a window's end, rank 0 included; the last goes on alone.

    Where one dies after it has decided, some have its last decision and give it to the others: it counts.
    """
    scenarios = [
        votes("frights", 10, frights(FLAT, 5), exchange="two_phase"),
        votes("two phases", 5, [event(3, 2, "late in the exchange")], exchange="two_phase"),
        votes("hierarchy", 6, [event(0, 3, "hierarchy 3")], exchange="hierarchical", overlap=True),
        {
            "kind": "windows",
            "name": "windows",
            "steps": 6,
            "events": [event(4, 3, "decided"), event(1, 3, "", "deaf")],
        },
        votes("alone", 5, [event(2, 2, "before", "raise")], exchange="allgather"),
    ]
    result = run(5, scenarios, nodes="0,1,0,1,1")
    assert ends(result) == {1: [[3], [0], [4], [2]]}, result.text
    assert "ValueError: an error of the user's" in result.text
    assert [members for _, members in told(result, "two phases")] == [[0, 1, 2, 3, 4]] * 2 + [[0, 1, 2, 4]] * 3
    assert [members for _, members in told(result, "hierarchy")] == [[0, 1, 2, 4]] * 3 + [[1, 2, 4]] * 3
    assert [members for _, members in told(result, "alone")] == [[1, 2]] * 2 + [[1]] * 3


@pytest.mark.long
@needs_ulfm
def test_samples_are_dealt_anew_at_the_same_step_on_all() -> None:
    """However far each rank is in its local steps when it finds that one has died."""
    scenario = {"kind": "dealt", "name": "dealt", "samples": 90, "slow": 1, "events": [event(2, 14, "before")]}
    result = run(3, [scenario])
    assert ends(result) == {0: [[2]], 1: [[2]]}, result.text
    assert told(result, "dealt") == [0, 16]


@needs_ulfm
@pytest.mark.long
@pytest.mark.parametrize(("exchange", "liar"), [("two_phase", 0), ("hierarchical", 2)])
def test_who_is_found_to_lie_is_left_behind(exchange: str, liar: int) -> None:
    """By an audit; the very step in which it has lied is made without it."""
    scenario = votes("votes", 6, [event(liar, 3, "", "lie")], exchange=exchange, audit=50)
    result = run(3, [scenario])
    others = [0, 1, 2][:liar] + [0, 1, 2][liar + 1 :]
    assert ends(result) == {other: [[liar]] for other in others}, result.text
    assert f"rank {liar} ends, so that the others can go on: " in result.text
    assert f"rank {liar} has published another decision than the votes say" in result.text
    assert f"the job goes on without ranks [{liar}]" in result.text
    assert [members for _, members in told(result, "votes")] == [[0, 1, 2]] * 3 + [others] * 3


@needs_ulfm
@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "what", "exchange"),
    [
        (3, "revoke", "two_phase"),
        (3, "refuse", "two_phase"),
        (4, "lie", "hierarchical"),  # 0 and 2 count together, and 1 and 3 are no majority
    ],
)
def test_liars_that_do_not_end_or_are_too_many_end_the_job(ranks: int, what: str, exchange: str) -> None:
    """With the error on whoever is not ended by that of another, and without a step that counts."""
    scenario = votes("votes", 6, [event(0, 3, "", what)], exchange=exchange, audit=50)
    result = run(ranks, [scenario], nodes="0,0,1,1" if ranks == 4 else "")
    assert ends(result) == {}
    assert re.search(r"AuditError: .*published another decision.* \(this is rank \d\)", result.text), result.text


@needs_ulfm
def test_the_smaller_side_stops_and_says_so() -> None:
    result = run(2, [votes("votes", 4, [event(0, 2, "encode")], exchange="two_phase")])
    assert result.returncode == QUORUM_EXIT_CODE, result.text
    assert "rank 1 stops: ranks [1] are all that this one reaches of [0, 1], and that is no majority" in result.text
    assert ends(result) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "go on"}, "choose one of 'abort', 'continue'"),
        ({"min_ranks": 1}, "on_failure='continue'"),
        ({"on_failure": "continue", "min_ranks": 2}, "more than the 1 ranks"),
        ({"on_failure": "continue", "min_ranks": 0}, "min_ranks=0"),
        ({"on_failure": "continue"}, "--with-ft ulfm|take Open MPI 5"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mpisign.OptionError, match=message):
        mpisign.init(**options)
    assert not mpisign.is_initialized()


@pytest.mark.parametrize(
    ("value", "message"), [("continue", "--with-ft ulfm|take Open MPI 5"), ("go on", r"^MPISIGN_ON_FAILURE=.*choose")]
)
def test_it_may_be_a_variable(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPISIGN_ON_FAILURE", value)
    with pytest.raises(mpisign.OptionError, match=message):
        mpisign.init()
    mpisign.init(on_failure="abort")
    mpisign.shutdown()


def test_without_it_callbacks_are_taken_and_never_called(world: None) -> None:
    def never(change: mpisign.MembershipChange) -> None:
        raise AssertionError(change)

    mpisign.on_membership_change(never)()


# ------------------------------------------------------------------------------------------------- the long ones


@needs_ulfm
@pytest.mark.long
def test_every_call_comes_about_on_all_or_is_an_error_on_all(tmp_path: Path) -> None:
    result = run(3, [{"kind": "calls", "name": "calls", "folder": str(tmp_path)}])
    assert ends(result) == {0: [], 1: [], 2: []}, result.text


@needs_ulfm
@pytest.mark.long
@pytest.mark.parametrize("where", ["encode", "decided"])
def test_a_death_after_an_error_that_all_have_caught(where: str) -> None:
    """Whoever has failed has been in the same acts as those who have heard of it."""
    events = [event(1, 1, "gradients", "error"), event(2, 3, where)]
    result = run(3, [votes("votes", 6, events, exchange="two_phase")])
    assert ends(result) == {rank: [[2]] for rank in (0, 1)}, result.text


@needs_ulfm
@pytest.mark.long
def test_who_exits_with_a_code_dies_alone() -> None:
    """Unless the script has caught that."""
    result = run(3, [votes("votes", 4, [event(1, 2, "before", "exit")], exchange="two_phase")])
    assert ends(result) == {rank: [[1]] for rank in (0, 2)}, result.text
    assert "rank 1 has called sys.exit(3)" in result.text
    result = run(3, [votes("votes", 4, [event(1, 2, "gradients", "exit caught")], exchange="two_phase")])
    assert ends(result) == {rank: [] for rank in range(3)}, result.text


@needs_ulfm
@pytest.mark.long
def test_differences_that_travel_and_audits_survive() -> None:
    alarms = [event(0, 4, "handshake", "alarm"), event(1, 6, "close", "alarm"), event(1, 10, "", "deaf")]
    alarms += [event(0, 13, "encode", "alarm"), event(2, 16, "", "deaf")]
    scenarios = [
        {"kind": "windows", "name": "delay", "delay": 2, "steps": 20, "events": alarms},
        votes("audit", 8, frights(("close", "exchange"), 3), exchange="two_phase", audit=1),
        {"kind": "windows", "name": "kill", "delay": 2, "steps": 12, "events": [event(1, 5, "encode")]},
    ]
    result = run(3, scenarios)
    assert ends(result) == {0: [[1]], 2: [[1]]}, result.text


@needs_ulfm
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_every_method_takes_a_gradient_in_once(exchange: str) -> None:
    """Whatever ranks have begun, and have not heard of: parameters and memories are those of a calm training."""
    methods = {name: its for name, its in among(3).items() if "private" not in name and exchange in exchanges(its)}
    if exchange == "two_phase":  # what shard owners keep starts anew
        methods = {name: its for name, its in methods.items() if not getattr(its.rule, "keeps", False)}
    events = [event(0, 1, "handshake", "alarm"), event(1, 2, "encode", "alarm"), event(2, 3, "close", "alarm")]
    events += [event(0, 4, "", "deaf"), event(1, 6, "", "deaf")]
    scenario = {"kind": "alarms", "name": "all", "steps": 8, "methods": list(methods), "events": events}
    result = run(3, [{**scenario, "options": {"exchange": exchange}}], timeout=500.0)
    assert ends(result) == {0: [], 1: [], 2: []}, result.text


@needs_ulfm
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("first", "second"), list(zip(DEATHS[1::2], DEATHS[::2], strict=True)), ids=lambda death: death[0].replace(" ", "-")
)
def test_a_rank_dies(first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]) -> None:
    """One of four that is alone on its node, and then rank 0 of three."""
    scenarios = [
        votes(f"without {victim}", 6, [event(victim, 3, where)], **options)
        for victim, (where, options) in ((2, first), (0, second))
    ]
    result = run(4, scenarios, nodes="0,0,1,2")
    assert ends(result) == {rank: [[2], [0]] for rank in (1, 3)}, result.text


@needs_ulfm
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("events", "lost"),
    [
        ([event(1, 3, "encode"), event(4, 3, "encode")], [[1, 4]]),
        ([event(1, 3, "encode"), event(0, 3, "handshake")], [[0, 1]]),
        ([event(1, 3, "encode"), event(4, 3, "recovery")], [[1, 4]]),
        ([event(2, 3, "handshake"), event(0, 3, "end of the recovery")], [[2], [0]]),
    ],
)
def test_two_die_at_once_or_one_during_the_recovery(events: list[dict[str, Any]], lost: list[list[int]]) -> None:
    result = run(5, [votes("votes", 6, events, exchange="two_phase")])
    gone = {rank for its in lost for rank in its}
    found = ends(result)
    assert set(found) == set(range(5)) - gone, result.text
    assert all(sorted(who for its in lost for who in its) == sorted(gone) for lost in found.values()), result.text
