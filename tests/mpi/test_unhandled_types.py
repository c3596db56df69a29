"""What cannot be sent, saved or voted on: an error on all ranks that names it; and numbers of any kind are numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import mpisign
from mpisign import OptionError, attacks, checkpoint

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi

Unfit = Callable[[], torch.Tensor]

# What it is, and a part of what is said of it.
UNFIT: dict[str, tuple[Unfit, str]] = {
    "lazy": (lambda: nn.LazyLinear(3).weight, "seen no batch yet: run one through the model first"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"torch.sparse_coo, not dense: use .to_dense\(\)"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), r"torch.sparse_csr, not dense: use .to_dense\(\)"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"quantized \(torch.qint8\)"),
    "meta": (lambda: torch.ones(3, device="meta"), "on the meta device, without elements"),
}
NUMBERS = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)]

quantized = pytest.mark.filterwarnings("ignore:.*(quantized|Sparse CSR|TypedStorage)")


class WithBuffer(nn.Module):
    """``its`` beside a parameter."""

    def __init__(self, its: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        if isinstance(its, nn.Parameter):
            self.its = its
        else:
            self.register_buffer("its", its)


class WithExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def wrapped(module: nn.Module) -> mpisign.DistributedSignOptimizer:
    return mpisign.DistributedSignOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), module.named_parameters())


# ---------------------------------------------------------------------------------------------------- tensors


@quantized
@pytest.mark.parametrize("kind", UNFIT)
def test_a_tensor_that_cannot_be_sent(comm: MPI.Comm, kind: str) -> None:
    make, said = UNFIT[kind]
    with pytest.raises(
        OptionError, match=rf"^rank {comm.rank}: broadcast_parameters.* cannot send 'its', which is.*{said}"
    ):
        mpisign.broadcast_parameters({"fit": torch.ones(2), "its": make()})
    with pytest.raises(OptionError, match=rf"^rank {comm.rank}: check_consistency.* cannot compare.*'its' is .*{said}"):
        mpisign.check_consistency(WithBuffer(make()))


@quantized
@pytest.mark.parametrize("kind", UNFIT)
def test_all_hear_of_one_ranks_tensor(comm: MPI.Comm, kind: str) -> None:
    if comm.size == 1:
        pytest.skip("needs two ranks")
    make, said = UNFIT[kind]
    mine = make() if comm.rank == comm.size - 1 else torch.ones(3)
    with pytest.raises(OptionError, match=rf"rank {comm.size - 1}: broadcast_parameters.*'its'.*{said}"):
        mpisign.broadcast_parameters({"its": mine})
    if kind != "lazy":
        with pytest.raises(OptionError, match=rf"rank {comm.size - 1}: check_consistency.*'its'.*{said}"):
            mpisign.check_consistency(WithBuffer(mine))


@quantized
@pytest.mark.parametrize("kind", UNFIT)
def test_an_optimizers_state(comm: MPI.Comm, kind: str) -> None:
    """It is root's; the others are not left waiting for it."""
    make, said = UNFIT[kind]
    parameter = nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([parameter], lr=0.1)
    if comm.rank == 0:
        sgd.state[parameter]["momentum_buffer"] = make()
    with pytest.raises(OptionError, match=rf"on rank 0 cannot be sent: state\['state'\]\[0\].*{said}"):
        mpisign.broadcast_optimizer_state(sgd)


@quantized
@pytest.mark.parametrize("kind", ["lazy", "sparse", "meta"])
def test_a_parameter_that_cannot_be_voted_on(comm: MPI.Comm, kind: str) -> None:
    make, said = UNFIT[kind]
    parameter = make() if kind == "lazy" else nn.Parameter(make())
    with pytest.raises(mpisign.GradientError, match=rf"parameter 'w' is .*{said}"):
        mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1), [("w", parameter)])
    adversary = attacks.Adversary(attacks.SignFlip(), [0], comm, i_know_this_is_an_attack=True)
    with pytest.raises(OptionError, match=rf"parameter 1 cannot be attacked, as it is .*{said}"):
        adversary.corrupt([torch.ones(2), parameter])


def test_a_complex_parameter(comm: MPI.Comm) -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(mpisign.GradientError, match=r"parameter 'w' is torch.complex64: only float32"):
        mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1), [("w", parameter)])
    with pytest.raises(OptionError, match=r"parameter 0 cannot be attacked, as it is torch.complex64"):
        attacks.Adversary(attacks.SignFlip(), [0], comm, i_know_this_is_an_attack=True).corrupt([parameter])


