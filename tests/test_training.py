"""The loop and the flags that the training scripts share, on a world of one."""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mpirun import Job
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import mpisign

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def training(world: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("training")


@pytest.fixture
def flags(world: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("flags")


def arguments(flags: ModuleType, *options: str | Path) -> argparse.Namespace:
    """What the shared flags give for a command line."""
    parser = argparse.ArgumentParser()
    flags.add_flags(parser, epochs=2, batch_size=4)
    before, sys.argv = sys.argv, ["train.py", *map(str, options)]
    try:
        return flags.parse(parser)
    finally:
        sys.argv = before


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


# ----------------------------------------------------------------------------------------------------- methods


def test_every_method_of_the_library_can_be_named(flags: ModuleType) -> None:
    makers = {name for name in mpisign.methods.__all__ if name.islower()}
    assert set(flags.METHODS) == makers
    for name in makers:
        needed = [p for p in inspect.signature(flags.METHODS[name]).parameters.values() if p.default is p.empty]
        if not needed:
            assert flags.method(name) == flags.METHODS[name]()


@pytest.mark.parametrize(
    "text, method",
    [
        ("signum:momentum=0.95", mpisign.signum(0.95)),
        ("signum:momentum=0", mpisign.signum(0)),
        ("lion:beta1=0.95,beta2=0.98", mpisign.lion(0.95, 0.98)),
        ("lion: beta2 = .9", mpisign.lion(beta2=0.9)),
        ("signsgd:", mpisign.signsgd()),
    ],
)
def test_arguments_of_a_method(flags: ModuleType, text: str, method: mpisign.Method) -> None:
    assert flags.method(text) == method


def test_arguments_of_any_kind_reach_a_method(flags: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods to come have others than numbers."""
    given = {}
    monkeypatch.setitem(flags.METHODS, "new", lambda **arguments: given.update(arguments) or mpisign.mean())
    flags.method("new:share=0.01,f=1,mask=False,attack=sign_flip,scale=None,name='a b'")
    assert given == {"share": 0.01, "f": 1, "mask": False, "attack": "sign_flip", "scale": None, "name": "a b"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("adam", r"'adam' is not a method: choose from .*lion\(beta1=0.9, beta2=0.99, vote=True\).*signsgd\(\)"),
        (
            "signum:beta=0.9",
            r"unexpected keyword argument 'beta'. It is signum\(momentum=0.9\): write --method signum:",
        ),
        ("signum:momentum=1", r"momentum=1 must be in \[0, 1\)"),
        ("signum:momentum", r"momentum='' must be in \[0, 1\)"),
        ("signum:momentum=high", r"momentum='high' must be in \[0, 1\)"),
    ],
)
def test_a_method_that_is_none(flags: ModuleType, text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        flags.method(text)


# ------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "options, said",
    [
        (("--epochs", "0"), "'0' is not a whole number from 1 up, such as 20"),
        (("--save-every", "often"), "'often' is not a whole number"),
        (("--precision", "fp8"), "invalid choice: 'fp8'"),
        (("--tensorboard",), "add --log-dir, such as --log-dir out/log"),
        (("--checkpoint-dir", Path(__file__) / "a"), "Not a directory; name a file in a folder that can be made"),
        (("--log-dir", Path(__file__) / "a"), "Not a directory; name a file in a folder that can be made"),
    ],
)
def test_bad_input_is_answered_with_what_to_type(
    flags: ModuleType, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        arguments(flags, *options)
    assert said in capsys.readouterr().err


def test_an_exchange_that_the_method_cannot_use_ends_the_job(
    training: ModuleType, flags: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(2, 2)
    args = arguments(flags)
    args.exchange = "pigeon"
    with pytest.raises(SystemExit, match="2"):
        training.distribute(args, model, torch.optim.SGD(model.parameters(), 0.1), mpisign.signum(), 0)
    assert "exchange='pigeon' is not known" in capsys.readouterr().err


def test_a_problem_on_a_rank_ends_the_job(flags: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    flags.end_if_any(None)
    with pytest.raises(SystemExit, match="2"):
        flags.end_if_any("no such folder")
    assert "rank 0 on " in (said := capsys.readouterr().err)
    assert said.endswith(": no such folder\n")


# ----------------------------------------------------------------------------------------------------- batches


def test_an_epoch_can_begin_at_any_batch(training: ModuleType) -> None:
    whole = [batch.tolist() for batch in training.Batches(Noisy(22), 4, seed=1).epoch(3)]
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 2]
    assert sorted(index for batch in whole for index, _ in batch) == list(range(22))
    for start in range(6):
        torch.rand(start)  # whatever has been drawn before
        noisy = Noisy(22)
        batches = training.Batches(noisy, 4, seed=1)
        assert [batch.tolist() for batch in batches.epoch(3, start)] == whole[start:]
        assert noisy.asked == [index for batch in whole[start:] for index, _ in batch], "nothing else is loaded"
        assert len(batches) == 6


def test_epochs_seeds_and_samples_differ_in_order_and_noise(training: ModuleType) -> None:
    def draw(seed: int, epoch: int) -> torch.Tensor:
        (batch,) = training.Batches(Noisy(50), 50, seed).epoch(epoch)
        return batch

    orders = [draw(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    for order in orders:
        assert len(order[:, 1].unique()) == 50
    for at, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[at][:, 0] != orders[other][:, 0]).any()
        noise = [order[order[:, 0].argsort(), 1] for order in (orders[at], orders[other])]
        assert not torch.isin(*noise).any(), "the same image is cropped anew in each epoch"


def test_loading_draws_nothing_from_the_models_generator(training: ModuleType) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for epoch in range(2):
        assert list(training.Batches(Noisy(8), 4, seed=1).epoch(epoch))
    assert torch.equal(torch.rand(3), expected)


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


def test_too_few_samples_for_a_batch(training: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(training.Batches(Noisy(3), 4, seed=0)) == 1
    with pytest.raises(SystemExit, match="2"):
        training.Batches(Noisy(3), 4, seed=0, drop_last=True)
    assert "3 training samples do not fill a batch of 4 on each of 1 ranks: take a smaller --batch-size" in (
        capsys.readouterr().err
    )


# -------------------------------------------------------------------------------------------------------- loop


class Training:
    """A training in which everything that a checkpoint must bring back matters: 12 steps in 2 epochs."""

    def __init__(self, training: ModuleType, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.training, self.args = training, args
        inputs, labels = torch.randn(24, 6), torch.randint(3, (24,))
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.3, weight_decay=0.01)
        self.optimizer = training.distribute(args, self.model, sgd, args.method, 0)
        self.batches = training.Batches(TensorDataset(inputs, labels), args.batch_size, seed=7)
        self.history: dict[str, Any] = {}
        self.seen: list[list[float]] = []
        self.scores: list[float] = []

    def loss_of(self, batch: list[torch.Tensor]) -> torch.Tensor:
        self.seen.append(batch[0][:, 0].tolist())
        if len(self.seen) == self.stop_after:
            signal.raise_signal(signal.SIGUSR1)
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def evaluate(self) -> dict[str, float]:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        self.scores.append(float(self.model(torch.ones(1, 6)).square().sum()))
        return {"score": self.scores[-1]}

    def train(self, stop_after: int | None = None) -> Training:
        """Train to the end, or be told to stop in the step of that number, counted from here."""
        self.stop_after = stop_after
        self.training.train(
            self.args,
            self.model,
            self.optimizer,
            self.batches,
            self.loss_of,
            schedule=lambda epoch: 1 / (1 + epoch),
            evaluate=self.evaluate,
            history=self.history,
        )
        return self


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Equal to the bit, at any depth."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for at, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}/{at}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


def columns(path: Path, *names: str) -> list[tuple[float, ...]]:
    with open(path) as file:
        return [tuple(float(row[name]) for name in names) for row in csv.DictReader(file)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["signum", "lion"])
def test_stopped_at_any_step_it_ends_with_the_same_bits(
    training: ModuleType, flags: ModuleType, tmp_path: Path, method: str, precision: str
) -> None:
    options = ("--quiet", "--method", method, "--precision", precision)
    whole = Training(training, arguments(flags, *options)).train()
    assert len(whole.seen) == 12
    assert len(whole.scores) == 2

    places = ("--checkpoint-dir", tmp_path / "checkpoints", "--log-dir", tmp_path, "--log-every", "4")
    args = arguments(flags, *options, *places)
    seen, scores = [], []
    for stop_after in (2, 4, 5, None):  # within an epoch; at its end, before the evaluation; in the next; not
        job = Training(training, args)
        if stop_after:
            with pytest.raises(SystemExit) as stopped:
                job.train(stop_after)
            assert stopped.value.code == mpisign.REQUEUE_EXIT_CODE == 85
            assert len(job.seen) == stop_after
            mpisign.shutdown()  # puts back the signals' handlers, as a new process has them
            mpisign.init()
        else:
            job.train()
        seen += job.seen
        scores += job.scores
    assert seen == whole.seen
    assert scores == whole.scores
    assert_same(job.model.state_dict(), whole.model.state_dict())
    assert_same(job.optimizer.state_dict(), whole.optimizer.state_dict())
    assert job.history["epochs"] == whole.history["epochs"] == [step / 6 for step in range(12)]
    assert job.history["losses"] == whole.history["losses"]
    assert len(job.history["seconds"]) == 12
    assert [step for (step,) in columns(tmp_path / "train.csv", "step")] == [2, 4, 6, 8, 11, 12]
    assert columns(tmp_path / "eval.csv", "step", "epoch") == [(6, 1), (12, 2)]


def test_a_plain_optimizer_hears_of_a_signal_in_the_same_step(
    training: ModuleType, flags: ModuleType, tmp_path: Path
) -> None:
    """DDP's ranks do not meet in the optimizer."""
    job = Training(training, arguments(flags, "--quiet", "--checkpoint-dir", tmp_path, "--log-every", "100"))
    job.optimizer = job.optimizer.wrapped
    with pytest.raises(SystemExit, match="85"):
        job.train(stop_after=2)
    assert len(job.seen) == 2


def test_rows_and_learning_rates(training: ModuleType, flags: ModuleType, tmp_path: Path) -> None:
    job = Training(training, arguments(flags, "--quiet", "--log-dir", tmp_path, "--log-every", "4")).train()
    losses = job.history["losses"]
    means = [sum(part) / len(part) for part in (losses[:4], losses[4:6], losses[6:8], losses[8:])]
    rows = columns(tmp_path / "train.csv", "step", "epoch", "loss", "lr")
    assert rows == [
        (step, pytest.approx(step / 6, abs=1e-6), pytest.approx(mean), pytest.approx(0.01 / (1 + step / 6)))
        for step, mean in zip((4, 6, 8, 12), means, strict=True)
    ]
    assert all(speed > 0 for (speed,) in columns(tmp_path / "train.csv", "samples_per_second"))
    assert columns(tmp_path / "train.csv", "bytes_sent") == [(0,)] * 4
    assert columns(tmp_path / "eval.csv", "score") == [(pytest.approx(score),) for score in job.scores]


def test_a_killed_run_takes_back_what_it_logged_after_its_last_save(
    training: ModuleType, flags: ModuleType, tmp_path: Path
) -> None:
    args = arguments(
        flags, "--quiet", "--checkpoint-dir", tmp_path, "--log-dir", tmp_path, "--save-every", "4", "--keep", "9"
    )
    whole = Training(training, args).train()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{at:08}" for at in (4, 6, 8, 12)]
    logged = [columns(tmp_path / name, "step", "epoch") for name in ("train.csv", "eval.csv")]
    for lost in ("step-00000012", "step-00000008"):
        shutil.rmtree(tmp_path / lost)
    with open(tmp_path / "train.csv", "a") as file:
        file.write("13,2.1666")  # it was killed here
    again = Training(training, args).train()
    assert again.seen == whole.seen[6:]
    assert again.scores == whole.scores
    assert_same(again.model.state_dict(), whole.model.state_dict())
    assert [columns(tmp_path / name, "step", "epoch") for name in ("train.csv", "eval.csv")] == logged


def test_another_training_in_the_same_log_dir_begins_anew(
    training: ModuleType, flags: ModuleType, tmp_path: Path
) -> None:
    for epochs in (2, 1):
        Training(training, arguments(flags, "--quiet", "--log-dir", tmp_path, "--epochs", epochs)).train()
    assert columns(tmp_path / "train.csv", "step") == [(6,)]
    assert columns(tmp_path / "eval.csv", "step") == [(6,)]


def test_saved_in_the_background_as_in_the_foreground(training: ModuleType, flags: ModuleType, tmp_path: Path) -> None:
    for folder, options in (("one", ()), ("other", ("--async-save",))):
        args = arguments(
            flags, "--quiet", "--checkpoint-dir", tmp_path / folder, "--save-every", "1", "--keep", "2", *options
        )
        Training(training, args).train()
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["step-00000011", "step-00000012"]
    saved = [torch.load(tmp_path / name / "step-00000012/shared.pt", weights_only=True) for name in ("one", "other")]
    for content in saved:
        del content["extra"]["history"]["seconds"]
    assert_same(*saved)


def test_a_finished_training_is_only_evaluated_again(training: ModuleType, flags: ModuleType, tmp_path: Path) -> None:
    args = arguments(flags, "--quiet", "--checkpoint-dir", tmp_path, "--max-steps", "9", "--epochs", "1")
    whole = Training(training, args).train()
    again = Training(training, args).train()
    assert len(whole.seen) == 6
    assert again.seen == []
    assert again.scores == whole.scores
    assert again.history == whole.history
    args.epochs = 2
    longer = Training(training, args).train()
    assert len(longer.seen) == 3, "--max-steps counts those before, too"
    assert longer.scores == whole.scores, "it ends within an epoch"


def test_a_checkpoint_is_not_gone_on_from_with_other_options(
    training: ModuleType, flags: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--quiet", "--checkpoint-dir", tmp_path, "--max-steps", "1")
    Training(training, arguments(flags, *places)).train()
    for options, said in (
        (("--zeros", "abstain"), "was saved with zeros=coin, and now it is abstain"),
        (("--batch-size", "2"), "was saved with batch_size=4, and now it is 2"),
        (("--method", "signum:momentum=0.8"), "was saved with method=signum (Momentum(beta=0.9)"),
        (("--resume", "never"), "step-00000001 is an earlier training's"),
    ):
        with pytest.raises(SystemExit, match="2"):
            Training(training, arguments(flags, *places, *options)).train()
        assert said in capsys.readouterr().err
    Training(training, arguments(flags, *places, "--keep", "1", "--save-every", "2", "--epochs", "3")).train()


def test_a_damaged_checkpoint_is_told_without_a_traceback(
    training: ModuleType, flags: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(flags, "--quiet", "--checkpoint-dir", tmp_path, "--max-steps", "1")
    Training(training, args).train()
    (tmp_path / "step-00000001" / "shared.pt").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        Training(training, args).train()
    assert "shared.pt has 0 bytes" in capsys.readouterr().err


def test_what_it_says(
    training: ModuleType, flags: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(flags, "--checkpoint-dir", tmp_path)
    job = Training(training, args)
    with pytest.raises(SystemExit, match="85"):
        job.train(stop_after=8)
    said = capsys.readouterr()
    assert said.out == f"epoch 1: score {job.scores[0]:.4g}\n"
    assert f": stopped by a signal; step 8 of 12 is saved in {tmp_path}\n" in said.err
    assert "| 8/12 [" in said.err
    args.quiet = True
    mpisign.shutdown()
    mpisign.init()
    Training(training, args).train()
    assert capsys.readouterr().err == ""
