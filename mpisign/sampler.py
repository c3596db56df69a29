"""Who reads which sample, where ranks come and go within an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Sampler

from mpisign.errors import CheckpointError, OptionError
from mpisign.policy import check_integer
from mpisign.session import current

__all__ = ["ElasticSampler"]

VERSION = 1


@dataclass
class _Deal:
    """Samples in an order, dealt one by one to so many places.

    Attributes:
        members: the rank in each place, by identity; None if it was another job's.
        taken: how many each place has had, of which the last ``pending`` have counted in no exchange yet.
        sent: how many of those that are pending, the first, are in the exchange that comes next, with ``delay``.
        lost: by place, how many of the last it had did not count.
    """

    ranks: int
    members: tuple[int, ...] | None = None
    taken: int = 0
    pending: int = 0
    sent: int = 0
    lost: dict[int, int] = field(default_factory=dict)

    def each(self, samples: int, *, whole: bool) -> int:
        """How many of so many samples each place gets: where they do not suffice for all, some twice, or ``whole``."""
        return samples // self.ranks if whole else -(-samples // self.ranks)

    def hand(self, order: torch.Tensor, place: int, each: int) -> torch.Tensor:
        """The first ``each`` that a place gets: (each,); after the last sample comes the first again."""
        return order[torch.arange(place, place + each * self.ranks, self.ranks, device="cpu") % max(1, len(order))]

    def left(self, order: torch.Tensor, samples: int) -> torch.Tensor:
        """What nobody has had so that it counted, in the same order; ``samples``: of the whole dataset."""
        counted = torch.zeros(samples, dtype=torch.bool, device="cpu")
        for place in range(self.ranks):
            counted[self.hand(order, place, self.taken - self.lost.get(place, 0))] = True
        return order[~counted[order]]

    def settle(self, counted: Sequence[int], *, whole: bool = True) -> None:
        """What is pending, or has been sent, has counted for those who are named, by identities, and for no others."""
        settled = self.pending if whole else self.sent
        for place, identity in enumerate(self.members or ()):
            if identity not in counted and settled:
                self.lost[place] = self.lost.get(place, 0) + settled
        self.pending, self.sent = self.pending - settled, 0


class ElasticSampler(Sampler[int]):
    """Deals a dataset to the ranks, and what is left of an epoch anew to whoever is there after a change of ranks.

    While ranks stay, it deals as ``torch.utils.data.DistributedSampler`` does: an order that follows from ``seed +
    epoch``, one sample to each rank in turn, the first ones again until all have as many (or the last ones left out).

    All ranks take the same number of samples in a step. So what they have had together is a beginning of that order,
    and a count is all that each needs to know of the others. After every step, :meth:`record_batch` counts. A sample
    has counted if its rank was in the exchange that ended its step, whether it voted or abstained. What a lost rank had
    in a step that ended without it has not; that, and all that nobody has had, is dealt to those who are there then, in
    the same order. With ``every``, samples count by the exchange that ends their window; if ranks change twice within
    one window, what those of the second change had before the first counts. A window that is open at the end of an
    epoch has no exchange in it: call :func:`mpisign.barrier` after the inner loop, or what a rank that has been lost in
    that window should have had is left out.

    The iterator ends early after a change, so begin again until the epoch is :attr:`finished`::

        sampler = mpisign.ElasticSampler(dataset)
        loader = DataLoader(dataset, batch_size=32, sampler=sampler)
        for epoch in range(sampler.epoch, 90):
            sampler.set_epoch(epoch)
            while not sampler.finished:
                for number, batch in enumerate(loader):
                    train_one_step(batch)
                    sampler.record_batch(number, 32)
                    if sampler.changed:  # a loader with workers has batches of the former ranks at hand
                        break

    Its position, the same on all ranks, belongs into a checkpoint: ``extra={"sampler": sampler.state_dict()}``. A job
    of as many ranks goes on with the same batches; of another number, with what is left, dealt to those.

    Args:
        dataset: has a length.
        shuffle: False for the dataset's own order.
        seed: of the order; the same on all ranks.
        drop_last: leave out samples that do not suffice for all ranks, instead of repeating some.

    Attributes:
        epoch: the number of this epoch.

    Raises:
        NotInitializedError: :func:`mpisign.init` has not been called.
        OptionError: an impossible option.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> None:
        session = current("ElasticSampler()")
        if not hasattr(dataset, "__len__"):
            raise OptionError(
                f"dataset={type(dataset).__name__} has no length, so it cannot be dealt: shard it by rank()"
            )
        self._samples = len(dataset)
        self._shuffle, self._drop_last = bool(shuffle), bool(drop_last)
        self._seed = check_integer("seed", seed)
        self._commits, self._parted = session.commits, session.parted
        self._before_dealing: Callable[[], object] = lambda: None
        self._begin(0, [])

    def before_dealing(self, act: Callable[[], object]) -> None:
        """Do something on all ranks, whenever iterating begins."""
        self._before_dealing = act

    def _begin(self, epoch: int, deals: list[_Deal]) -> None:
        self.epoch, self._deals = epoch, deals
        self._base: torch.Tensor | None = None  # what the last deal deals, once it has been needed
        self._exhausted = False
        self._iterated: _Deal | None = None  # and from which of each place's samples on
        self._start = 0

    def _left(self, deals: Sequence[_Deal]) -> torch.Tensor:
        """What is left of the epoch after some deals."""
        if self._shuffle:
            generator = torch.Generator("cpu").manual_seed(self._seed + self.epoch)
            order = torch.randperm(self._samples, generator=generator, device="cpu")
        else:
            order = torch.arange(self._samples, device="cpu")
        for deal in deals:
            order = deal.left(order, self._samples)
        return order

    # ------------------------------------------------------------------------------------------------- dealing

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; nothing happens if it is the present one, which may have been resumed."""
        epoch = check_integer("epoch", epoch, 0)
        if epoch != self.epoch:
            self._settle()
            self._begin(epoch, [])

    @property
    def changed(self) -> bool:
        """Whether ranks have come or gone since samples were dealt last, so that what is left has to be dealt anew.

        It turns when an exchange is over, or another call of all, which is at the same step on all ranks; one that has
        found earlier that others have died goes on with what it was dealt until then.
        """
        members = self._deals[-1].members if self._deals else None
        return members != self._there("ElasticSampler.changed")

    @property
    def finished(self) -> bool:
        """Whether nothing of the epoch is left, or this rank's iterator has come to its end while ranks stayed."""
        return len(self) == 0 or self._exhausted

    def reset(self) -> None:
        """Deal what is left to the ranks that are there now, if they have changed; iterating does it, too."""
        there = self._there("ElasticSampler.reset()")
        last = self._deals[-1] if self._deals else None
        if last is not None:
            if last.members == there:
                return
            if last.members is not None:
                last.settle(there)
            elif last.ranks == len(there):  # a job of as many ranks goes on
                last.members = there
                return
            else:  # what had gone into no exchange was given up
                last.taken, last.pending, last.sent = last.taken - last.pending, 0, 0
        self._deals.append(_Deal(len(there), there))
        self._base, self._exhausted = None, False

    @staticmethod
    def _there(caller: str) -> tuple[int, ...]:
        """Who is to train of those who are there: not spares, which may not have left the others yet."""
        session = current(caller)
        return session.there if session.membership is None else session.membership.spares.to_train(session.there)

    def _mine(self) -> torch.Tensor:
        """All that this rank gets of the last deal; on a spare that has not left yet, what the first place gets."""
        deal = self._deals[-1]
        if self._base is None:
            self._base = self._left(self._deals[:-1])
        members, me = deal.members or (), current("ElasticSampler").group.identity
        place = members.index(me) if me in members else 0
        return deal.hand(self._base, place, deal.each(len(self._base), whole=self._drop_last))

    def __len__(self) -> int:
        """How many samples this rank will get in this epoch yet, if ranks stay."""
        self.reset()
        return max(0, len(self._mine()) - self._deals[-1].taken)

    def __iter__(self) -> Iterator[int]:
        """This rank's samples from where it has recorded to, until the epoch ends or ranks change.

        Raises:
            OptionError: the epoch is over.
        """
        self._settle()
        self.reset()
        self._before_dealing()
        if len(self) == 0 and self._exhausted:
            raise OptionError(f"epoch {self.epoch} is over: begin the next by sampler.set_epoch({self.epoch + 1})")
        deal = self._iterated = self._deals[-1]
        self._start = deal.taken
        return self._until_a_change(self._mine()[deal.taken :].tolist(), deal)

    def _until_a_change(self, mine: Sequence[int], deal: _Deal) -> Iterator[int]:
        for index in mine:
            if self.changed or deal is not self._deals[-1]:
                return
            yield index
        self._exhausted = not self.changed and deal is self._deals[-1]

    # ------------------------------------------------------------------------------------------------ recording

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """This rank has made a step with a batch. Call it after the step, on every rank.

        Args:
            batch_idx: the batch's number since iterating began, from 0.
            batch_size: of all batches of it but the last, which may be smaller; the same on all ranks.

        Raises:
            OptionError: nothing has been dealt, or not to this iterator's ranks.
        """
        batch_idx, batch_size = check_integer("batch_idx", batch_idx, 0), check_integer("batch_size", batch_size, 1)
        self._return_to_iterated()
        self._advance(self._start + (batch_idx + 1) * batch_size)

    def record_indices(self, indices: Sequence[int]) -> None:
        """The same for samples by their indices, which must be the next ones that this rank was given.

        Raises:
            OptionError: they are not.
        """
        self._return_to_iterated()
        given, taken = [int(index) for index in indices], self._deals[-1].taken
        expected = self._mine()[taken : taken + len(given)].tolist()
        if given != expected:
            raise OptionError(
                f"samples {given[:4]}... are not the next {len(given)} that this rank was given, {expected[:4]}...: "
                f"record each batch once, in order, after its step"
            )
        self._advance(taken + len(given))

    def _return_to_iterated(self) -> None:
        """Back to the deal that is iterated over, where :meth:`reset` was called within its step."""
        if self._iterated is None:
            raise OptionError("nothing has been dealt yet, and nothing can be recorded: iterate over the sampler first")
        while self._deals[-1] is not self._iterated:
            self._deals.pop()
            self._base = None

    def _advance(self, to: int) -> None:
        deal = self._deals[-1]
        more = min(to, len(self._mine())) - deal.taken
        if more > 0:
            deal.taken += more
            deal.pending += more
        self._settle()

    def _settle(self) -> None:
        """What is pending has counted, unless this is within a window of local steps, or of accumulation."""
        session = current("ElasticSampler")
        deal = self._deals[-1] if self._deals else None
        if session.parted != self._parted:
            self._parted = session.parted
            if deal is not None:
                deal.sent = deal.pending
        if session.has_optimizers and session.commits == self._commits:
            return
        self._commits = session.commits
        if deal is not None:
            voted = session.counted if session.has_optimizers else ()
            deal.settle(voted or session.there, whole=session.whole)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is: a few numbers, the same on all ranks. After a change what is left is dealt anew first."""
        if self._deals and self._deals[-1].members is not None:
            self.reset()
        return self.position()

    def step_in(self) -> None:
        """This rank has the position of others, who deal anew now that it is one of them, and does as they do."""
        session, there = current("ElasticSampler"), self._there("ElasticSampler")
        self._commits, self._parted = session.commits, session.parted
        if self._deals:
            self._deals.append(_Deal(len(there), there))

    def position(self) -> dict[str, Any]:
        """As :meth:`state_dict`, with nothing dealt anew."""
        deals = [[deal.ranks, deal.taken, deal.pending, sorted(map(list, deal.lost.items()))] for deal in self._deals]
        return {**self._facts(), "epoch": self.epoch, "deals": deals, "sent": self._deals[-1].sent if deals else 0}

    def _facts(self) -> dict[str, Any]:
        return {"version": VERSION, "samples": self._samples, "shuffle": self._shuffle, "seed": self._seed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, on any number of ranks.

        Raises:
            CheckpointError: it is of another dataset, order or version, or damaged. Nothing has been changed then.
        """
        for name, here in self._facts().items():
            if not isinstance(state_dict, Mapping) or state_dict.get(name) != here:
                saved = state_dict.get(name) if isinstance(state_dict, Mapping) else state_dict
                raise CheckpointError(
                    f"the sampler's position was saved with {name}={saved!r:.80}, and here it is {here!r}: give "
                    f"ElasticSampler the same dataset, shuffle= and seed=, or begin the epoch anew"
                )
        self._begin(*_read(state_dict, self._samples))


def _read(state: Mapping[str, Any], samples: int) -> tuple[int, list[_Deal]]:
    """Epoch and deals of a state. Raises CheckpointError."""
    try:
        deals = [
            _Deal(ranks, None, taken, pending, lost={place: count for place, count in lost})
            for ranks, taken, pending, lost in state["deals"]
        ]
        for last in deals[-1:]:  # older states do not say what had been sent
            last.sent = state.get("sent", last.pending)
        numbers = [
            state["epoch"],
            *(n for d in deals for n in (d.ranks, d.taken, d.pending, d.sent, *d.lost, *d.lost.values())),
        ]
        fit = all(type(number) is int and number >= 0 for number in numbers) and all(
            deal.ranks > 0
            and deal.sent <= deal.pending <= deal.taken <= -(-samples // deal.ranks)
            and all(place < deal.ranks and count <= deal.taken - deal.pending for place, count in deal.lost.items())
            for deal in deals
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the sampler's position is damaged: {type(error).__name__}: {error}") from error
    if not fit:
        raise CheckpointError(f"the sampler's position is damaged: {state['deals']!r:.200} cannot be")
    return state["epoch"], deals
