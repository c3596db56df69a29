"""Votes between replicas of a model that torch's ``fully_shard`` (FSDP2) has sharded.

Ranks are divided into replicas of ``shards`` ranks each. Inside a replica FSDP shards the model, and adds up its ranks'
gradients in full precision, which never leaves the replica: let it be a node. Between replicas, the ranks that hold the
same shard vote on it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.fsdp
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mpisign import session
from mpisign.errors import OptionError
from mpisign.integrations.ddp import check_options, check_scalers, init_process_group
from mpisign.method import Method
from mpisign.methods import signum
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.plain import plain
from mpisign.policy import check_integer
from mpisign.report import StepReport
from mpisign.session import current, operation

if not hasattr(getattr(distributed.fsdp, "FSDPModule", None), "set_all_reduce_hook"):
    raise ImportError(
        f"votes between replicas of FSDP2 need torch 2.7 or newer, whose FSDPModule has set_all_reduce_hook(), and "
        f"this is torch {torch.__version__}: pip install 'torch>=2.7'"
    )
from torch.distributed.fsdp import FSDPModule

__all__ = ["Vote", "split", "vote"]

OPTIONS = ("method", "zeros", "ties", "exchange", "seed", "bucket_cap_mb")


def split(shards: int, *, backend: Any = None, **options: Any) -> DeviceMesh:
    """Divide the job into replicas of ``shards`` ranks; this rank's job becomes those with its shard. **Collective.**

    Call it after :func:`mpisign.init` and ``broadcast_parameters``, and before ``fully_shard``. Afterwards
    :func:`mpisign.size` is the number of replicas and :func:`mpisign.rank` this one's number; ``torch.distributed``
    knows all ranks.

    Args:
        shards: ranks of one replica, which follow each other in MPI's order.
        backend: of ``torch.distributed``, where that is not started yet.
        options: of :func:`mpisign.init`, for the job of replicas.

    Returns:
        The mesh of this replica's ranks, for ``fully_shard(module, mesh=...)``.

    Raises:
        OptionError: the number of ranks is no multiple of ``shards``.
    """
    with operation("mpisign.integrations.fsdp.split()") as its:
        with its.telling("init()"):
            shards = check_integer("shards", shards, 1)
            if its.size % shards:
                raise OptionError(f"rank {its.rank}: {its.size} ranks cannot be divided into replicas of {shards}")
        if not distributed.is_initialized():
            init_process_group(backend)
        rank, size = its.rank, its.size
        with its.watchdog.guard("MPI's split into replicas"):
            lane = its.group.comm.Split(rank % shards, rank)
    session.shutdown()
    its.watchdog.comm = None  # it is gone
    try:
        session.init(lane, **options)
    finally:
        with its.watchdog.guard("MPI_Comm_free"):
            lane.Free()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (size // shards, shards), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"]


def vote(model: torch.nn.Module, *, method: Method | None = None, **options: Any) -> Vote:
    """Let replicas vote on the gradients of a ``fully_shard``-ed model. Not collective.

    After ``loss.backward()`` every ``p.grad`` is this rank's shard of the decision.

    Args:
        model: after ``fully_shard`` of it, and of modules in it, over the mesh that :func:`split` gave.
        method: one that decides each coordinate by itself, as those of signs do; default :func:`mpisign.signum`.
        options: ``ties``, ``seed``, ``exchange`` and ``bucket_cap_mb`` of :class:`~mpisign.DistributedSignOptimizer`.
            ``zeros`` is ``"coin"`` unless given: shards have no rows.

    Raises:
        OptionError: nothing in ``model`` is sharded, or an option is none of these.
    """
    return Vote(model, method=method, **options)


class Vote:
    """The votes of all sharded modules; made by :func:`vote`.

    Attributes:
        reports: of the last votes, by the name of the sharded module.
    """

    def __init__(self, model: torch.nn.Module, *, method: Method | None = None, **options: Any) -> None:
        current("mpisign.integrations.fsdp.vote()")
        check_options(options, OPTIONS, "vote()")
        self.reports: dict[str, StepReport] = {}
        self._options = {"zeros": "coin", **options, "method": signum() if method is None else method}
        self._optimizers: dict[str, DistributedSignOptimizer] = {}  # each made when its first gradient comes
        self._loaded: dict[str, Any] = {}
        sharded = [(name, its) for name, its in model.named_modules() if isinstance(its, FSDPModule)]
        if not sharded:
            raise OptionError("no module of this model is sharded: call fully_shard() first, and then vote()")
        for number, (name, module) in enumerate(sharded):
            module.set_all_reduce_hook(self._hook(name or "model", number))

    def _hook(self, name: str, number: int) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            with operation("the vote of FSDP's replicas"), plain():
                self._vote(name, number, gradient)

        return hook

    def _vote(self, name: str, number: int, gradient: torch.Tensor) -> None:
        """Replace a module's shard of the gradient, (n,), by the decision of all replicas. **Collective.**"""
        optimizer = self._optimizers.get(name)
        if optimizer is None:
            self._check(gradient)
            twin = torch.nn.Parameter(torch.zeros_like(gradient))
            options = {**self._options, "seed": self._options.get("seed", 0) + number}
            optimizer = DistributedSignOptimizer(torch.optim.SGD([twin], lr=1.0), [(name, twin)], **options)
            if name in self._loaded:
                optimizer.load_state_dict(self._loaded.pop(name))
            self._optimizers[name] = optimizer
        (twin,) = optimizer.param_groups[0]["params"]
        if gradient.is_cuda:  # of another stream of FSDP's, that may give it away before this one has read it
            gradient.record_stream(torch.cuda.current_stream(gradient.device))
        twin.grad = gradient
        optimizer.synchronize()
        report = optimizer.report
        if twin.grad is None or report is None or report.skipped:
            gradient.zero_()
        elif twin.grad.data_ptr() != gradient.data_ptr():
            gradient.copy_(twin.grad)
        if report is not None:
            self.reports[name] = report
        optimizer.zero_grad()

    def _check(self, gradient: torch.Tensor) -> None:
        """**Collective.**"""
        its = current("the vote of FSDP's replicas")
        with its.telling("step()"):
            check_scalers("FSDP")
            shards = distributed.get_world_size() // its.size
            if gradient.dtype not in (torch.float32, torch.bfloat16) and shards > 2:  # of 2, by nothing
                raise OptionError(
                    f"rank {its.rank}: FSDP divides gradients of {gradient.dtype} once more after the vote where there "
                    f"are more than 2 shards: pass it mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)"
                )

    def state_dict(self) -> dict[str, Any]:
        """This rank's memories; each rank's are its own."""
        return {**self._loaded, **{name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave on this rank. It is looked at when the first gradients come."""
        self._optimizers.clear()
        self._loaded = dict(state_dict)
