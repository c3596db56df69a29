"""How often each rank was with the majority, from the bits of the latest step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpisign.backends import Count
from mpisign.errors import ConsistencyError, MpisignError
from mpisign.exchange import rows
from mpisign.exchange.choose import Exchange
from mpisign.exchange.header import Heard
from mpisign.exchange.plan import Plan
from mpisign.layout import Segment
from mpisign.session import Session, collective, current

__all__ = ["agreement"]


@collective("agreement()", repeats=False)
def agreement(plan: Plan, step: int, said: Sequence[Heard]) -> list[float]:
    """By rank, the share of coordinates on which its ballot was that of the decision. **Collective.**

    Args:
        said: by bucket, who has voted.

    Raises:
        MpisignError: another step, or group, has the buffers.
    """
    session = current("agreement()")
    with session.telling("agreement()"):
        share = _share(plan, step, said, session)
    heard_shares = session.gather_bytes(np.float64(share).tobytes(), "agreement()", limit=8)
    if any(len(message) != 8 for message in heard_shares):
        raise ConsistencyError("agreement(): a rank has sent no share: run one version of mpisign on every rank")
    return [float(np.frombuffer(message, np.float64)[0]) for message in heard_shares]


def _share(plan: Plan, step: int, said: Sequence[Heard], session: Session) -> float:
    """This rank's. Raises MpisignError."""
    if step != plan.use.step:
        raise MpisignError(f"the bitmaps of step {step} are gone: ask for agreement() before the next step")
    if session.group is not plan.group:
        raise MpisignError(
            f"the group that voted in step {step} is no more (ranks have left, or mpisign was shut down): ask for "
            f"agreement() before"
        )
    agree: Count = 0
    spoken: Count = 0
    with plan.use(), torch.no_grad():
        for bucket, exchange, heard in zip(plan.layout.buckets, plan.exchanges, said, strict=True):
            if not bucket.method.elects:
                continue
            for place, segment in enumerate(bucket.segments):
                if heard.votes[session.rank, place]:
                    same, both = _agreement(plan, exchange, segment, place, heard, session.rank)
                    agree, spoken = agree + same, spoken + both
    return int(agree) / int(spoken) if int(spoken) else float("nan")


def _agreement(
    plan: Plan, exchange: Exchange, segment: Segment, place: int, heard: Heard, rank: int
) -> tuple[Count, Count]:
    span = slice(segment.start, segment.stop)
    nonzero = exchange.message[1, span] if len(exchange.message) > 1 else None
    moved = exchange.decision[1, span] if len(exchange.decision) > 1 else None
    if place in heard.spoken:
        shape, strides = tuple(plan.layout.parameters[segment.index].shape), plan.layout.strides[segment.index]
        device = exchange.message.device
        nonzero = rows.spoken_words(heard.spoken[place][rank], shape, strides, plan.backend, device)
    return plan.backend.agreement(exchange.message[0, span], exchange.decision[0, span], segment.numel, nonzero, moved)
