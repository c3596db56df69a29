"""mpisign.ElasticSampler: every sample counts once, whoever comes and goes, by a bookkeeping that knows nothing of it.

Here all ranks are in one process, which takes their parts in turn; tests/mpi/test_sampler.py has real ones.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from sampling import Ranks, same_position, samplers
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import mpisign
from mpisign import CheckpointError, ElasticSampler, NotInitializedError, OptionError

# ------------------------------------------------------------------------------------------ while ranks stay


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 2, 7, 24, 25])
def test_it_deals_as_torch_does(samples: int, shuffle: bool, drop_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 3, 5):
        ranks = Ranks(monkeypatch, count)
        ours = samplers(ranks, samples, shuffle=shuffle, seed=3, drop_last=drop_last)
        for rank in ranks.each():
            torchs = DistributedSampler(range(samples), count, rank, shuffle=shuffle, seed=3, drop_last=drop_last)
            for epoch in (0, 4):
                torchs.set_epoch(epoch)
                expected = [] if samples < count and (drop_last or not samples) else list(torchs)
                ours[rank].set_epoch(epoch)
                assert len(ours[rank]) == len(expected)
                assert list(ours[rank]) == expected
                assert ours[rank].finished


# ------------------------------------------------------------------------------------ while they come and go


@dataclass
class Training:
    """Epochs of lockstep steps on ranks that get lost, and the bookkeeping of what counted."""

    ranks: Ranks
    ours: dict[int, ElasticSampler]
    batch: int
    dice: random.Random
    ahead: int = 0  # batches that a loader has at hand
    spares: int = 0
    every: int = 1  # steps an exchange
    samples: int = 0
    counted: Counter[int] = field(default_factory=Counter)
    pads: int = 0  # how many repetitions there may be

    def epoch(self, losses: float) -> None:
        window: list[dict[int, list[int]]] = []  # the batches of steps since the last exchange
        changes = 0  # in it
        for _ in range(1000):
            if all([self.ours[who].finished for who in self.ranks.each()]):
                break
            loaders = {who: iter(BatchSampler(self.ours[who], self.batch, False)) for who in self.ranks.each()}
            at_hand: dict[int, list[list[int]]] = {who: [] for who in self.ranks.identities}
            number = 0
            while self._fetch(loaders, at_hand):
                batches = {who: at_hand[who].pop(0) for who in self.ranks.identities}
                assert len({len(its) for its in batches.values()}) == 1, "ranks are in lockstep"
                window.append(batches)
                before, counted = self.ranks.identities, self._lose(0.0 if changes else losses)
                changes = 0 if len(window) == 1 else changes
                if before != self.ranks.identities:
                    changes += 1
                if len(window) == self.every:
                    self._end_window(window, counted)
                for who in self.ranks.each():
                    if self.dice.random() < 0.5:
                        self.ours[who].record_indices(batches[who])
                    else:
                        self.ours[who].record_batch(number, self.batch)
                number += 1
                changed = {self.ours[who].changed for who in self.ranks.each()}
                assert len(changed) == 1, "all see it at the same step"
                if changed == {True} and self.dice.random() < 0.7:
                    break  # else it goes on with what is at hand
            self.pads += max(len(self.ranks.identities), len(loaders)) - 1
            if self.spares and self.dice.random() < 0.5:
                self.spares -= 1
                self._join()
        else:
            raise AssertionError("the epoch does not end")
        self._end_window(window, self.ranks.identities)

    def _end_window(self, window: list[dict[int, list[int]]], counted: Sequence[int]) -> None:
        for its in window:
            for who in set(counted) & set(its):
                self.counted.update(its[who])
        window.clear()
        self.ranks.commit(counted)

    def _fetch(self, loaders: dict[int, Iterator[list[int]]], at_hand: dict[int, list[list[int]]]) -> bool:
        for who in self.ranks.each():
            while len(at_hand[who]) <= self.ahead and (batch := next(loaders[who], None)):
                at_hand[who].append(batch)
        return all(at_hand[who] for who in self.ranks.identities)

    def _lose(self, losses: float) -> tuple[int, ...]:
        """Maybe a rank gets lost in this step; who counted in it, which may be all that began it."""
        before = self.ranks.identities
        if len(before) > 1 and self.dice.random() < losses:
            lost = self.dice.sample(before, self.dice.choice([1, 1, len(before) - 1]))
            # Within a window it is found by a call of all; in an exchange ranks may be at different steps.
            self.ranks.change([who for who in before if who not in lost], died=self.every == 1)
            if self.dice.random() < 0.3:  # a reset by a callback, within the step
                for who in self.ranks.each():
                    self.ours[who].reset()
            if self.every == 1 and self.dice.random() < 0.5:
                return before  # it got lost when all had been decided
        return self.ranks.identities

    def _join(self) -> None:
        """A rank more, which is told the position."""
        state, new = None, len(self.ours)
        self.ranks.change([*self.ranks.identities, new])
        for who in self.ranks.each():
            state = self.ours[who].state_dict() if who in self.ours else state
            if who == new:
                self.ours[who] = ElasticSampler(range(self.samples), seed=1)
                assert state is not None
                self.ours[who].load_state_dict(state)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("every", [1, 3])
def test_every_sample_counts_once(seed: int, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    for count in (1, 2, 3, 5, 8):
        samples, ranks = dice.choice([1, 7, 64, 101, 250]), Ranks(monkeypatch, count)
        ours = samplers(ranks, samples, seed=1)
        training = Training(ranks, ours, dice.choice([1, 2, 5]), dice, samples=samples, every=every)
        if every == 1:
            training.ahead, training.spares = dice.choice([0, 0, 1, 3]), dice.choice([0, 2])
        for epoch in range(2):
            training.counted.clear()
            training.pads = 0
            for who in ranks.each():
                ours[who].set_epoch(epoch)
            training.epoch(losses=0.3 / count)
            same_position(ranks, ours)
            for who in ranks.each():
                assert len(ours[who]) == 0
            assert set(training.counted) == set(range(samples)), "none was skipped"
            assert training.counted.total() - samples <= training.pads, "none was repeated, but to fill up"


def test_without_an_optimizer_of_ours_those_count_who_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 3, vote=False)
    ours = samplers(ranks, 9, shuffle=False)
    assert [list(itertools.islice(ours[who], 2)) for who in ranks.each()] == [[0, 3], [1, 4], [2, 5]]
    for who in ranks.each():
        ours[who].record_batch(0, 1)
    ranks.change([0, 2])
    for who in ranks.each():
        ours[who].record_batch(1, 1)
        assert ours[who].changed
    assert [list(ours[who]) for who in ranks.each()] == [[4, 7], [6, 8]]
    assert not any(ours[who].changed for who in ranks.each())


def test_a_loader_that_drops_its_last_batch_ends_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    ours, rounds = samplers(ranks, 10), 0
    for who in ranks.each():
        loader = DataLoader(range(10), batch_size=2, sampler=ours[who], drop_last=True)  # type: ignore[arg-type]
        while not ours[who].finished:
            rounds += 1
            assert len(loader) == 2
            for number, _ in enumerate(loader):
                ranks.sessions[who].committed(ranks.identities)
                ours[who].record_batch(number, 2)
    assert rounds == 2
    ranks.change([0])
    for who in ranks.each():
        assert len(ours[who]) == 2, "of which one is not alone any more"


def test_an_epoch_is_not_begun_again_by_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 1)
    ours = samplers(ranks, 4)[0]
    first = list(ours)
    assert list(ours) == first, "nothing has been recorded"
    ranks.commit([0])
    ours.record_indices(first)
    assert ours.finished
    with pytest.raises(OptionError, match=r"epoch 0 is over: .*set_epoch\(1\)"):
        iter(ours)
    ours.set_epoch(0)
    assert ours.finished
    ours.set_epoch(1)
    assert not ours.finished
    assert len(ours) == 4


# ------------------------------------------------------------------------------------------------- positions


def steps(ranks: Ranks, ours: dict[int, ElasticSampler], batch: int, count: int) -> list[dict[int, list[int]]]:
    """At most so many steps of all ranks; what each of them was given."""
    if all([ours[who].finished for who in ranks.each()]):
        return []
    loaders = {who: iter(BatchSampler(ours[who], batch, False)) for who in ranks.each()}
    done = []
    for number in range(count):
        batches = {who: its for who in ranks.each() if (its := next(loaders[who], None))}
        if not batches:
            break
        done.append(batches)
        ranks.commit(ranks.identities)
        for who in ranks.each():
            ours[who].record_batch(number, batch)
    return done


@pytest.mark.parametrize("samples", [1, 23, 60])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_job_goes_on_on_any_number_of_ranks(
    samples: int, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for done in (0, 1, 3):
        ranks = Ranks(monkeypatch, before)
        ours = samplers(ranks, samples)
        for who in ranks.each():
            ours[who].set_epoch(2)
        had = steps(ranks, ours, 4, done)
        state = same_position(ranks, ours)
        resumed = Ranks(monkeypatch, after)
        theirs = samplers(resumed, samples)
        for who in resumed.each():
            theirs[who].load_state_dict(state)
            assert theirs[who].epoch == 2
        rest = steps(resumed, theirs, 4, 100)
        counts = Counter(index for batches in had + rest for its in batches.values() for index in its)
        assert set(counts) == set(range(samples))
        assert counts.total() < samples + before + after
        if before == after:
            assert rest == steps(ranks, ours, 4, 100), "bit for bit, filling up included"


def test_what_had_gone_into_no_exchange_is_given_up_on_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the local steps are; on as many ranks it goes on within the window."""
    ranks = Ranks(monkeypatch, 2)
    ours = samplers(ranks, 12, shuffle=False)
    for who in ranks.each():
        for _ in zip(range(2), ours[who], strict=False):
            pass
    ranks.commit((0, 1))
    for who in ranks.each():
        ours[who].record_batch(0, 1)  # counts
        ours[who].record_batch(1, 1)  # no exchange yet
    state = same_position(ranks, ours)
    for count, left in ((2, 8), (3, 10)):
        resumed = Ranks(monkeypatch, count)
        theirs = samplers(resumed, 12, shuffle=False)
        found = []
        for who in resumed.each():
            theirs[who].load_state_dict(state)
            found += list(theirs[who])
        assert set(found) == set(range(12 - left, 12))


