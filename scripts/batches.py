"""This rank's batches of a training set: the same ones wherever in an epoch one begins, loaded by safe processes."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch
from flags import end
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import mpisign


class Batches:
    """This rank's batches of a training set, by epoch.

    An epoch is a permutation of the samples, which seed and epoch decide, dealt to the ranks; the first are dealt again
    until all ranks have as many. It can begin at any batch, without loading those before it: what comes, and how it is
    cropped, is the same as if it had begun at its beginning.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, workers: int = 0, drop_last: bool = False) -> None:
        self.batch_size = batch_size
        self._deal = Deal(dataset, mpisign.size(), mpisign.rank(), seed=seed)
        self._loader = make_loader(Seeded(dataset, seed), batch_size, self._deal, workers, drop_last)
        if len(self) == 0:
            end(
                f"{len(dataset)} training samples do not fill a batch of {batch_size} on each of {mpisign.size()} "
                f"ranks: take a smaller --batch-size"
            )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from batch ``start`` on."""
        self._deal.set_epoch(number)
        self._deal.start = start * self.batch_size
        return batches_of(self._loader)


class Deal(DistributedSampler):
    """This rank's samples of an epoch, from its sample ``start`` on; each as (epoch, index)."""

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in itertools.islice(super().__iter__(), self.start, None))


class Seeded(Dataset):
    """A dataset whose random choices for a sample (torch's: crops, flips) follow from seed, epoch and index alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, *key)))
            return self.dataset[key[1]]


def make_loader(dataset: Any, batch_size: int, sampler: Iterable, workers: int, drop_last: bool = False) -> DataLoader:
    """A DataLoader for a rank of an MPI job; iterate it by :func:`batches_of`."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,  # a fork amid MPI or CUDA may hang
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=end_with_rank,
        generator=torch.Generator(),  # an epoch draws a number from it, which must not be the model's next one
    )


def end_with_rank(worker: int) -> None:
    """End this DataLoader worker when its rank is killed; torch would watch the forkserver, which waits for workers."""
    rank = multiprocessing.parent_process()
    assert rank is not None

    def watch() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """``iter(loader)``, with workers that are deaf to the signals that ask the job to stop: they would just die."""
    if loader.num_workers == 0:
        return iter(loader)
    asking = {signal.SIGUSR1, signal.SIGTERM}
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        resource_tracker.ensure_running()  # Python would start it with the first worker, and unblock SIGTERM then
        signal.pthread_sigmask(signal.SIG_BLOCK, asking)
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    atexit.unregister(batches._shutdown_workers)  # type: ignore[attr-defined]  # an epoch before may have left it
    atexit.register(batches._shutdown_workers)  # type: ignore[attr-defined]  # by SIGTERM, Python's way, they never end
    return batches
