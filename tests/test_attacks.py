"""mpisign.attacks: what each adversary sends, and that nobody becomes one by accident."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest
import torch

from mpisign import attacks
from mpisign.attacks import Adversary, Attack
from mpisign.errors import OptionError

MINE = torch.tensor([1.0, -2.0, 0.0])
HONEST = torch.tensor([[1.0, -1.0, 4.0], [2.0, 3.0, -4.0], [6.0, -5.0, 3.0], [-1.0, 1.0, 1.0]])  # means 2, -0.5, 1


def sent(attack: Attack, mine: torch.Tensor = MINE, honest: torch.Tensor = HONEST, seed: int = 0) -> torch.Tensor:
    """What it sends, with the guarantees of every attack checked."""
    before = mine.clone(), honest.clone()
    shown = honest if attack.omniscient else honest[:0]
    result = attack(mine, shown, torch.Generator().manual_seed(seed))
    assert result.shape == mine.shape
    assert result.dtype == mine.dtype
    assert torch.equal(mine, before[0])
    assert torch.equal(honest, before[1])
    assert result.data_ptr() not in (mine.data_ptr(), honest.data_ptr())
    return result


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (attacks.SignFlip(), [-1, 2, 0]),
        (attacks.SignFlip(omniscient=True), [-2, 0.5, -1]),
        (attacks.InnerProduct(), [-4, 1, -2]),
        (attacks.InnerProduct(tau=0.5), [-1, 0.25, -0.5]),
        (attacks.Scaled(), [-100, 200, 0]),
        (attacks.Constant(), [0, 0, 0]),
        (attacks.Constant(math.inf), [math.inf] * 3),
        (attacks.Mimic(), [1, -1, 4]),
        (attacks.Mimic(target=2), [6, -5, 3]),
        # Signs +++-, -+-+, +-++: two majorities and a tie, where the mean is negative. Magnitudes 2.5, 2.5, 3.
        (attacks.ColludingSigns(), [-2.5, 2.5, -3]),
        # Sums of squared deviations 26, 35, 38, over H - 1 = 3.
        (
            attacks.ALittleIsEnough(),
            [2 + 1.5 * (26 / 3) ** 0.5, -0.5 + 1.5 * (35 / 3) ** 0.5, 1 + 1.5 * (38 / 3) ** 0.5],
        ),
        (attacks.ALittleIsEnough(tau=0.0), [2, -0.5, 1]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_they_send(attack: Attack, expected: list[float], dtype: torch.dtype) -> None:
    assert sent(attack, MINE.to(dtype), HONEST.to(dtype)).tolist() == pytest.approx(expected)


def test_not_a_number() -> None:
    assert sent(attacks.Constant(math.nan)).isnan().all()


def test_one_honest_rank_has_no_deviation() -> None:
    assert sent(attacks.ALittleIsEnough(), honest=HONEST[:1]).tolist() == HONEST[0].tolist()


def test_random_signs_are_a_fair_coin() -> None:
    mine = torch.arange(1.0, 10_001.0)
    result = sent(attacks.RandomSigns(), mine)
    assert torch.equal(result.abs(), mine)
    assert abs(int((result > 0).sum()) - 5000) < 250  # five standard deviations


def test_gaussian_noise() -> None:
    result = sent(attacks.Gaussian(), torch.zeros(10_000))
    assert abs(result.mean().item()) < 5 * 200 / 100
    assert result.std().item() == pytest.approx(200, rel=0.05)


@pytest.mark.parametrize("attack", [attacks.RandomSigns(), attacks.Gaussian()], ids=repr)
def test_random_attacks_repeat_from_a_seed(attack: Attack) -> None:
    mine = torch.ones(100)
    assert torch.equal(sent(attack, mine, seed=3), sent(attack, mine, seed=3))
    assert not torch.equal(sent(attack, mine, seed=3), sent(attack, mine, seed=4))


def test_colluders_beat_the_honest_majority_where_it_is_narrow() -> None:
    """Seven ranks, an honest one right with probability 0.8: three adversaries, blind, or seeing the honest votes."""
    random = torch.Generator().manual_seed(0)
    right = torch.where(torch.rand(7, 20_000, generator=random) < 0.8, 1.0, -1.0)
    honest = right[3:]
    blind = torch.cat([-right[:3], honest]).sum(0)
    colluding = torch.cat([attacks.ColludingSigns()(right[0], honest, random).sign().expand(3, -1), honest]).sum(0)
    assert (blind < 0).float().mean().item() == pytest.approx(wrong_votes(), abs=0.02)
    # Four honest votes: against 3:1 the colluders win, on whatever side it is, and against 4:0 they lose.
    assert (colluding < 0).float().mean().item() == pytest.approx(4 * 0.8**3 * 0.2 + 0.2**4, abs=0.02)


def wrong_votes() -> float:
    """P[3 blind flippers and 4 honest ranks decide wrongly], each honest one being right with probability 0.8."""
    return sum(
        math.comb(4, a) * 0.8**a * 0.2 ** (4 - a) * math.comb(3, b) * 0.2**b * 0.8 ** (3 - b)
        for a in range(5)
        for b in range(4)
        if a + b < 3.5
    )


def test_flipped_labels() -> None:
    assert attacks.flip_labels(torch.tensor([0, 1, 9, 4]), classes=10).tolist() == [9, 8, 0, 5]


# ----------------------------------------------------------------------------------------- not by accident


def test_importing_mpisign_imports_no_attack() -> None:
    program = "import mpisign, sys; print('mpisign.attacks' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr


@pytest.mark.parametrize("consent", [False, 1, None, "yes"])
def test_an_adversary_must_be_asked_for_in_so_many_words(world: None, consent: object) -> None:
    from mpi4py import MPI

    with pytest.raises(OptionError, match=r"corrupt what ranks \[0\] send.* pass i_know_this_is_an_attack=True"):
        Adversary(attacks.SignFlip(), [0], MPI.COMM_SELF, i_know_this_is_an_attack=consent)
    with pytest.raises(TypeError, match="i_know_this_is_an_attack"):
        Adversary(attacks.SignFlip(), [0], MPI.COMM_SELF)


def test_an_adversary_says_so(world: None, caplog: pytest.LogCaptureFixture) -> None:
    from mpi4py import MPI

    with caplog.at_level(logging.WARNING, "mpisign"):
        Adversary(attacks.SignFlip(), [], MPI.COMM_SELF, i_know_this_is_an_attack=True)
        assert not caplog.records
        Adversary(attacks.SignFlip(), [0], MPI.COMM_SELF, i_know_this_is_an_attack=True)
    assert caplog.messages == ["rank 0 of 1 is an adversary from here on: SignFlip(omniscient=False)"]


def test_impossible_ranks(world: None) -> None:
    from mpi4py import MPI

    with pytest.raises(OptionError, match=r"ranks=\[0, 1\] cannot all be adversaries: there are only ranks 0 to 0"):
        Adversary(attacks.SignFlip(), [1, 0], MPI.COMM_SELF, i_know_this_is_an_attack=True)
    with pytest.raises(OptionError, match=r"Mimic\(target=0\) needs an honest rank"):
        Adversary(attacks.Mimic(), [0], MPI.COMM_SELF, i_know_this_is_an_attack=True)
