"""Votes inside torch's DistributedDataParallel: for a script, or a framework, that insists on it.

DDP keeps the model and its buckets, and where it would average a bucket's gradients, ranks vote on them.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import distributed
from torch.amp import GradScaler
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from mpisign.errors import ConsistencyError, OptionError
from mpisign.method import Method
from mpisign.methods import signum
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.places import num_nodes, rank
from mpisign.plain import plain
from mpisign.report import StepReport
from mpisign.scaling import living
from mpisign.session import current, operation

__all__ = ["Vote", "init_process_group", "vote"]

PORTS = 1 << 16
OPTIONS = ("method", "zeros", "ties", "exchange", "seed", "clip_grad_norm", "bucket_cap_mb")


def vote(model: DistributedDataParallel, **options: Any) -> Vote:
    """Let ranks vote on the gradients of a DDP model, instead of averaging them. Not collective.

    After ``loss.backward()`` every ``p.grad`` is the decision: +1, -1 or 0 with a vote, what a method's rule decides
    else. The optimizer stays as it is, and is not wrapped. Gradients that accumulate under ``model.no_sync()`` are
    voted on as their sum, in the backward that follows. A parameter that no rank has used, or whose gradient is zero
    throughout on a rank, is not voted on there.

    Args:
        model: the DDP model, before its first backward; its processes are the job's, in the same order.
        options: ``method``, ``zeros``, ``ties``, ``exchange``, ``seed``, ``clip_grad_norm`` and ``bucket_cap_mb`` of
            :class:`~mpisign.DistributedSignOptimizer`.

    Returns:
        The :class:`Vote`, which has the report, and each rank's memory for checkpoints.

    Raises:
        OptionError: ``model`` is no DDP model, or has a hook; its processes are not the job's; the method exchanges
            models; or an option is none of these.

    Example::

        from mpisign.integrations import ddp

        mpisign.init()
        ddp.init_process_group()
        model = DistributedDataParallel(model)
        ddp.vote(model, method=mpisign.signum())
    """
    its = Vote(model, **options)
    model.register_comm_hook(its, _hook)  # type: ignore[arg-type]  # annotations that torch can compare are no texts
    return its


def _hook(state, bucket):  # type: ignore[no-untyped-def]
    return state.take(bucket)


class Vote:
    """The state of the hook that :func:`vote` registers."""

    def __init__(self, model: DistributedDataParallel, *, method: Method | None = None, **options: Any) -> None:
        session = current("mpisign.integrations.ddp.vote()")
        method = signum() if method is None else method
        here = f"rank {session.rank}: "
        check_options(options, OPTIONS, "vote()")
        if not isinstance(model, DistributedDataParallel):
            raise OptionError(
                f"{here}vote() takes a DistributedDataParallel model, and {type(model).__name__} is none: around a "
                f"plain model's optimizer there is DistributedSignOptimizer"
            )
        if model._comm_hooks:
            raise OptionError(f"{here}this DDP model has a communication hook already, and can have one")
        if isinstance(method, Method) and method.exchanges_models:
            raise OptionError(f"{here}{method.name} exchanges models, not gradients: use DistributedSignOptimizer")
        group = model.process_group
        place = distributed.get_rank(group), distributed.get_world_size(group)
        if place != (session.rank, session.size):
            raise OptionError(
                f"{here}to torch.distributed this is rank {place[0]} of {place[1]}, and to MPI rank {session.rank} of "
                f"{session.size}: use init_process_group() of mpisign.integrations.ddp"
            )
        ignored = set(getattr(model, "parameters_to_ignore", ()))
        named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad and name not in ignored]
        # Each stands for a parameter, shares its memory, and has a gradient of its own: DDP looks at the parameter's.
        self._twins = {p: torch.nn.Parameter(p.detach()) for _, p in named}
        self._optimizer = DistributedSignOptimizer(
            torch.optim.SGD(self._twins.values(), lr=1.0),
            [(name, self._twins[p]) for name, p in named],
            method=method,
            apply="optimizer",
            **options,
        )
        self._taken: list[tuple[Any, Future[torch.Tensor]]] = []
        self._looked = False

    @property
    def report(self) -> StepReport | None:
        """Of the last vote; None before the first."""
        return self._optimizer.report

    def set_epoch(self, epoch: int) -> None:
        """As :meth:`mpisign.DistributedSignOptimizer.set_epoch`."""
        self._optimizer.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory and the number of votes; each rank's is its own."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave on this rank. Raises as the optimizer's does."""
        self._optimizer.load_state_dict(state_dict)

    def take(self, bucket: Any) -> Future[torch.Tensor]:
        """A bucket from DDP; all are voted on when the last has come. **Collective.**"""
        device = bucket.buffer().device
        # Not torch.futures.Future[...]: DDP waits for it, on a GPU with the streams of that device.
        future: Future[torch.Tensor] = Future(devices=[device] if device.type == "cuda" else None)
        self._taken.append((bucket, future))
        if bucket.is_last():
            taken, self._taken = self._taken, []
            with operation("the vote of DDP's gradients"), plain():
                self._vote([(its.parameters(), its.gradients()) for its, _ in taken])
            for its, waiting in taken:
                waiting.set_result(its.buffer())
        return future

    def _vote(self, buckets: list[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> None:
        """Replace the gradients, views of DDP's buckets, by the decision. **Collective.**"""
        session = current("the vote of DDP's gradients")
        with session.telling("step()"):
            if not self._looked:
                self._looked = True
                check_scalers("DDP")
            gradients: dict[torch.Tensor, torch.Tensor] = {}
            for parameters, views in buckets:
                gradients.update(zip(parameters, views, strict=True))
            used = torch.stack([view.any() for view in gradients.values()]).tolist()  # of a GPU this is asked once
            for (parameter, gradient), is_used in zip(gradients.items(), used, strict=True):
                twin = self._twins.get(parameter)
                if twin is None:
                    raise ConsistencyError(
                        f"rank {session.rank}: DDP has a gradient of a parameter that was frozen, or not there, when "
                        f"vote() was called: call it after the model is complete"
                    )
                if twin.data_ptr() != parameter.data_ptr():
                    twin.data = parameter.detach()
                # DDP has put zeros where this rank has not used a parameter.
                twin.grad = gradient if is_used else None
        self._optimizer.synchronize()
        skipped = self._optimizer.report is None or self._optimizer.report.skipped
        with session.telling("step()"):
            for parameter, gradient in gradients.items():
                decision = self._twins[parameter].grad
                if decision is None or skipped:
                    gradient.zero_()
                elif decision.data_ptr() != gradient.data_ptr():
                    gradient.copy_(decision)
        self._optimizer.zero_grad()


def check_options(options: Mapping[str, Any], possible: Sequence[str], whose: str) -> None:
    """Raise OptionError unless all are options of the optimizer that ``whose`` votes can heed."""
    if strange := options.keys() - possible:
        raise OptionError(f"rank {rank()}: {whose} takes {', '.join(possible)}, and not {', '.join(sorted(strange))}")


def check_scalers(whose: str) -> None:
    """Raise OptionError if a GradScaler is at work, on gradients that ``whose`` hook has decided."""
    if any(scaler.is_enabled() and scaler._scale is not None for scaler in living(GradScaler)):
        raise OptionError(
            f"a GradScaler would divide what {whose}'s ranks have decided by its scale: train in bfloat16, which needs "
            f"none, or without {whose}, by a DistributedSignOptimizer, which knows it"
        )


def init_process_group(backend: Literal["gloo", "nccl"] | None = None, **options: Any) -> None:
    """Start ``torch.distributed`` with the job's ranks, without ``MASTER_ADDR``, ``RANK`` and the like. **Collective.**

    Args:
        backend: default ``"nccl"`` where this rank has a GPU, else ``"gloo"``.
        options: of ``torch.distributed.init_process_group``.
    """
    act = "broadcast_object()"
    with operation("init_process_group()") as session:
        store, told = None, None
        make_store = distributed.TCPStore  # type: ignore[attr-defined]  # torch's stubs leave it out
        with session.telling(act):
            if session.rank == 0:
                host = "127.0.0.1" if num_nodes() == 1 else socket.gethostname()
                store = make_store(host, 0, session.size, is_master=True, wait_for_workers=False)
                told = [host, store.port]
        host, port = session.spread_value(told, (str, int), 0, act)
        with session.telling(act):
            if store is None:
                if not 0 < port < PORTS:
                    raise ConsistencyError(f"rank 0 has told port {port}, which cannot be")
                store = make_store(host, port, session.size, is_master=False)
        session.meet(act)
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        distributed.init_process_group(backend, store=store, rank=session.rank, world_size=session.size, **options)
