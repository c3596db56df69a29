"""The report of a round, from what all ranks have said in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mpisign.errors import ConsistencyError
from mpisign.exchange import header
from mpisign.exchange.agreement import agreement
from mpisign.exchange.header import Handshake, Heard
from mpisign.exchange.plan import Plan
from mpisign.report import StepReport

__all__ = ["checked", "report"]


def checked(plan: Plan, step: int, ties: int) -> int:
    """The ties of all ranks, if there can be so many. Raises ConsistencyError."""
    if not 0 <= ties <= plan.layout.elements:
        raise ConsistencyError(
            f"step {step}: the ranks have counted {ties} ties together, which cannot be: run the same "
            f"version of mpisign on every rank, and only processes that you trust"
        )
    return ties


def report(
    plan: Plan,
    step: int,
    handshake: Handshake,
    said: Sequence[Heard],
    skipped: bool,
    ties: int | None,
    times: tuple[Mapping[str, float], float, float],
    dropped: tuple[int, int] = (0, 0),
) -> StepReport:
    """What a step did.

    Args:
        said: by bucket; nothing if all have joined.
        times: seconds by phase, those that the step has waited for the network, and those of recoveries before.
        dropped: bytes of headers and messages that had left too early, and had to leave again.
    """
    others = plan.group.size - 1
    headers, messages = handshake.bytes_sent + dropped[0], dropped[1]
    if not handshake.all_joined:
        headers += sum(told.bytes_sent for told in plan.headers) + (0 if ties is None else 8 * others)
        messages += sum(exchange.bytes_sent for exchange in plan.exchanges)
        messages += sum(maximum.bytes_sent for maximum in plan.maxima.values())
        messages += 0 if plan.audit is None else plan.audit.bytes_sent
    return StepReport(
        step=step,
        method=", ".join(dict.fromkeys(method.name for method in plan.layout.methods)),
        exchange=tuple(exchange.name for exchange in plan.exchanges),
        bytes_sent=messages + headers,
        header_bytes=headers,
        **_who(plan, said, handshake),
        skipped=skipped,
        waited_for=handshake.late.rank,
        waited_share=handshake.late.share,
        ties=ties,
        seconds=times[0],
        exposed_seconds=times[1],
        generation=plan.group.generation,
        members=plan.group.identities,
        recovery_seconds=times[2],
        exchange_reason=plan.why,
        _agreement=functools.partial(agreement, plan, step, said) if plan.elects else None,
    )


def _who(plan: Plan, said: Sequence[Heard], handshake: Handshake) -> dict[str, Any]:
    """Who has voted, who has not and why, and whose ballot has ended where."""
    voters: list[int] = []
    abstentions: dict[int, str] = {}
    ended: dict[int, str] = {}
    for rank in range(plan.group.size):
        reasons = [heard.status[rank] for heard in said if heard.status[rank] != header.VOTES]
        if handshake.all_joined:
            abstentions[rank] = header.REASONS[header.JOINED]
        elif any(bool(heard.votes[rank].any()) for heard in said):
            voters.append(rank)
        else:
            abstentions[rank] = header.REASONS[reasons[0] if reasons else header.NO_GRADIENT]
        for bucket, heard in zip(plan.layout.buckets, said, strict=bool(said)):
            if heard.ended[rank] >= 0 and rank not in ended:
                ended[rank] = bucket.segments[heard.ended[rank]].name
    return {"voters": tuple(voters), "abstentions": abstentions, "ended_at": ended}