def test_complex_numbers_and_views_that_conjugate_or_negate(comm: MPI.Comm, folder: Path) -> None:
    """Everything else goes on with them: they are sent and saved as what they stand for."""
    values = torch.complex(torch.arange(4.0), torch.arange(4.0) + 1) * (1 + comm.rank)
    given = {"plain": values, "conjugate": values.clone().conj(), "negative": values.clone().conj().imag}
    assert given["conjugate"].is_conj()
    assert given["negative"].is_neg()
    mpisign.broadcast_parameters(given)
    usual = torch.complex(torch.arange(4.0), torch.arange(4.0) + 1)
    assert torch.equal(given["plain"], usual)
    assert torch.equal(given["conjugate"], usual.conj())
    assert torch.equal(given["negative"], -usual.imag)
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2))
    shared = usual.clone()
    for name, view in (("a", shared), ("b", shared.conj()), ("c", shared.clone().conj().imag)):
        model.register_buffer(name, view)
    mpisign.check_consistency(model)
    for asynchronous in (False, True):
        step = int(asynchronous)
        checkpoint.save(folder, model=model, optimizer=wrapped(model), step=step, asynchronous=asynchronous)
        checkpoint.wait()
        other = nn.Module()
        other.weight = nn.Parameter(torch.zeros(2))
        for name, dtype in (("a", usual.dtype), ("b", usual.dtype), ("c", torch.float32)):
            other.register_buffer(name, torch.zeros(4, dtype=dtype))
        checkpoint.load(folder / f"step-{step:08d}", model=other)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@quantized
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", UNFIT)
def test_checkpoints(comm: MPI.Comm, folder: Path, kind: str, asynchronous: bool) -> None:
    """What torch can save is saved, and of the rest the name is told."""
    make, said = UNFIT[kind]
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)) if kind == "lazy" else WithBuffer(make())
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    if kind in ("lazy", "meta"):
        name = "'1.weight'" if kind == "lazy" else "'its'"
        with pytest.raises(mpisign.CheckpointError, match=rf"{name} of the model is .*{said}"):
            checkpoint.save(folder, model=model, optimizer=optimizer, step=1, asynchronous=asynchronous)
        return
    checkpoint.save(folder, model=model, optimizer=optimizer, step=1, asynchronous=asynchronous)
    checkpoint.wait()
    saved = torch.load(folder / "step-00000001" / f"rank-{comm.rank:05d}.pt", weights_only=True)["buffers"]["its"]
    assert (saved.layout, saved.dtype) == (make().layout, make().dtype)


# -------------------------------------------------------------------------------------------- other arguments


def test_extra_state_is_named(comm: MPI.Comm) -> None:
    module = WithExtraState()
    with pytest.raises(OptionError, match=r"'_extra_state' is a dict: .*get_extra_state\(\).* to broadcast_object\(\)"):
        mpisign.broadcast_parameters(module.state_dict())
    with pytest.raises(OptionError, match=r"'model' is a OrderedDict"):
        mpisign.broadcast_parameters({"model": module.state_dict()})


def test_a_model_is_no_named_parameters(comm: MPI.Comm) -> None:
    for module in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))):
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        givens: list[Any] = [module, module.parameters(), module.state_dict(), dict(module.named_parameters()), 3]
        for given in givens:
            with pytest.raises(OptionError, match=r"named_parameters.*pass model.named_parameters\(\)"):
                mpisign.DistributedSignOptimizer(sgd, given)
        for given in (module, module.parameters(), module.weight if isinstance(module, nn.Linear) else None):
            with pytest.raises(
                OptionError, match=r"tensors with names.*pass model.state_dict\(\) or model.named_param"
            ):
                mpisign.broadcast_parameters(given)
        adversary = attacks.Adversary(attacks.SignFlip(), [0], comm, i_know_this_is_an_attack=True)
        for given in (module, module.named_parameters(), module.state_dict(), None):
            with pytest.raises(OptionError, match=r"pass model.parameters\(\)"):
                adversary.corrupt(given)


