"""The batches that the training scripts share, on a world of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mpirun import Job
from torch.utils.data import Dataset

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Noisy(Dataset):
    """Sample i is [i, noise], and asking for it is noticed."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.asked.append(index)
        return torch.stack([torch.tensor(float(index)), torch.randn(())])


def test_an_epoch_can_begin_at_any_batch(batches: ModuleType) -> None:
    whole = [batch.tolist() for batch in batches.Batches(Noisy(22), 4, seed=1).epoch(3)]
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 2]
    assert sorted(index for batch in whole for index, _ in batch) == list(range(22))
    for start in range(6):
        torch.rand(start)  # whatever has been drawn before
        noisy = Noisy(22)
        loader = batches.Batches(noisy, 4, seed=1)
        assert [batch.tolist() for batch in loader.epoch(3, start)] == whole[start:]
        assert noisy.asked == [index for batch in whole[start:] for index, _ in batch], "nothing else is loaded"
        assert len(loader) == 6


def test_epochs_seeds_and_samples_differ_in_order_and_noise(batches: ModuleType) -> None:
    def draw(seed: int, epoch: int) -> torch.Tensor:
        (batch,) = batches.Batches(Noisy(50), 50, seed).epoch(epoch)
        return batch

    orders = [draw(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    for order in orders:
        assert len(order[:, 1].unique()) == 50
    for at, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[at][:, 0] != orders[other][:, 0]).any()
        noise = [order[order[:, 0].argsort(), 1] for order in (orders[at], orders[other])]
        assert not torch.isin(*noise).any(), "the same image is cropped anew in each epoch"


def test_loading_draws_nothing_from_the_models_generator(batches: ModuleType) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for epoch in range(2):
        assert list(batches.Batches(Noisy(8), 4, seed=1).epoch(epoch))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.long
@pytest.mark.parametrize("end, code", [("pass", 0), ("os.kill(os.getpid(), 9)", -9)], ids=["at its end", "killed"])
def test_a_process_that_ends_within_an_epoch_takes_its_workers_along(tmp_path: Path, end: str, code: int) -> None:
    """They do not hear SIGTERM, by which Python ends them, and their parent is Python's forkserver."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import batches, torch\n"
        "if __name__ == '__main__':\n"
        "    zeros = torch.utils.data.TensorDataset(torch.zeros(9))\n"
        "    loader = batches.make_loader(zeros, 1, range(9), workers=2)\n"
        "    print(next(batches.batches_of(loader)), flush=True)\n"
        f"    {end}\n"
    )
    with open(tmp_path / "output", "w+b") as output:
        process = subprocess.Popen([sys.executable, script], stdout=output, stderr=output, start_new_session=True)
        job = Job(process, output.fileno())
        try:
            done = job.wait(60)
            assert done.returncode == code
            assert done.text.startswith("[tensor([0.])]\n")
            assert not job.orphans(20)
        finally:
            job.end()


def test_too_few_samples_for_a_batch(batches: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(batches.Batches(Noisy(3), 4, seed=0)) == 1
    with pytest.raises(SystemExit, match="2"):
        batches.Batches(Noisy(3), 4, seed=0, drop_last=True)
    assert "3 training samples do not fill a batch of 4 on each of 1 ranks: take a smaller --batch-size" in (
        capsys.readouterr().err
    )
