"""Who trains the transformer of train_text.py: methods, their optimizers, and how often they exchange."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import mpisign

__all__ = ["CONTENDERS", "DEFAULT", "Contender", "make_contenders"]

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
}
"""AdamW on each rank's own gradients: how many steps a window has, and how their differences are exchanged."""

CONTENDERS = (*DEFAULT, *LOCAL)


@dataclass(frozen=True)
class Contender:
    """A method and the optimizer around it.

    Attributes:
        label: for tables and plots.
        optimizer: makes the one that is wrapped, of parameters.
        every: steps of a window, if the optimizer steps on each rank's own gradients between exchanges.
    """

    label: str
    method: mpisign.Method
    optimizer: Callable[[Any], torch.optim.Optimizer]
    every: int | None = None


def make_contenders(args: argparse.Namespace) -> dict[str, Contender]:
    """By the names that ``--only`` takes. Weights decay alike in all: by the same share in the course of training."""

    def decayed(lr: float) -> dict[str, Any]:
        return {"lr": lr, "weight_decay": args.decay / lr}

    def adamw(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.AdamW(parameters, **decayed(lr), betas=(0.9, 0.98))

    dgc = mpisign.dgc(args.dgc_ratio, clip=args.dgc_clip)
    return {
        "vote": Contender(
            f"{args.method.name}, {args.method.rule.name}",
            args.method,
            lambda parameters: torch.optim.SGD(parameters, **decayed(args.lr)),
        ),
        "adamw": Contender("AdamW, mean in fp32", mpisign.mean(), adamw(args.lr_adamw)),
        "dgc": Contender(
            f"DGC, {100 * args.dgc_ratio:g} %",
            dgc,
            lambda parameters: torch.optim.SGD(parameters, **decayed(args.lr_dgc)),
        ),
        **{
            name: Contender(f"AdamW, every {every}: {how}", method(), adamw(args.lr_local), every)
            for name, (every, how, method) in LOCAL.items()
        },
    }
