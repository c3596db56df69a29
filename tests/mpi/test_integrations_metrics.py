"""torchmetrics over all ranks, against the same metric of all data in one process."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

import mpisign

from .frameworks import framework

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few, pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def predictions(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """None on rank 0, where there is another; the more, the higher the rank."""
    random = torch.Generator().manual_seed(rank)
    count = 20 * rank if rank or mpisign.size() == 1 else 0
    count = count or (7 if mpisign.size() == 1 else 0)
    return torch.rand(count, generator=random), torch.randint(0, 2, (count,), generator=random)


def test_metrics_are_of_all_ranks_data(comm: MPI.Comm) -> None:
    """With sums, with lists of tensors of any length, and with a rank that has no data."""
    metrics: Any = framework("torchmetrics")
    from mpisign.integrations.metrics import sync_metrics

    def collection() -> Any:
        return metrics.MetricCollection(
            {
                "accuracy": metrics.classification.BinaryAccuracy(),
                "auroc": metrics.classification.BinaryAUROC(),  # keeps all predictions
                "mean": metrics.MeanMetric(),
            },
            compute_groups=False,
        )

    mine, oracle = sync_metrics(collection()), collection()
    for rank in range(comm.size):
        scores, labels = predictions(rank)
        if len(scores):
            for metric in [oracle, *([mine] if rank == comm.rank else [])]:
                metric["accuracy"].update(scores, labels)
                metric["auroc"].update(scores, labels)
                metric["mean"].update(scores)
    for _ in range(2):  # it goes on from its own data, not from all ranks'
        computed = mine.compute()
        expected = oracle.compute()
        assert computed.keys() == expected.keys()
        for name, value in computed.items():
            torch.testing.assert_close(value, expected[name], msg=name)
        for metric in mine.values():
            metric._computed = None
    assert len(set(comm.allgather(computed["auroc"].item()))) == 1


def test_all_in_a_model_are_found(comm: MPI.Comm) -> None:
    metrics: Any = framework("torchmetrics")
    from mpisign.integrations.metrics import sync_metrics

    net = torch.nn.ModuleDict({"a": metrics.MeanMetric(), "b": torch.nn.Sequential(metrics.MaxMetric())})
    assert sync_metrics(net) is net
    net["a"].update(float(comm.rank))
    net["b"][0].update(float(comm.rank))
    assert net["a"].compute() == (comm.size - 1) / 2
    assert net["b"][0].compute() == comm.size - 1


def test_lists_of_different_lengths(comm: MPI.Comm) -> None:
    """Of states that are lists and are not concatenated each rank has one item an update, and some have none."""
    metrics: Any = framework("torchmetrics")
    from mpisign.integrations.metrics import sync_metrics

    mine = copy.deepcopy(sync_metrics(sync_metrics(metrics.retrieval.RetrievalMAP())))
    oracle = metrics.retrieval.RetrievalMAP()
    for rank in range(comm.size):
        for update in range(2 * rank if comm.size > 1 else 2):
            scores, labels = predictions(5 * rank + update + 1)
            queries = torch.arange(len(scores)) % 4 + 4 * rank
            for metric in [oracle, *([mine] if rank == comm.rank else [])]:
                metric.update(scores, labels, indexes=queries)
    for _ in range(2):
        torch.testing.assert_close(mine.compute(), oracle.compute())
        mine._computed = None
    assert len(mine.indexes) == (2 * comm.rank if comm.size > 1 else 2), "it has its own again"
    assert set(mine._reductions) == set(oracle._reductions)


def test_lists_of_no_tensors_are_an_error(comm: MPI.Comm) -> None:
    metrics: Any = framework("torchmetrics")
    from mpisign.integrations.metrics import sync_metrics

    class Names(metrics.Metric):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.add_state("names", [], None)

        def update(self) -> None:
            self.names.append("a")

        def compute(self) -> int:
            return len(self.names)

    its = sync_metrics(Names())
    if comm.rank == comm.size - 1:
        its.update()
    if comm.size > 1:
        with pytest.raises(mpisign.OptionError, match="Names keeps a list 'names' of something else than tensors"):
            its.compute()
