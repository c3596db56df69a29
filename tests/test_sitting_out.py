"""mpisign.sitting_out: ranks that have joined while others train on, and what is left when those die."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mpi4py import MPI
from mpirun import ULFM, started

SCRIPT = """\
import os, signal, torch, mpisign
mpisign.init(on_failure="continue", stall_timeout=60.0)
identity = mpisign.rank()
layer = torch.nn.Linear(3, 2)
mpisign.broadcast_parameters(layer.state_dict())
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0))


def train(batches, dies):
    for batch in range(batches):
        if batch == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        layer(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    had = layer.weight.detach().clone()
    last = optimizer.join()
    assert mpisign.rank() != last or torch.equal(layer.weight, had)
    mpisign.check_consistency(layer, optimizer)
    print(f"rank {identity} goes on from rank {last} after step {optimizer.report.step}", flush=True)


train([5, 3, 7][identity], None)
train([3, 5, 20][identity], 11 if identity == 2 else None)
"""


@pytest.mark.long
@pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="no ULFM")
def test_what_the_last_rank_has_done_alone_dies_with_it(tmp_path: Path) -> None:
    """Which is said; and not where others get it in the end."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with started(3, script, options=ULFM) as job:
        result = job.wait(100.0)
        assert job.orphans() == []
    said = sorted(re.findall(r"rank \d goes on from rank \d after step \d+", result.text))
    first = [f"rank {rank} goes on from rank 2 after step 6" for rank in range(3)]
    assert said == sorted(first + [f"rank {rank} goes on from rank 1 after step 17" for rank in range(2)]), result.text
    assert re.findall(r"the last (\d+) exchanges are gone", result.text) == ["6"], result.text
