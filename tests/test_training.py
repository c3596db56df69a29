"""The loop that the training scripts share, on a world of one."""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import steps
from command_line import arguments
from resumable import assert_equal
from torch import nn
from torch.utils.data import TensorDataset

import mpisign
from mpisign.checkpoint.files import write_json
from mpisign.checkpoint.owner import OWNER, Owner


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

    def train(self, stop_after: int | None = None, **more: Any) -> Training:
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
            **more,
        )
        return self


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
    assert_equal(job.model.state_dict(), whole.model.state_dict())
    assert_equal(job.optimizer.state_dict(), whole.optimizer.state_dict())
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


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the first is skipped, too
def test_a_step_that_the_scaler_skips_counts_as_the_others(training: ModuleType, flags: ModuleType) -> None:
    job = Training(training, arguments(flags, "--quiet", "--precision", "fp16"))
    job.optimizer, loss_of = job.optimizer.wrapped, job.loss_of
    job.loss_of = lambda batch: loss_of(batch) * (math.inf if len(job.seen) == 4 else 1)  # type: ignore[method-assign]
    calls: list[int] = []
    hooked: list[int] = []
    job.optimizer.register_step_post_hook(lambda *_: hooked.append(len(job.seen)))
    job.train(after_step=lambda: calls.append(len(job.seen)))
    assert calls == list(range(1, 13))
    assert 4 not in hooked


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
    assert_equal(again.model.state_dict(), whole.model.state_dict())
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
        assert steps(tmp_path / folder) == [11, 12]
    saved = [torch.load(tmp_path / name / "step-00000012/shared.pt", weights_only=True) for name in ("one", "other")]
    for content in saved:
        del content["extra"]["history"]["seconds"]
    assert_equal(*saved)


def test_the_directory_of_another_job_is_said_in_one_line(
    training: ModuleType, flags: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    another = Owner("other", "far-away", "another boot", 1, "", "")
    write_json(tmp_path / OWNER, vars(another))
    with pytest.raises(SystemExit) as ended:
        Training(training, arguments(flags, "--quiet", "--checkpoint-dir", tmp_path)).train()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "is the directory of another job, process 1 on far-away" in said
    assert "Traceback" not in said


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
        (("--zeros", "abstain"), "was saved with zeros=rows, and now it is abstain"),
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
