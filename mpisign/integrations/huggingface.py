"""Hugging Face's Trainer and Accelerate under mpirun.

Both take the launcher's variables for an order to start ``torch.distributed``, which fails (``MASTER_ADDR expected, but
not set``), or, where that is obeyed, wrap the model in DDP, so that ranks vote on averages. :func:`init` hides the
variables, so that each process trains a plain model, and the vote is the optimizer's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback

from mpisign import session
from mpisign.checkpoint.state import random_state, set_random_state
from mpisign.collectives import broadcast
from mpisign.errors import OptionError
from mpisign.integrations import personal
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.places import local_rank, rank, size
from mpisign.report import StepReport
from mpisign.sync import broadcast_parameters
from mpisign.warning import warn

__all__ = ["MpisignCallback", "hide_launcher", "init", "shard"]

PREFIXES = ("OMPI_COMM_WORLD", "PMI_", "PMIX_", "MV2_COMM")
OF_DDP = ("LOCAL_RANK", "RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEVICES = "CUDA_VISIBLE_DEVICES"


def init(*args: Any, **options: Any) -> None:
    """:func:`mpisign.init`, and then let Hugging Face's libraries see one process. **Collective.**

    Call it before ``TrainingArguments`` or ``Accelerator`` are made, and before anything uses CUDA: of several GPUs
    this process then sees only its own. To Accelerate the process is one alone, but ``is_main_process`` is true on rank
    0 only. Nothing of theirs talks to other ranks; give each its part of the data with :func:`shard`.

    Takes and raises what :func:`mpisign.init` does.
    """
    if not session.is_initialized():
        session.init(*args, **options)
    hide_launcher()
    if torch.cuda.is_available() and not torch.cuda.is_initialized() and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        seen = os.environ.get(DEVICES, "").split(",") if os.environ.get(DEVICES) else [str(i) for i in range(count)]
        os.environ[DEVICES] = seen[local_rank() % len(seen)]  # else Trainer wraps the model in DataParallel
    PartialState(cpu=not torch.cuda.is_available())
    _number_states()


def hide_launcher() -> dict[str, str]:
    """Remove the launcher's variables, and those that scripts for DDP set, after MPI has started. Returns them."""
    return {name: os.environ.pop(name) for name in sorted(os.environ) if name.startswith(PREFIXES) or name in OF_DDP}


def shard(dataset: Any) -> Any:
    """This rank's part of a dataset: every size-th example from its number on, as many on every rank.

    Args:
        dataset: with ``len()``; a Hugging Face ``Dataset`` stays one, and any other becomes a ``torch`` ``Subset``.

    Raises:
        OptionError: it has no length, as what streams.
    """
    if not hasattr(dataset, "__len__"):
        raise OptionError(
            f"rank {rank()}: shard() takes what has a length, and {type(dataset).__name__} has none: of a streaming "
            f"dataset take datasets.distributed.split_dataset_by_node(dataset, rank=mpisign.rank(), "
            f"world_size=mpisign.size()), and end all ranks at the same step by TrainingArguments(max_steps=...)"
        )
    places = range(rank(), len(dataset) - len(dataset) % size(), size())
    return dataset.select(places) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, places)


def _number_states() -> None:
    """Tell Accelerate which process this is, but not that there are others."""
    for state in (PartialState, AcceleratorState):
        if state._shared_state:
            its = state._shared_state
            its["process_index"], its["local_process_index"] = rank(), local_rank()


