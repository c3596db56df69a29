"""What leaves a host's network card in a step, by the card's own counters: network namespaces with several ranks each.

A frame has a head of 66 bytes: Ethernet's, IP's and TCP's with a time. They are taken off, so acknowledgements are 0.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from namespaces import needs_namespaces, slow_network

pytestmark = [pytest.mark.long, needs_namespaces]

STEPS = """
import json, sys
from pathlib import Path
import torch
import mpisign
from mpi4py import MPI

HEAD, SENT, FRAMES = 66, 8, 9
exchange, node_of = sys.argv[1], json.loads(sys.argv[2])
comm = MPI.COMM_WORLD
mpisign.init(node_of=node_of)

def payload():
    (line,) = [its for its in Path("/proc/self/net/dev").read_text().splitlines() if its.strip().startswith("eth0:")]
    numbers = [int(number) for number in line.partition(":")[2].split()]
    return numbers[SENT] - HEAD * numbers[FRAMES]

elements = 1 << 22
model = [torch.nn.Parameter(torch.zeros(elements // 4)) for _ in range(4)]
sgd = torch.optim.SGD(model, lr=1.0)
optimizer = mpisign.DistributedSignOptimizer(sgd, method=mpisign.signsgd(), exchange=exchange)
own = torch.Generator().manual_seed(comm.rank)
for parameter in model:
    parameter.grad = torch.randn(parameter.shape, generator=own)
optimizer.step()
comm.Barrier()
counts = []
for _ in range(3):
    counts.append(payload())
    comm.Barrier()
    for parameter in model:
        parameter.grad = torch.randn(parameter.shape, generator=own)
    optimizer.step()
    comm.Barrier()
counts.append(payload())
sent = comm.allgather(min(after - before for before, after in zip(counts, counts[1:])))  # what is sent again is more
weights = torch.cat([parameter.detach() for parameter in model])
assert len(set(comm.allgather(weights.numpy().tobytes()))) == 1
if comm.rank == 0:
    said = {"elements": elements, "sent": sent, "took": sorted(set(optimizer.report.exchange))}
    print("counted " + json.dumps(said | {"header": optimizer.report.header_bytes}), flush=True)
"""


def counted(tmp_path: Path, shape: str, exchange: str, node_of: list[int] | None = None) -> dict[str, object]:
    (script := tmp_path / "steps.py").write_text(STEPS)
    job = slow_network(shape, "none", sys.executable, str(script), exchange, json.dumps(node_of))
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 0, output
    (line,) = [its for its in output.splitlines() if its.startswith("counted ")]
    found: dict[str, object] = json.loads(line.partition(" ")[2])
    return found


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 4), (2, 2), (3, 1)])
def test_hierarchical_sends_what_the_formula_says(tmp_path: Path, nodes: int, ranks: int) -> None:
    """``(N - 1)/N (ceil(log2(G + 1)) + 1) d/8`` bytes: a quarter of a byte a parameter from 2 x 4."""
    found = counted(tmp_path, f"{nodes}x{ranks}", "hierarchical")
    assert found["took"] == ["hierarchical"]
    elements, sent, header = found["elements"], found["sent"], found["header"]
    assert isinstance(elements, int)
    assert isinstance(header, int)
    assert isinstance(sent, list)
    formula = (nodes - 1) / nodes * (math.ceil(math.log2(ranks + 1)) + 1) * elements / 8
    for card in sent:
        assert formula <= card + 1 <= 1.02 * (formula + ranks * header), (card, formula, header)


def test_uneven_hosts_decide_together(tmp_path: Path) -> None:
    """One lane leads from 3 to 1 ranks: each card sends a tally of half, and half of the decision."""
    found = counted(tmp_path, "3+1", "hierarchical")
    assert found["took"] == ["hierarchical"]
    elements, sent = found["elements"], found["sent"]
    assert isinstance(elements, int)
    assert isinstance(sent, list)
    assert all(card == pytest.approx((2 + 1) / 2 * elements / 8, rel=0.02) for card in sent)


def test_a_map_that_lies_about_who_shares_memory(tmp_path: Path) -> None:
    """Two hosts are said to be one node: nobody sees the other's /dev/shm, and messages take two phases."""
    assert counted(tmp_path, "2x2", "hierarchical", [0, 0, 0, 0])["took"] == ["two_phase"]
