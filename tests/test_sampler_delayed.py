"""mpisign.ElasticSampler: which samples have counted where an exchange ends in the next window (``delay=``)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sampling import Ranks, same_position, samplers

from mpisign import ElasticSampler


def delayed(ranks: Ranks, ours: dict[int, ElasticSampler], steps: range, counted: Sequence[int]) -> None:
    """Steps of one sample on each of three ranks, with ``every=4, delay=2``; in an exchange those count."""
    for step in steps:
        if step == 6:
            ranks.commit(counted, whole=False)
        if step in (4, 8):
            ranks.part()
        for who in ranks.each():
            ours[who].record_indices([3 * (step - 1) + who])


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("last", "counted"), [(5, (0, 1, 2)), (6, (0, 1, 2)), (6, (0, 1)), (9, (0, 1, 2)), (9, (0, 1))]
)
def test_with_a_delay_counts_what_was_done_before_the_window_parted(
    last: int, counted: tuple[int, ...], resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 dies after so many steps: of its samples those count that were in an exchange."""
    ranks = Ranks(monkeypatch, 3)
    ours = samplers(ranks, 36, shuffle=False)
    for who in ranks.each():
        iter(ours[who])
    delayed(ranks, ours, range(1, 6), counted)
    if resumed:
        state = same_position(ranks, ours)
        ranks = Ranks(monkeypatch, 3)
        ours = samplers(ranks, 36, shuffle=False)
        for who in ranks.each():
            ours[who].load_state_dict(state)
            iter(ours[who])
    delayed(ranks, ours, range(6, last + 1), counted)
    ranks.change([0, 1])
    left = {index for who in ranks.each() for index in ours[who]}
    exchanged = range(2, 3 * 4, 3) if last >= 6 and 2 in counted else ()
    assert left == {*range(3 * last, 36), *range(2, 3 * last, 3)} - {*exchanged}


def test_a_state_that_does_not_say_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 3)
    ours = samplers(ranks, 36, shuffle=False)
    for who in ranks.each():
        iter(ours[who])
    delayed(ranks, ours, range(1, 6), ())
    state = same_position(ranks, ours)
    assert state.pop("sent") == 4
    for who in ranks.each():
        ours[who].load_state_dict(state)
    assert same_position(ranks, ours) == {**state, "sent": 5}, "all that is pending, as it was then"
