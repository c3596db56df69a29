"""What the ranks of test_heartbeat.py run: they train, and one computes for long, and one stops or is cut off.

Usage: silent.py SECONDS FOLDER: detect_links, and where ranks leave their process numbers.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import torch

import mpisign

WITHOUT_MPI = 2.0  # times SECONDS

logging.basicConfig(level=logging.INFO)
seconds, folder = float(sys.argv[1]), Path(sys.argv[2])
mpisign.init(on_failure="continue", detect_links=seconds, stall_timeout=120.0)
me, size = mpisign.rank(), mpisign.size()
model = torch.nn.Linear(20, 20)
mpisign.broadcast_parameters(model.state_dict())
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model.named_parameters())
changes: list[mpisign.MembershipChange] = []
mpisign.on_membership_change(changes.append)


def step() -> None:
    optimizer.zero_grad()
    model(torch.ones(8, 20) * (1 + me)).sum().backward()
    optimizer.step()


def say(text: str) -> None:
    sys.stdout.write(f"\nrank {me}: {text}\n")
    sys.stdout.flush()


for _ in range(3):
    step()
if me == 0:  # evaluates, and calls nothing of MPI's
    end = time.monotonic() + WITHOUT_MPI * seconds
    weights = torch.randn(100, 100)
    while time.monotonic() < end:
        weights = torch.nn.functional.normalize(weights @ weights)
step()
assert not changes, changes
say("all have waited")
writing = folder / f"{me}.writing"
writing.write_text(str(os.getpid()))
writing.rename(folder / f"{me}.pid")  # whole from when it is there
while mpisign.size() == size:
    step()
    time.sleep(0.01)
for _ in range(3):
    step()
report = optimizer.report
raw = [p.detach().numpy().tobytes() for p in model.parameters()]
assert all(its == raw for its in mpisign.allgather_object(raw)), "replicas are the same"
say(f"goes on after {[list(its.lost) for its in changes]} with {report.members}")