DAMAGED = {
    "another dataset": {"samples": 11},
    "another order": {"seed": 1},
    "not shuffled": {"shuffle": False},
    "a later version": {"version": 2},
    "no epoch": {"epoch": None},
    "no ranks": {"deals": [[0, 0, 0, []]]},
    "more than there is": {"deals": [[2, 6, 0, []]]},
    "below nothing": {"deals": [[2, -1, 0, []]]},
    "pending what was not had": {"deals": [[2, 1, 2, []]]},
    "lost what was not had": {"deals": [[2, 1, 0, [[0, 2]]]]},
    "lost nowhere": {"deals": [[2, 1, 0, [[2, 1]]]]},
    "sent what was not pending": {"sent": 1},
    "sent in part": {"sent": 0.0},
    "a deal that is none": {"deals": [[2, 1]]},
    "no deals": {"deals": 3},
}


@pytest.mark.parametrize("wrong", DAMAGED.values(), ids=DAMAGED)
def test_a_position_that_cannot_be(wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    ours = samplers(ranks, 10)
    steps(ranks, ours, 2, 1)
    state = same_position(ranks, ours)
    for who in ranks.each():
        with pytest.raises(CheckpointError, match="position"):
            ours[who].load_state_dict({**state, **wrong})
        with pytest.raises(CheckpointError, match="position"):
            ours[who].load_state_dict([])  # type: ignore[arg-type]
    assert same_position(ranks, ours) == state


def test_what_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    ours = samplers(ranks, 10)[0]
    next(ranks.each())
    with pytest.raises(OptionError, match="iterate over the sampler first"):
        ours.record_batch(0, 2)
    mine = list(ours)
    with pytest.raises(OptionError, match="are not the next 2 that this rank was given"):
        ours.record_indices(mine[1:3])
    for wrong in ((-1, 2), (0, 0), (0.5, 1)):
        with pytest.raises(OptionError):
            ours.record_batch(*wrong)  # type: ignore[arg-type]
    assert len(ours) == 5


def test_no_job_and_no_length() -> None:
    mpisign.shutdown()
    with pytest.raises(NotInitializedError, match=r"ElasticSampler\(\)"):
        ElasticSampler(range(3))


@pytest.mark.usefixtures("world")
def test_a_dataset_without_a_length() -> None:
    with pytest.raises(OptionError, match="generator has no length"):
        ElasticSampler(index for index in range(3))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="seed"):
        ElasticSampler(range(3), seed=0.5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("world")
def test_torchs_default_device_and_generator_are_left_alone() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        assert sorted(ElasticSampler(range(5))) == list(range(5))
    assert torch.equal(torch.get_rng_state(), before)
