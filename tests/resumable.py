"""A training run in which everything that a checkpoint must bring back matters, and what exact resume means.

``test_resume.py`` and ``mpi/test_resume.py`` hold it for every method; tests of checkpoints train it, too.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DistributedSampler

import mpisign
from mpisign import Method

BATCH, SAMPLES = 4, 40  # 10 steps an epoch of one rank, 5 of two, 3 of three, 2 of more
SAVED, UNTIL = 2, 6  # steps. Methods have phases that begin before, with and after the first of them


class Scale(nn.Module):
    """An fp64 number, and nothing at all in fp16: parameters of other types and no dimension or no element."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.nothing = nn.Parameter(torch.ones(0, dtype=torch.float16))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor + self.nothing.sum()


class Job:
    """Dropout and noise from three generators, BatchNorm, a scheduler, a shuffled share of the data for each rank.

    Half of its gradients are zeros, so that coins matter, and every step has a rate of its own, which what a memory
    owes must follow.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        plain: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        rank, size = mpisign.rank(), mpisign.size()
        torch.manual_seed(seed)
        layers = nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.Linear(24, 3)
        self.model = nn.Sequential(*layers).to(dtype).append(Scale())
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.5 if plain else 0.0, weight_decay=0.01)
        self.optimizer = (
            sgd
            if plain
            else mpisign.DistributedSignOptimizer(sgd, self.model.named_parameters(), method=method, **options)
        )
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.inputs, self.labels = torch.randn(SAMPLES, 12, dtype=dtype), torch.randint(3, (SAMPLES,))
        self.sampler = DistributedSampler(range(SAMPLES), num_replicas=size, rank=rank, seed=seed)
        self.step = self.epoch = self.batch = 0
        self.seen: list[list[int]] = []
        torch.manual_seed(100 + rank)
        np.random.seed(200 + rank)  # noqa: NPY002
        random.seed(300 + rank)

    def train(self, until: int) -> Job:
        """Go on until so many steps have been made."""
        while self.step < until:
            self.sampler.set_epoch(self.epoch)
            if isinstance(self.optimizer, mpisign.DistributedSignOptimizer):
                self.optimizer.set_epoch(self.epoch)
            order = list(self.sampler)
            chosen = order[self.batch * BATCH : (self.batch + 1) * BATCH]
            self.batch += 1
            if (self.batch + 1) * BATCH > len(order):
                self.epoch, self.batch = self.epoch + 1, 0
            self.seen.append(chosen)
            noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1)  # noqa: NPY002
            loss = nn.functional.cross_entropy(self.model(self.inputs[chosen] + noise), self.labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            for parameter in self.model.parameters():
                parameter.grad.clamp_(min=0)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
        return self

    def save(self, path: Path, **options: Any) -> Path:
        extra = {"epoch": self.epoch, "batch": self.batch}
        return mpisign.checkpoint.save(path, **self._parts(), **{"step": self.step, "extra": extra, **options})

    def load(self, path: Path) -> mpisign.checkpoint.Resumed:
        resumed = mpisign.checkpoint.load(path, **self._parts())
        self.step, self.epoch, self.batch = resumed.step, resumed.extra["epoch"], resumed.extra["batch"]
        return resumed

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def everything(self) -> dict[str, Any]:
        """All that the next step depends on, copied."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        at = {"step": self.step, "epoch": self.epoch, "batch": self.batch}
        generators = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}  # noqa: NPY002
        return copy.deepcopy(parts | at | generators | {"torch": torch.get_rng_state()})


def assert_equal(a: Any, b: Any, where: str = "everything") -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    else:
        assert a == b, where


def at_once(job: Job, path: Path) -> Path:
    return job.save(path)


def in_the_background(job: Job, path: Path) -> Path:
    return job.save(path, asynchronous=True)


def assert_resuming_is_exact(
    folder: Path, build: Callable[[], Job], save: Callable[[Job, Path], Path] = at_once, until: int = UNTIL
) -> None:
    """A job that is saved and goes on is, bit for bit, another that loads and goes on. Collective.

    Args:
        until: the last step.
    """
    straight = build().train(SAVED)
    saved = save(straight, folder)
    straight.train(until)  # overwrites all that is being written in the background
    expected = straight.everything()
    spoil_generators()

    resumed = build()
    found = resumed.load(folder)
    assert (found.step, found.path, found.ranks) == (SAVED, saved, mpisign.size())
    resumed.train(until)
    assert resumed.seen == straight.seen[SAVED:]
    assert_equal(resumed.everything(), expected)
    mpisign.check_consistency(resumed.model, resumed.optimizer, buffers=False)


def assert_states_are_enough(file: Path, build: Callable[[], Job]) -> None:
    """The same by ``torch.save`` of state dicts, as training scripts without :mod:`mpisign.checkpoint` do it."""
    straight = build().train(SAVED)
    torch.save({name: part.state_dict() for name, part in straight._parts().items()}, file)
    at = straight.everything()
    straight.train(UNTIL)

    resumed = build()
    saved = torch.load(file, weights_only=True)
    for name, part in resumed._parts().items():
        part.load_state_dict(saved[name])
    resumed.step, resumed.epoch, resumed.batch = at["step"], at["epoch"], at["batch"]
    random.setstate(at["python"])
    np.random.set_state(at["numpy"])  # noqa: NPY002
    torch.set_rng_state(at["torch"])
    resumed.train(UNTIL)
    assert_equal(resumed.everything(), straight.everything())
    mpisign.check_consistency(resumed.model, resumed.optimizer, buffers=False)


def digest(tree: Any) -> str:
    """The same for what :func:`assert_equal` takes for equal, in another process too."""
    if isinstance(tree, dict):
        told = "".join(f"{key}: {digest(tree[key])}" for key in sorted(tree, key=str)).encode()
    elif isinstance(tree, torch.Tensor):
        told = tree.numpy().tobytes()
    else:
        told = tree.tobytes() if isinstance(tree, np.ndarray) else repr(tree).encode()
    return hashlib.blake2b(told, digest_size=8).hexdigest()


def spoil_generators() -> None:
    """Draw some, so that whatever is not put back shows."""
    torch.randn(7), random.random(), np.random.normal()  # noqa: NPY002
