"""Who trains the transformer of train_text.py: methods, their optimizers, and how often they exchange; torch's DDP."""

from __future__ import annotations

import argparse
import atexit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import mpisign
from mpisign.integrations.ddp import init_process_group

__all__ = ["CONTENDERS", "DEFAULT", "RATES", "SAME_LOSSES", "Contender", "Reduced", "make_contenders"]

DEFAULT = ["vote", "adamw", "dgc"]
LOCAL = {
    "local2-ef": (2, "scaled signs", mpisign.ef_signsgd),
    "local4-ef": (4, "scaled signs", mpisign.ef_signsgd),
    "local4-vote": (4, "scaled vote", mpisign.scaled_vote),
    "local8-mean": (8, "mean", mpisign.mean),
    "local8-vote": (8, "scaled vote", mpisign.scaled_vote),
    "local8-ef": (8, "scaled signs", mpisign.ef_signsgd),
    "local8-double": (8, "DoubleSqueeze", mpisign.double_squeeze),
    "local30-ef": (30, "scaled signs", mpisign.ef_signsgd),
    "late8-vote": (8, "scaled vote", mpisign.scaled_vote),
    "late8-ef": (8, "scaled signs", mpisign.ef_signsgd),
}
"""AdamW on each rank's own gradients: how many steps a window has, and how their differences are exchanged."""

DELAYS = {"late8-vote": 2, "late8-ef": 2}
"""How many steps of the next window a decision travels."""

DDP = {
    "ddp": "AdamW, DDP fp32",
    "ddp-bf16": "AdamW, DDP bf16 hook",
    "ddp-powersgd": "AdamW, DDP PowerSGD hook",
}
"""AdamW on what torch's DistributedDataParallel averages over gloo or NCCL."""

SAME_LOSSES = {"ddp": "adamw", "ddp-bf16": "adamw"}
"""Contenders whose losses differ from another's by rounding, as for their seconds alone they are there."""

CONTENDERS = (*DEFAULT, "one_bit_adam", "zero_one_adam", *LOCAL, *DDP)

RATES = {
    "vote": 1e-3,
    "adamw": 6e-3,
    "dgc": 1.0,
    "one_bit_adam": 3e-3,
    "zero_one_adam": 3e-3,
    **dict.fromkeys(LOCAL, 6e-3),
    "local30-ef": 3e-3,
    **dict.fromkeys(DDP, 6e-3),
    "ddp-powersgd": 3e-3,
}
"""Highest learning rates, unless ``--rates`` says others."""

BETAS = (0.9, 0.98)
RANK, VANILLA = 4, 10  # of PowerSGD's matrices, and how many steps in full come first
WHOLE_MODEL_MB = 4096  # one bucket: gloo mismatches the messages of PowerSGD's several buckets


@dataclass(frozen=True)
class Contender:
    """A method, or none, and the optimizer around it.

    Attributes:
        label: for tables and plots.
        method: None: torch's DDP averages gradients, by the hook of the contender's name.
        optimizer: makes the one that is wrapped, of parameters.
        every, delay: steps of a window, if the optimizer steps on each rank's own gradients between exchanges, and
            after how many of the next one a decision is applied.
    """

    label: str
    method: mpisign.Method | None
    optimizer: Callable[[Any], torch.optim.Optimizer]
    every: int | None = None
    delay: int = 0


def make_contenders(args: argparse.Namespace, steps: int, factor: float) -> dict[str, Contender]:
    """By the names that ``--only`` takes. Weights decay alike in all: by the same share in the course of training.

    Args:
        steps: of a whole training. 1-bit Adam freezes its second moment after 15 % of them.
        factor: times the learning rates.
    """
    rates = {name: lr * factor for name, lr in args.rates.items()}

    def decayed(name: str) -> dict[str, Any]:
        return {"lr": rates[name], "weight_decay": args.decay / rates[name]}

    def adamw(name: str) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.AdamW(parameters, **decayed(name), betas=BETAS)

    def sgd(name: str) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.SGD(parameters, **decayed(name))

    beta1, beta2 = BETAS
    one_bit = mpisign.one_bit_adam(max(1, round(0.15 * steps)), beta1, beta2)
    zero_one = mpisign.zero_one_adam(beta1=beta1, beta2=beta2)
    dgc = mpisign.dgc(args.dgc_ratio, clip=args.dgc_clip)
    return {
        "vote": Contender(f"{args.method.name}, {args.method.rule.name}", args.method, sgd("vote")),
        "adamw": Contender("AdamW, mean in fp32", mpisign.mean(), adamw("adamw")),
        "dgc": Contender(f"DGC, {100 * args.dgc_ratio:g} %", dgc, sgd("dgc")),
        "one_bit_adam": Contender("1-bit Adam", one_bit, sgd("one_bit_adam")),
        "zero_one_adam": Contender("0/1 Adam", zero_one, sgd("zero_one_adam")),
        **{
            name: Contender(
                f"AdamW, every {every}: {how}" + (f", {DELAYS[name]} steps late" if name in DELAYS else ""),
                method(),
                adamw(name),
                every,
                DELAYS.get(name, 0),
            )
            for name, (every, how, method) in LOCAL.items()
        },
        **{name: Contender(label, None, adamw(name)) for name, label in DDP.items()},
    }


class Reduced:
    """A model in torch's DDP, with the hook that a contender's name stands for. Making one is **collective**.

    Attributes:
        network: to be called in place of the model.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        if not distributed.is_initialized():
            init_process_group()
            atexit.register(distributed.destroy_process_group)
        self._numel = sum(p.numel() for p in model.parameters())
        self._bytes_each = 2 if name == "ddp-bf16" else 4
        self._power: powerSGD_hook.PowerSGDState | None = None
        self._counted = 0
        cap = WHOLE_MODEL_MB if name == "ddp-powersgd" else None
        self.network = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=cap)
        if name == "ddp-bf16":
            self.network.register_comm_hook(None, _bf16)
        elif name == "ddp-powersgd":
            self._power = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=VANILLA)
            self.network.register_comm_hook(self._power, powerSGD_hook.powerSGD_hook)

    def bytes_sent(self) -> int:
        """In the last step, by a rank of a ring all-reduce; to be asked once a step."""
        numel = self._numel
        if self._power is not None:
            counted = self._power.total_numel_after_compression
            numel, self._counted = counted - self._counted or numel, counted
        return round(2 * (mpisign.size() - 1) / mpisign.size() * self._bytes_each * numel)


def _bf16(state, bucket):  # type: ignore[no-untyped-def]  # torch refuses its own, by name, without a GPU
    return default_hooks.bf16_compress_hook(state, bucket)
