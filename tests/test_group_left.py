"""Processes that have parted end on their own: the job is a success, however long the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpirun import mpirun

SUPPORT = Path(__file__).parent / "mpi"

PARTING = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch, torch._dynamo, mpisign
from mpi4py import MPI  # whose start may take its time
from regroup import part

mpisign.init(stall_timeout=12.0)
rank = mpisign.rank()
parameter = torch.nn.Parameter(torch.zeros(5))
optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=1.0), method=mpisign.signsgd())

def train(seconds):
    end = time.monotonic() + seconds
    while mpisign.broadcast_object(time.monotonic() < end):
        parameter.grad = torch.ones(5)
        optimizer.step()
        time.sleep(0.05)
    print("rank", rank, "has made its steps", flush=True)

parameter.grad = torch.ones(5)
optimizer.step()
stays = part([int(sys.argv[2])])
if stays == (sys.argv[3] == "who leaves goes first"):
    train(10.0)
print("rank", rank, "ends", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("order", ["who leaves goes first", "who stays goes first"])
def test_nobody_waits_for_who_has_left_and_nobody_is_ended_with_it(tmp_path: Path, order: str) -> None:
    """Some sit in MPI_Finalize for longer than ``stall_timeout``, while others have work to do."""
    script = tmp_path / "parting.py"
    script.write_text(PARTING)
    result = mpirun(3, script, SUPPORT, 0, order, timeout=100.0)
    assert result.returncode == 0, result.text
    assert result.text.count("has made its steps") == (2 if order == "who leaves goes first" else 1)
    assert result.text.count(" ends") == 3
    assert "has waited" not in result.text
