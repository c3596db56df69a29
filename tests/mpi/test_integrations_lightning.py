"""mpisign.integrations.lightning on real ranks, with the real Trainer."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from resumable import assert_equal
from torch import nn

import mpisign

from .frameworks import data, framework

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = [pytest.mark.mpi, pytest.mark.few, pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def pl(job: None) -> Iterator[Any]:
    """Lightning; who logs is as before afterwards."""
    module = framework("lightning.pytorch")
    rank_zero = module.utilities.rank_zero.rank_zero_only
    before = rank_zero.rank
    yield module
    rank_zero.rank = before


def module_of(pl: Any, **options: Any) -> Any:
    """A LightningModule with a metric of torchmetrics, a schedule and dropout."""
    import torchmetrics

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(mpisign.rank())  # the strategy makes them equal
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(2, average="micro")
            self.seen: list[int] = []

        def training_step(self, batch: Any, place: int) -> torch.Tensor:
            x, y = batch
            self.seen += (x.sum(1) * 1000).long().tolist()
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.log("loss", loss, sync_dist=True)
            self.log("own", float(mpisign.rank()))
            return loss

        def validation_step(self, batch: Any, place: int) -> None:
            x, y = batch
            self.accuracy.update(self.net(x), y)
            self.log("accuracy", self.accuracy, on_epoch=True)
            self.log("rank", float(mpisign.rank()), sync_dist=True)

        def configure_optimizers(self) -> Any:
            kind: Any = torch.optim.AdamW if options.get("adam") else torch.optim.SGD
            optimizer: Any = kind(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            if options.get("wrapped"):
                return mpisign.DistributedSignOptimizer(optimizer)
            return [optimizer], [schedule]

    return Module()


def fit(pl: Any, folder: Path, epochs: int, resume: Path | None = None, module: Any = None, **more: Any) -> Any:
    from mpisign.integrations.lightning import MpisignStrategy, Reports

    options = {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": MpisignStrategy(method=mpisign.signum(0.9)),
        "logger": pl.loggers.CSVLogger(str(folder), version=0),
        "callbacks": [Reports(), pl.callbacks.ModelCheckpoint(str(folder), "{epoch}", save_top_k=-1)],
        "log_every_n_steps": 1,
        "max_epochs": epochs,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **more,
    }
    trainer = pl.Trainer(**options)
    loader = torch.utils.data.DataLoader(data(24 * mpisign.size()), batch_size=4, shuffle=True)
    check = torch.utils.data.DataLoader(data(10 * mpisign.size()), batch_size=5)
    module = module or module_of(pl)
    torch.manual_seed(100 + mpisign.rank())
    trainer.fit(module, loader, check, ckpt_path=resume)
    return trainer


def test_a_training(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    module = module_of(pl)
    trainer = fit(pl, folder, 2, module=module)
    assert (trainer.global_rank, trainer.world_size) == (comm.rank, comm.size)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, mpisign.DistributedSignOptimizer)
    mpisign.check_consistency(module.net, optimizer)
    assert optimizer.report is not None
    assert optimizer.report.voters == tuple(range(comm.size))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 4)
    seen = comm.allgather(module.seen)
    examples = sorted(int(x.sum() * 1000) for x, _ in data(24 * comm.size))
    assert all(len(its) == 48 for its in seen)
    assert max(abs(a - b) for a, b in zip(sorted(it for its in seen for it in its[:24]), examples, strict=True)) <= 1
    assert trainer.callback_metrics["rank"] == (comm.size - 1) / 2
    module.eval()
    right = [int(module.net(x).argmax() == y) for x, y in data(10 * comm.size)]
    assert trainer.callback_metrics["accuracy"].item() == pytest.approx(sum(right) / len(right))
    with open(folder / "lightning_logs" / "version_0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [row for row in rows if row["loss"]]
    assert len(losses) == 12, "one logger"
    assert [float(row["mpisign/voters"]) for row in rows if row["mpisign/voters"]] == [comm.size] * 12
    assert {path.name for path in folder.iterdir()} == {
        "lightning_logs",
        *(f"epoch={epoch}.ckpt{end}" for epoch in range(2) for end in ("", ".ranks")),
    }
    files = {path.name for path in (folder / "epoch=1.ckpt.ranks").iterdir()}
    assert files == {f"rank-{rank:05d}.pt" for rank in range(comm.size)}


LOCAL = {"every": 5, "method": mpisign.scaled_vote(0.5)}  # an epoch has six steps


@pytest.mark.parametrize(
    "options",
    [{"method": mpisign.signum(0.9)}, LOCAL, {**LOCAL, "delay": 2}, {"method": mpisign.monna(0)}],
    ids=["votes", "windows", "undecided", "mixed"],
)
def test_resuming_is_exact(comm: MPI.Comm, folder: Path, pl: Any, options: dict[str, Any]) -> None:
    from mpisign.integrations.lightning import MpisignStrategy

    adam = "every" in options or options["method"].exchanges_models

    def module() -> Any:
        made = module_of(pl, adam=adam)
        made.net[2] = nn.BatchNorm1d(16)  # in place of dropout, as Lightning does not save random numbers
        return made

    def fitted(folder: Path, epochs: int, resume: Path | None = None) -> Any:
        return fit(pl, folder, epochs, resume, module(), strategy=MpisignStrategy(**options))

    def saved(folder: Path) -> dict[str, Any]:
        """Before training's end, which makes ranks equal."""
        (own,) = torch.load(folder / "epoch=1.ckpt.ranks" / f"rank-{comm.rank:05d}.pt", weights_only=True)
        return {"model": torch.load(folder / "epoch=1.ckpt", weights_only=False)["state_dict"], "own": own}

    fitted(folder / "halves", 1)
    resumed = fitted(folder / "halves", 2, folder / "halves" / "epoch=0.ckpt")
    whole = fitted(folder / "whole", 2)
    mpisign.barrier()
    last = saved(folder / "whole")
    assert_equal(saved(folder / "halves"), last)
    kept = last["own"]["parameters"][0] if adam else last["model"]["net.0.weight"]
    assert comm.size == 1 or len(set(comm.allgather(kept.sum().item()))) == 1 + ("every" in options)
    assert_equal(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    net = whole.lightning_module.net.state_dict()
    assert_equal(resumed.lightning_module.net.state_dict(), net)
    assert comm.size == 1 or len(set(comm.allgather(net["2.running_mean"].sum().item()))) > 1, "each has its own"
    assert len(set(comm.allgather(net["0.weight"].sum().item()))) == 1
    resumed.strategy.remove_checkpoint(folder / "halves" / "epoch=0.ckpt")
    mpisign.barrier()
    assert not (folder / "halves" / "epoch=0.ckpt.ranks").exists()


@pytest.mark.parametrize("delay", [0, 2])
def test_training_that_ends_within_a_window(comm: MPI.Comm, folder: Path, pl: Any, delay: int) -> None:
    """Files have the last common parameters; at the end what was left of the window is exchanged, before hooks."""
    from mpisign.integrations.lightning import MpisignStrategy

    class Ends(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            mpisign.check_consistency(pl_module.net, trainer.optimizers[0])

    def fitted(steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        strategy = MpisignStrategy(every=4, delay=delay, method=mpisign.mean())
        keep = pl.callbacks.ModelCheckpoint(str(folder / str(steps)), every_n_train_steps=1, save_last=True)
        callbacks = [Ends(), keep]
        trainer = fit(
            pl, folder, 2, None, module_of(pl, adam=True), strategy=strategy, max_steps=steps, callbacks=callbacks
        )
        mpisign.barrier()
        file = torch.load(folder / str(steps) / "last.ckpt", weights_only=False)
        return trainer.lightning_module.state_dict(), file["state_dict"]

    (model, last), (common, _) = fitted(6), fitted(4)
    assert_equal(model, comm.bcast(model))
    assert not torch.equal(model["net.0.weight"], last["net.0.weight"])
    if not delay:  # else the last decision has come within the window
        assert_equal(last, common)


def test_an_exception_on_all_ranks_ends_no_window(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    from mpisign.integrations.lightning import MpisignStrategy

    module = module_of(pl, adam=True)
    module.on_train_batch_end = lambda *_: 1 / (4 - module.global_step)
    with pytest.raises(ZeroDivisionError):
        fit(pl, folder, 1, None, module, strategy=MpisignStrategy(every=3, method=mpisign.mean()))
    assert module.trainer.optimizers[0].state_dict()["mpisign"]["local_steps"]["position"] == 1


def test_a_checkpoint_that_is_a_link(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    """Ranks' files are beside what it points to, and stay there when the link is removed."""
    link = folder / "last.ckpt"
    callback = pl.callbacks.ModelCheckpoint(str(folder), "{epoch}", save_last="link")
    trainer = fit(pl, folder, 1, callbacks=[callback])
    assert link.is_symlink()
    memory = trainer.strategy.load_checkpoint(link)["mpisign"][0]["mpisign"]
    assert memory["rank"] == comm.rank
    assert_equal(memory, trainer.optimizers[0].state_dict()["mpisign"])
    mpisign.barrier()
    trainer.strategy.remove_checkpoint(link)
    mpisign.barrier()
    names = {path.name for path in folder.iterdir()}
    assert {"epoch=0.ckpt", "epoch=0.ckpt.ranks"} <= names
    assert "last.ckpt" not in names
    assert len(list((folder / "epoch=0.ckpt.ranks").iterdir())) == comm.size


def test_names_with_metrics_of_each_rank(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    """What counts is rank 0's name, when saving and when loading."""
    keep = pl.callbacks.ModelCheckpoint(str(folder), "{own:.0f}")
    trainer = fit(pl, folder, 1, callbacks=[keep], logger=False)
    mpisign.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["own=0.ckpt", "own=0.ckpt.ranks"]
    assert len(list((folder / "own=0.ckpt.ranks").iterdir())) == comm.size
    checkpoint = trainer.strategy.load_checkpoint(keep.best_model_path)
    assert_equal(checkpoint["mpisign"][0]["mpisign"], trainer.optimizers[0].state_dict()["mpisign"])
    mpisign.barrier()
    if comm.rank == 0:
        (folder / "own=0.ckpt.ranks" / f"rank-{comm.size - 1:05d}.pt").unlink()
    mpisign.barrier()
    if comm.size > 1:
        with pytest.raises(mpisign.CheckpointError, match=rf"^rank {comm.rank}: ranks \[{comm.size - 1}\] have no"):
            trainer.strategy.load_checkpoint(keep.best_model_path)


def test_batch_norm_over_all_ranks(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    module = module_of(pl)
    module.net[2] = nn.BatchNorm1d(16)
    fit(pl, folder, 1, module=module, sync_batchnorm=True)
    assert type(module.net[2]).__module__ == "mpisign.integrations.batch_norm"
    mpisign.check_consistency(module.net)


def test_reports_are_logged_once_an_exchange(pl: Any) -> None:
    from mpisign.integrations.lightning import Reports

    def logged(every: int) -> list[float]:
        logger = SimpleNamespace(told=[], log_metrics=lambda numbers, step: logger.told.append(numbers["mpisign/n"]))
        optimizer = SimpleNamespace(report=None)
        callback, trainer = Reports(), SimpleNamespace(optimizers=[optimizer], log_every_n_steps=every, global_step=0)
        trainer.loggers = [logger]
        for number in range(7):
            trainer.global_step += 2  # of two optimizers
            optimizer.report = SimpleNamespace(as_dict=lambda number=number: {"step": 0, "n": number})
            for _ in range(2):  # gradients accumulate
                callback.on_train_batch_end(trainer, None, None, None, 0)
        return logger.told  # type: ignore[no-any-return]

    assert (logged(1), logged(3), logged(0)) == ([*range(7)], [0, 3, 6], [])


def test_with_several_optimizers(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    """Each has windows of its own; and what version 0.2 has saved still loads."""
    from mpisign.integrations.lightning import MpisignStrategy

    class Two(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.nets = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

        def training_step(self, batch: Any, place: int) -> None:
            for which, optimizer in enumerate(self.optimizers()):
                if which <= place % 2:
                    optimizer.zero_grad()
                    self.manual_backward(nn.functional.cross_entropy(self.nets[which](batch[0]), batch[1]))
                    optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(net.parameters(), lr=0.01) for net in self.nets]

    def fitted(folder: Path, epochs: int, resume: Path | None = None, **options: Any) -> Any:
        strategy = MpisignStrategy(**options)
        keep = pl.callbacks.ModelCheckpoint(str(folder), "{epoch}", save_top_k=-1)
        return fit(pl, folder, epochs, resume, Two(), strategy=strategy, callbacks=[keep]).lightning_module

    options = {"every": 4, "method": mpisign.scaled_vote()}  # 6 and 3 steps an epoch
    fitted(folder / "halves", 1, **options)
    resumed = fitted(folder / "halves", 2, folder / "halves" / "epoch=0.ckpt", **options)
    whole = fitted(folder / "whole", 2, **options)
    assert_equal(resumed.state_dict(), whole.state_dict())

    options = {"method": mpisign.signum(0.9)}
    whole = fitted(folder / "votes", 2, **options)
    file = folder / "votes" / "epoch=0.ckpt.ranks" / f"rank-{comm.rank:05d}.pt"
    torch.save([its["mpisign"] for its in torch.load(file, weights_only=True)], file)
    resumed = fitted(folder / "votes", 2, folder / "votes" / "epoch=0.ckpt", **options)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_accumulation_clipping_and_bf16(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    module = module_of(pl)
    trainer = fit(pl, folder, 1, module=module, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert trainer.global_step == 3
    assert trainer.optimizers[0].report.step == 2
    mpisign.check_consistency(module.net, trainer.optimizers[0])
    from mpisign.integrations.lightning import MpisignStrategy

    halves = module_of(pl)  # Lightning does not clip in mixed precision, as the optimizer takes a scale out itself
    trainer = fit(pl, folder, 1, module=halves, precision="bf16-mixed", strategy=MpisignStrategy(clip_grad_norm=0.5))
    mpisign.check_consistency(halves.net, trainer.optimizers[0])


def test_between_ranks(comm: MPI.Comm, pl: Any) -> None:
    from mpisign.integrations.lightning import MpisignStrategy

    strategy = MpisignStrategy()
    mine = torch.tensor([float(comm.rank), 1.0])
    assert strategy.reduce(mine).tolist() == [(comm.size - 1) / 2, 1.0]
    assert strategy.reduce(mine, reduce_op=torch.distributed.ReduceOp.SUM).tolist() == [
        comm.size * (comm.size - 1) / 2,
        comm.size,
    ]
    with pytest.raises(mpisign.OptionError, match="median"):
        strategy.reduce(mine, reduce_op="median")
    assert strategy.all_gather(mine)[:, 0].tolist() == list(range(comm.size))
    assert not strategy.all_gather(mine.clone().requires_grad_()).requires_grad
    gathered = strategy.all_gather(mine.requires_grad_(), sync_grads=True)
    gathered[:, 0].mul(torch.arange(comm.size) + comm.rank).sum().backward()
    assert mine.grad is not None
    assert mine.grad.tolist() == [comm.size * comm.rank + sum(range(comm.size)), 0.0]
    mine.requires_grad_(False)
    assert strategy.broadcast({"a": comm.rank}) == {"a": 0}
    assert strategy.reduce_boolean_decision(comm.rank == 0, all=False)
    assert strategy.reduce_boolean_decision(comm.rank == 0) == (comm.size == 1)


def test_what_is_refused(comm: MPI.Comm, folder: Path, pl: Any) -> None:
    from mpisign.integrations.lightning import MpisignStrategy

    with pytest.raises(mpisign.OptionError, match=r"MpisignStrategy\(\) takes method, .*, and not metod, overlap$"):
        MpisignStrategy(metod=mpisign.mean(), overlap=True)
    with pytest.raises(mpisign.OptionError, match="would wrap again"):
        fit(pl, folder, 1, module=module_of(pl, wrapped=True))
    with pytest.raises(mpisign.OptionError, match="devices=1"):
        fit(pl, folder, 1, devices=2)
