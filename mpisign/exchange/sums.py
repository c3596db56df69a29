"""What a memory keeps as a sum over the ranks, summed anew over those that there are now."""

from __future__ import annotations

from mpisign.cuts import cut
from mpisign.exchange.plan import Plan
from mpisign.exchange.staging import Buffer
from mpisign.policy import StepContext
from mpisign.session import Session

__all__ = ["sum_over_ranks"]


def sum_over_ranks(plan: Plan, context: StepContext, session: Session) -> None:
    """Make ``memory.summed`` of every parameter the sum of the ranks' ``share``, the same bits on all. **Collective.**

    One dense reduction, once after ranks have come or gone: what those who left had added would stay in it for ever.
    """
    from mpi4py import MPI

    comm, root, store = session.group.comm, session.rank == 0, plan.store
    for parameter in plan.layout.parameters:
        memory = store.memory_of(parameter)
        if not memory.summed:
            continue
        state = store.of(parameter)
        total = state[memory.summed]
        # Staged, as Open MPI's nonblocking reductions crash on GPU memory.
        buffer = Buffer((total.numel(),), total.dtype, total.device, staged=True)
        buffer.tensor.copy_(memory.share(state, context))
        buffer.push()
        buffer.ready()
        with session.tracer.span("sum of memories"):
            for start, length in cut(len(buffer.mpi), buffer.item.itemsize):
                part = buffer.mpi[start : start + length]
                mine, there = (MPI.IN_PLACE, part) if root else (part, None)
                session.wait(session.post(comm.Ireduce(mine, there, MPI.SUM, 0), buffer, part))
                session.wait(session.post(comm.Ibcast(part, root=0), buffer, part))
        buffer.pull()
        total.copy_(buffer.tensor)
    store.unsummed = False
