"""What goes wrong on a rank of a job that outlives its ranks, in which step, and where in it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from mpisign.exchange import surviving
from mpisign.exchange.decider import Deciding
from mpisign.exchange.encoder import Encoder
from mpisign.exchange.gradients import Gradients
from mpisign.exchange.hierarchical import Hierarchical
from mpisign.exchange.round import Round
from mpisign.exchange.two_phase import TwoPhase
from mpisign.membership import Membership
from mpisign.session import current
from mpisign.survival import RanksLostError
from mpisign.watchdog import Pending

Scenario = dict[str, Any]


def identity() -> int:
    return current().group.identity


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def alarm() -> None:
    raise RanksLostError("a test says so")


def at_call(owner: Any, name: str, count: int, act: Callable[[], None], *, after: bool = False) -> None:
    """Let ``act`` happen in the ``count``-th call of a method from now on, before or after what it does."""
    former, calls = getattr(owner, name), [0]

    def method(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] != count:
            return former(*args, **options)
        setattr(owner, name, former)
        result = former(*args, **options) if after else None
        act()
        return result if after else former(*args, **options)

    setattr(owner, name, method)


def fail() -> None:
    raise ValueError("an error of the user's")


def leave() -> None:
    """As a script does that has caught an error."""
    sys.exit(3)


SPOTS: dict[str, tuple[Any, str, int, bool]] = {
    "gradients": (Gradients, "read", 1, False),
    "handshake": (Round, "open", 1, False),
    "after the handshake": (Round, "open", 1, True),
    "encode": (Encoder, "encode", 2, False),
    "exchange": (TwoPhase, "go_on", 2, False),
    "late in the exchange": (TwoPhase, "go_on", 6, True),
    "hierarchy 1": (Hierarchical, "go_on", 1, False),
    "hierarchy 3": (Hierarchical, "go_on", 3, True),
    "hierarchy 9": (Hierarchical, "go_on", 9, True),
    "close": (Round, "close", 1, True),
    "decided": (Round, "commit", 1, False),
    "applied": (Round, "commit", 1, True),
    "recovery": (Membership, "_told", 1, False),
    "end of the recovery": (Membership, "_settle", 1, False),
}


def deaf(former: Callable[[Round], None] = Round.close) -> None:
    """Let this rank not hear how the next round ends, as if the last messages had been lost with another rank."""

    def close(a_round: Round) -> None:
        Round.close = former  # type: ignore[method-assign]
        plan, session = a_round.plan, current()
        if not plan.elects and all(its.name == "allgather" for its in plan.exchanges):
            a_round._send_packed(wait=True)
            for flight in a_round._flights:  # the others have all that they need, and here nothing is decided
                for pending in (flight.header, flight.pending):
                    if pending is not None:
                        session.wait(pending)
            alarm()
        former(a_round)
        a_round.settle()
        for flight in a_round._flights[1:]:
            flight.pending, flight.heard = Pending(None, ()), None  # type: ignore[arg-type]
            plan.exchanges[flight.bucket.index].decision.zero_()
        a_round._handover = None
        alarm()

    Round.close = close  # type: ignore[method-assign]


def lie() -> None:
    """Let this rank publish the contrary of all that it decides, from now on."""
    for name, place in (("decide", 1), ("settle", 2)):
        former = getattr(Deciding, name)

        def contrary(self: Deciding, *args: Any, former: Any = former, place: int = place, **options: Any) -> None:
            former(self, *args, **options)
            args[place].bitwise_not_()

        setattr(Deciding, name, contrary)


def refuse(act: Callable[[], None] = lambda: None) -> None:
    """Lie, and do something else than end when that is found."""
    lie()
    surviving.die = act  # type: ignore[attr-defined]


def revoke() -> None:
    """And let the others believe that somebody has seen this rank end."""
    refuse(current().group.comm.Revoke)


def arm(scenario: Scenario, at: int) -> None:
    """Prepare what goes wrong on this rank in this step."""
    for event in scenario.get("events", ()):
        if event["rank"] != identity() or event["step"] != at:
            continue
        act = {"kill": die, "alarm": alarm, "raise": fail, "exit": leave, "error": fail}.get(event["what"])
        if event["what"] == "exit caught":
            with contextlib.suppress(SystemExit):
                leave()
        elif event["what"] in ("deaf", "lie", "refuse", "revoke"):
            globals()[event["what"]]()
        elif event["where"] == "before":
            assert act is not None
            act()
        else:
            owner, name, count, after = SPOTS[event["where"]]
            assert act is not None
            at_call(owner, name, count, act, after=after)
