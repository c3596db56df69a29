"""A training of seconds, by the project's own loop. In its first start a job may be slowed down, to be met at work."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from flags import add_flags, parse, said_once
from training import Batches, distribute, train

import mpisign


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")  # with one call, so that the ranks' lines do not mix
    sys.stdout.flush()


def main() -> None:
    mpisign.init()
    parser = argparse.ArgumentParser()
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each step of a job's first start")
    add_flags(parser, epochs=2, batch_size=4)
    with said_once():
        args = parse(parser)
    first_start = "SLURM_RESTART_COUNT" not in os.environ
    say(f"rank {mpisign.rank()} of {mpisign.size()} on {os.environ['SLURMD_NODENAME']}")

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(320, 20), torch.randint(3, (320,)))
    model = nn.Sequential(nn.Linear(20, 50), nn.Dropout(0.2), nn.Linear(50, 3))
    optimizer = distribute(args, model, torch.optim.SGD(model.parameters(), lr=0.01), mpisign.signum(), seed=0)
    torch.manual_seed(mpisign.rank())  # of dropout; the others' states are compared, too
    np.random.seed(mpisign.rank())  # noqa: NPY002
    random.seed(mpisign.rank())
    began = False

    def loss_of(batch: Sequence[torch.Tensor]) -> torch.Tensor:
        nonlocal began
        if not began and mpisign.rank() == 0:
            say(f"trains at {time.time():.3f}")
        began = True
        time.sleep(args.pause if first_start else 0)
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels)

    train(args, model, optimizer, Batches(data, args.batch_size, seed=0), loss_of, lambda epoch: 0.9**epoch, history={})


if __name__ == "__main__":
    main()