def test_states_are_no_objects(comm: MPI.Comm, folder: Path) -> None:
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
    good: dict[str, Any] = {"model": model, "optimizer": sgd, "scheduler": schedule}
    for name, its in good.items():
        wrong = {**good, name: its.state_dict()}
        with pytest.raises(OptionError, match=rf"{name}=(dict|OrderedDict) has no .*: pass the {name} itself"):
            checkpoint.save(folder, **wrong, step=1)
        with pytest.raises(OptionError, match=rf"{name}=(dict|OrderedDict) has no .*: pass the {name} itself"):
            checkpoint.load(folder, **wrong)
    for several in ([sgd, sgd], (sgd, sgd), {"a": sgd, "b": sgd}):
        with pytest.raises(OptionError, match=r"optimizer= takes one, and there are 2: .*in a directory of its own"):
            checkpoint.save(folder, **{**good, "optimizer": several}, step=1)
        with pytest.raises(OptionError, match=r"optimizer= takes one, and there are 2: .*in a directory of its own"):
            checkpoint.load(folder, **{**good, "optimizer": several})
    with pytest.raises(OptionError, match=r"model=OrderedDict has no named_parameters: pass the model itself"):
        mpisign.check_consistency(model.state_dict())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"optimizer=dict has no param_groups: pass the optimizer itself"):
        mpisign.check_consistency(model, sgd.state_dict())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"optimizer=dict has no state_dict\(\): pass the optimizer itself"):
        mpisign.broadcast_optimizer_state(sgd.state_dict())  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("three", NUMBERS, ids=lambda it: type(it).__name__)
def test_integers_of_any_kind(comm: MPI.Comm, folder: Path, three: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = wrapped(model)
    path = checkpoint.save(folder, model=model, optimizer=optimizer, step=three, keep=three)
    assert path.name == "step-00000003"
    resumed = checkpoint.load(folder, model=model)
    assert (type(resumed.step), resumed.step) == (int, 3)
    one = three - 2
    assert mpisign.one_bit_adam(freeze_step=one) == mpisign.one_bit_adam(freeze_step=1)
    assert len(mpisign.dgc(warmup_epochs=one).by_epoch) == 2
    for make, usual in (
        (mpisign.trimmed_mean, mpisign.trimmed_mean(3)),
        (mpisign.krum, mpisign.krum(3)),
        (lambda f: mpisign.multi_krum(f, m=f), mpisign.multi_krum(3, m=3)),
        (lambda f: mpisign.geometric_median(steps=f), mpisign.geometric_median(steps=3)),
        (mpisign.nearest_neighbour_mixing, mpisign.nearest_neighbour_mixing(3)),
        (mpisign.monna, mpisign.monna(3)),
    ):
        assert str(make(three)) == str(usual), "or ranks would take it for another method"
    zero = three - 3
    assert mpisign.broadcast_object(comm.rank, root_rank=zero) == 0
    mpisign.broadcast_parameters(model.state_dict(), root_rank=zero)
    mpisign.broadcast_optimizer_state(optimizer, root_rank=zero)
    seeded = mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), seed=three)
    assert type(seeded.policy.seed) is int
    attacks.Adversary(attacks.Mimic(zero), [], comm, i_know_this_is_an_attack=True, seed=three)
    attacks.Adversary(attacks.SignFlip(), [zero], comm, i_know_this_is_an_attack=True, seed=three)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_any_kind(comm: MPI.Comm, kind: Callable[[float], Any]) -> None:
    """Ranks that write a number in another way run the same method."""
    mine = kind if comm.rank == 0 else float
    for method in (
        lambda n: mpisign.signum(n(0)),
        lambda n: mpisign.lion(n(0), n(0)),
        lambda n: mpisign.noisy_signsgd(n(2)),
        lambda n: mpisign.sto_sign(n(2)),
        lambda n: mpisign.ternary_vote(n(1), n(2)),
        lambda n: mpisign.top_k(n(1)),
        lambda n: mpisign.ef21_w([n(1)] * comm.size, None),
    ):
        parameter = nn.Parameter(torch.ones(3))
        sgd = torch.optim.SGD([parameter], lr=0.1)
        its = mpisign.DistributedSignOptimizer(sgd, method=method(mine), bucket_cap_mb=mine(1), clip_grad_norm=mine(1))
        parameter.grad = torch.ones(3)
        its.step()


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "3", None, np.float64(3), torch.tensor(3.0)], ids=str)
def test_what_is_no_integer(comm: MPI.Comm, folder: Path, wrong: Any) -> None:
    model = nn.Linear(2, 2)
    for options in ({"step": wrong}, {"step": 1, "keep": wrong}):
        with pytest.raises(OptionError, match=r"(step|keep)=.* must be an int of \d or more"):
            checkpoint.save(folder, model=model, optimizer=wrapped(model), **options)
    with pytest.raises(OptionError, match="root_rank="):
        mpisign.broadcast_object(0, root_rank=wrong)
    with pytest.raises(OptionError, match=r"f=.* must be an int of 0 or more"):
        mpisign.krum(wrong)
