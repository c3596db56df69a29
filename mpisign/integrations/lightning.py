"""A strategy for Lightning's Trainer, whose ranks vote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities import rank_zero as fabric_rank_zero
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from mpisign import places, session
from mpisign.checkpoint.state import map_tensors
from mpisign.collectives import allgather, allreduce
from mpisign.errors import CheckpointError, OptionError
from mpisign.integrations import personal
from mpisign.integrations.batch_norm import SyncBatchNorm
from mpisign.integrations.ddp import check_options
from mpisign.integrations.metrics import sync_metrics
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.sync import broadcast_object, broadcast_parameters
from mpisign.trees import shown

__all__ = ["MpisignStrategy", "Reports"]

OPS = {"mean": "average", "avg": "average", "sum": "sum", "min": "min", "max": "max"}
OPTIONS = (
    *("method", "zeros", "ties", "exchange", "seed", "clip_grad_norm", "bucket_cap_mb", "apply", "audit"),
    *("every", "outer", "average_buffers", "delay"),
)


class MpisignStrategy(ParallelStrategy):  # type: ignore[misc]
    """For ``Trainer(strategy=MpisignStrategy(), devices=1)`` under mpirun: one process a rank, and a vote at each step.

    Each plain optimizer that ``configure_optimizers`` returns is wrapped in a
    :class:`~mpisign.DistributedSignOptimizer`, and the model starts as rank 0's. Rank 0 logs and writes checkpoints;
    beside each, ``NAME.ckpt.ranks`` holds one file a rank with what is its own: its memory and buffers; with ``every=``
    also the wrapped optimizers' state and, within a window, its parameters, where rank 0's file has the common ones.
    Resuming on as many ranks is exact. When training ends, a window that has begun ends, and all ranks are equal.
    Data is shared out by Lightning's own distributed samplers, ``sync_dist=True`` reduces metrics over all ranks, and
    torchmetrics in the module compute over all.

    Args:
        options: ``method``, ``zeros``, ``ties``, ``exchange``, ``seed``, ``clip_grad_norm``, ``bucket_cap_mb``,
            ``apply``, ``audit``, ``every``, ``outer``, ``average_buffers`` and ``delay`` of
            :class:`~mpisign.DistributedSignOptimizer`; ``seed`` is raised by one for each further optimizer.

    Making one joins the job, if nobody has called :func:`mpisign.init`: it is **collective** then.

    Raises:
        OptionError: an option is none of these; when training starts: an optimizer or the model is wrapped already,
            or, on CPUs, ``devices`` is not 1.
    """

    strategy_name = "mpisign"

    def __init__(self, *, checkpoint_io: Any = None, precision_plugin: Any = None, **options: Any) -> None:
        if not session.is_initialized():
            session.init()
        check_options(options, OPTIONS, "MpisignStrategy()")
        super().__init__(
            cluster_environment=_Environment(), checkpoint_io=checkpoint_io, precision_plugin=precision_plugin
        )
        self._options = options
        self.set_world_ranks()

    def set_world_ranks(self) -> None:
        """Who logs and prints. Lightning would ask variables of launchers that it knows."""
        rank_zero.rank_zero_only.rank = fabric_rank_zero.rank_zero_only.rank = places.rank()

    # ------------------------------------------------------------------------------------------------- where

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        on_gpu = self.accelerator is not None and type(self.accelerator).__name__ == "CUDAAccelerator"
        return places.device() if on_gpu else torch.device("cpu")

    @property
    def is_distributed(self) -> bool:
        """Lightning asks it before it makes distributed samplers and synchronizes metrics."""
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the data is this rank's."""
        return {"num_replicas": places.size(), "rank": places.rank()}

    def model_to_device(self) -> None:
        """As Lightning's own."""
        self.model.to(self.root_device)

    # ------------------------------------------------------------------------------------------------- start

    def setup_environment(self) -> None:
        """Refuse what would start another job in this one."""
        if self.root_device.type == "cpu" and len(self.parallel_devices or ()) > 1:
            raise OptionError(
                f"rank {places.rank()}: Trainer(devices={len(self.parallel_devices)}): mpirun has started one process "
                f"for each device, so pass devices=1"
            )
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Wrap the optimizers, and give every rank rank 0's model. **Collective.**"""
        for module in self.model.modules():
            if isinstance(module, DistributedDataParallel):
                raise OptionError(
                    f"rank {places.rank()}: the model holds a DistributedDataParallel module, which averages "
                    f"gradients before the vote: take the model out of it"
                )
        sync_metrics(self.lightning_module)
        if self._layer_sync is not None and trainer.state.fn == TrainerFn.FITTING:  # Trainer(sync_batchnorm=True)
            SyncBatchNorm.convert(self.lightning_module)
        super().setup(trainer)
        if not any(isinstance(its, _End) for its in trainer.callbacks):
            trainer.callbacks.insert(0, _End())
        broadcast_parameters(self.model.state_dict())

    def setup_optimizers(self, trainer: Any) -> None:
        """What ``configure_optimizers`` returns, wrapped."""
        super().setup_optimizers(trainer)
        names = {p: name for name, p in self.model.named_parameters()}
        options = {"seed": 0, **self._options}
        plain: list[torch.optim.Optimizer] = list(self.optimizers)  # type: ignore[has-type]
        wrapped = []
        for place, optimizer in enumerate(plain):
            if isinstance(optimizer, DistributedSignOptimizer):
                raise OptionError(
                    f"rank {places.rank()}: configure_optimizers() returns a DistributedSignOptimizer, which "
                    f"MpisignStrategy would wrap again: return the plain optimizer, and give the strategy its options"
                )
            held = {p for group in optimizer.param_groups for p in group["params"]}
            named = [(name, p) for p, name in names.items() if p in held]
            these = {**options, "seed": options["seed"] + place}
            wrapped.append(DistributedSignOptimizer(optimizer, named, **these))
        self.optimizers = wrapped

    # ------------------------------------------------------------------------------------------ between ranks

    def barrier(self, name: str | None = None) -> None:
        """**Collective.**"""
        session.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """``src``'s object. **Collective.**"""
        return broadcast_object(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """All ranks' tensors made one. **Collective.**"""
        op = OPS.get(str(getattr(reduce_op, "name", reduce_op)).rpartition(".")[2].lower())
        if op is None:
            raise OptionError(f"rank {places.rank()}: reduce_op={shown(reduce_op)} is not one of {sorted(OPS)}")
        if not isinstance(tensor, torch.Tensor):
            return tensor
        result = allreduce(tensor, op)  # type: ignore[arg-type]
        return result.to(tensor.dtype) if tensor.dtype.is_floating_point else result

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """(...) on each rank to (ranks, ...). **Collective.**

        With ``sync_grads`` backward is, too: a rank's gradient is the sum of what all ranks have for its part.
        """
        if sync_grads and tensor.requires_grad:
            gathered: torch.Tensor = _Gathered.apply(tensor)
            return gathered
        return allgather(tensor.unsqueeze(0))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, say yes. **Collective.**"""
        return bool(allreduce(torch.tensor(bool(decision), device="cpu"), "min" if all else "max"))

    # -------------------------------------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """As Lightning's own; with ``every``, of the parameters that all ranks have in common."""
        apart = [optimizer for optimizer in self.optimizers if optimizer.outer is not None]
        with ExitStack() as stack:
            for optimizer in apart:
                stack.enter_context(optimizer.common_parameters())
            state: dict[str, Any] = super().lightning_module_state_dict()
            return map_tensors(state, torch.clone) if apart else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file by rank 0, and beside it one a rank. **Collective.**

        Where it is says rank 0: ModelCheckpoint puts each rank's own metrics into names.
        """
        filepath = self.broadcast(filepath)
        states = checkpoint.get("optimizer_states", ())
        pairs = zip(self.optimizers, states, strict=False)  # none, if the model alone is saved
        own = [personal.taken(optimizer, state, self.lightning_module) for optimizer, state in pairs]
        for state in states:
            del state["mpisign"]
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if own:
            path = self._file(filepath)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".tmp")
            torch.save(own, beside)
            beside.replace(path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Rank 0's file, with what is this rank's own under ``"mpisign"``. **Collective.**

        Raises:
            CheckpointError: on every rank, if some have files of their own and others do not.
        """
        checkpoint_path = self.broadcast(checkpoint_path)
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        path = self._file(checkpoint_path)
        if os.path.islink(checkpoint_path) and not path.is_file():  # by save_last="link"
            path = self._file(os.path.realpath(checkpoint_path))
        found = allgather(torch.tensor([path.is_file()], device="cpu")).tolist()
        if any(found) and not all(found):
            without = [rank for rank, its in enumerate(found) if not its]
            raise CheckpointError(
                f"rank {places.rank()}: ranks {without} have no files in {path.parent}, and the others do: resume on "
                f"as many ranks as have saved, with the whole folder where all ranks see it; or remove the folder, and "
                f"all memories start fresh"
            )
        if path.is_file():
            own = torch.load(path, map_location="cpu", weights_only=True)
            # Version 0.2 has saved the memories alone.
            checkpoint["mpisign"] = [its if "mpisign" in its else {"mpisign": its} for its in own]
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As Lightning's own, and then what is this rank's own in the model, which is rank 0's so far."""
        own = checkpoint.get("mpisign")
        if own is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        each = list(zip(own, self.optimizers, checkpoint["optimizer_states"], strict=True))
        states = [personal.state(its, optimizer, shared) for its, optimizer, shared in each]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        for its, optimizer, _ in each:
            personal.put_back(its, optimizer, self.lightning_module)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As Lightning's own."""
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def remove_checkpoint(self, filepath: Any) -> None:
        """The file, and what is beside it."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero and (folder := self._file(filepath).parent).is_dir():
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()

    @staticmethod
    def _file(filepath: Any) -> Path:
        return Path(f"{filepath}.ranks") / f"rank-{places.rank():05d}.pt"


class _Gathered(torch.autograd.Function):
    """(...) on each rank to (ranks, ...), and back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return allgather(tensor.unsqueeze(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return allreduce(gradient, "sum")[places.rank()]


class _Environment(ClusterEnvironment):  # type: ignore[misc]
    """The job, as Lightning asks about it."""

    creates_processes_externally = True
    main_address, main_port = "", 0  # nobody connects there

    @staticmethod
    def detect() -> bool:
        return session.is_initialized()

    def world_size(self) -> int:
        return places.size()

    def global_rank(self) -> int:
        return places.rank()

    def local_rank(self) -> int:
        return places.local_rank()

    def node_rank(self) -> int:
        return places.node_rank()

    def set_world_size(self, size: int) -> None:
        """It is MPI's."""

    def set_global_rank(self, rank: int) -> None:
        """It is MPI's."""


class _End(Callback):  # type: ignore[misc]
    """Ends windows that have begun, before other callbacks hear that training has ended."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """**Collective.** Not called after an exception."""
        for optimizer in trainer.optimizers:
            if optimizer.outer is not None:
                optimizer.join()


class Reports(Callback):  # type: ignore[misc]
    """For ``Trainer(callbacks=[Reports()])``: logs ``optimizer.report.as_dict()`` to the Trainer's loggers.

    They are called ``mpisign/bytes_sent`` and so on, of the first optimizer's exchanges: of each
    ``log_every_n_steps``-th, beginning with the first, and never if that is 0.
    """

    def __init__(self) -> None:
        self._last: Any = None
        self._exchanges = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch, on rank 0."""
        report = getattr(trainer.optimizers[0], "report", None) if trainer.optimizers else None
        if report is None or report is self._last:  # gradients accumulate, or steps are local
            return
        self._last = report
        self._exchanges += 1
        every = trainer.log_every_n_steps
        if every and (self._exchanges - 1) % every == 0:
            numbers = {f"mpisign/{name}": its for name, its in report.as_dict().items() if name != "step"}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