class MpisignCallback(TrainerCallback):
    """For ``Trainer(callbacks=[MpisignCallback(optimizer)])``: rank 0 saves and logs, each rank keeps its own.

    A checkpoint's folder gets a file ``mpisign-rank-00001.pt`` from each rank but 0, whose state is in Trainer's own
    files: this rank's memory, its states of random number generators and its buffers; with ``every=`` also the wrapped
    optimizer's state and, within a window, its parameters. Resuming with as many ranks is then exact; Trainer loads
    rank 0's on all first, which warns, and this callback puts it right. When training ends, a window that has begun
    ends, or all get the best model, if rank 0 has loaded that. It also adds the numbers of ``optimizer.report`` to
    Trainer's logs, and steps ``set_epoch`` for methods that change with it.

    Args:
        optimizer: the one that Trainer was given.
        resume_from: the checkpoint's folder, if ``trainer.train(resume_from_checkpoint=...)`` names one outside of
            ``output_dir``.
    """

    def __init__(self, optimizer: DistributedSignOptimizer, resume_from: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(optimizer, DistributedSignOptimizer):
            raise OptionError(
                f"MpisignCallback takes the DistributedSignOptimizer that Trainer(optimizers=...) gets, and "
                f"{type(optimizer).__name__} is none"
            )
        self.optimizer, self.resume_from = optimizer, resume_from
        self._random: dict[str, Any] | torch.Tensor | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """TrainingArguments have made Accelerate's state anew."""
        if args.world_size != 1 or args.n_gpu > 1:
            raise OptionError(
                f"rank {rank()}: Trainer sees {args.world_size} processes and {args.n_gpu} GPUs, and would average "
                f"gradients itself: call mpisign.integrations.huggingface.init() before TrainingArguments"
            )
        if args.save_strategy == "best":
            raise OptionError(
                f"rank {rank()}: with save_strategy='best' each rank saves when its own evaluation says so: save where "
                f"you evaluate (save_strategy='steps', save_steps=eval_steps), with load_best_model_at_end=True"
            )
        if rank() > 0:  # rank 0 alone saves the model, and this rank's random numbers would overwrite its
            args.save_only_model = True
        if args.distributed_state is not None:
            args.distributed_state.process_index, args.distributed_state.local_process_index = rank(), local_rank()
        _number_states()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """After Trainer has loaded rank 0's state: this rank's."""
        trained = {p for group in self.optimizer.param_groups for p in group["params"]}
        if not trained & set(model.parameters()):
            raise OptionError(
                f"rank {rank()}: Trainer trains another model than the one of MpisignCallback's optimizer"
            )
        if state.global_step and rank() > 0:
            path = self._file(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not path.is_file():
                warn(f"rank {rank()}: {path} is not there, so this rank's memory starts fresh")
                return
            own = torch.load(path, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(personal.state(own, self.optimizer, self.optimizer.state_dict()))
            personal.put_back(own, self.optimizer, model)
            self._random = own.get("random", own.get("rng"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **more: Any) -> None:
        """Methods that change with the epoch hear of it.

        Where an epoch begins after a resume, Trainer loads rank 0's random numbers, calls the loader's ``set_epoch``,
        and draws: this rank's own must be there in between.
        """
        self.optimizer.set_epoch(int(state.epoch or 0))
        its = getattr(train_dataloader, "set_epoch", None)
        if self._random is not None and its is not None:

            def set_epoch(epoch: int) -> None:
                del train_dataloader.set_epoch
                self._restore_random()
                its(epoch)

            train_dataloader.set_epoch = set_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Within an epoch it loads rank 0's just before the first step."""
        self._restore_random()

    def _restore_random(self) -> None:
        own, self._random = self._random, None
        if isinstance(own, torch.Tensor):  # as 0.2 has saved it
            torch.set_rng_state(own)
        elif own is not None:
            set_random_state(own)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Whoever has asked for it: what is this rank's own, as rank 0 has saved the rest."""
        if rank() == 0:
            return
        state.best_model_checkpoint = None  # rank 0 may be writing it still
        own = personal.taken(self.optimizer, self.optimizer.state_dict(), model)
        path = self._file(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        torch.save({**own, "random": random_state()}, beside)
        beside.replace(path)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """All ranks go on with the same model. **Collective.** Not called after an exception."""
        if args.load_best_model_at_end and self._has_best(state):
            broadcast_parameters(model.state_dict())
        elif self.optimizer.outer is not None:
            self.optimizer.join()

    @staticmethod
    def _has_best(state: Any) -> bool:
        """Whether rank 0 has loaded the best model; others, which save none, know of none."""
        return bool(broadcast(torch.tensor(state.best_model_checkpoint is not None, device="cpu")))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Add what the latest step did."""
        report: StepReport | None = self.optimizer.report
        if logs is not None and report is not None and "loss" in logs:
            logs.update({f"mpisign_{name}": value for name, value in report.as_dict().items() if name != "step"})

    @staticmethod
    def _file(folder: str | os.PathLike[str]) -> Path:
        return Path(folder) / f"mpisign-rank-{rank():05d}.pt"
