"""What mpisign.optimizer saves, loads and copies. At one rank."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_table import FOUR, among
from resumable import assert_equal
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import mpisign
from mpisign import CheckpointError, DistributedSignOptimizer, Method

pytestmark = pytest.mark.usefixtures("world")

methods = pytest.mark.parametrize("method", FOUR, ids=lambda method: method.name)

FORGETFUL = among(1, lambda method: not method.memory.fields)

State = dict[str, Any]


class Job:
    """A small training run that is the same each time. Half of its gradients are zeros, so that coins matter."""

    def __init__(
        self, method: Method | None = None, wide: int = 40, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, wide), nn.Linear(wide, 2)).to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sgd = SGD(self.model.parameters(), lr=0.01, momentum=0.5, weight_decay=0.01)
        self.optimizer = DistributedSignOptimizer(sgd, method=method, **options)
        self.step = 0

    def train(self, steps: int) -> Job:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 + self.step)
            for parameter in self.model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient.where(gradient > 0, 0).to(parameter.dtype)
            self.optimizer.step()
            self.step += 1
        return self

    def everything(self) -> State:
        """All that a step depends on, copied."""
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def resume(self, saved: State) -> Job:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["optimizer"]["mpisign"]["step"]
        return self


# -------------------------------------------------------------------------------------------------- saving


@methods
def test_the_state_is_torch_s_and_one_key(method: Method) -> None:
    job = Job(method).train(3)
    state = job.optimizer.state_dict()
    ours = state.pop("mpisign")
    assert_equal(state, job.optimizer.wrapped.state_dict())
    assert (ours["rank"], ours["size"], ours["step"], ours["method"]) == (0, 1, 3, method.name)
    if method.memory.fields:
        parameters = list(job.model.parameters())
        assert set(ours["memory"]) == set(range(len(parameters)))
        for place, fields in ours["memory"].items():
            assert set(fields) == set(method.memory.fields)
            assert all(value.shape == parameters[place].shape for value in fields.values())


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_memory_is_kept_in_at_least_fp32(dtype: torch.dtype, kept: torch.dtype) -> None:
    memory = Job(dtype=dtype).train(1).optimizer.state_dict()["mpisign"]["memory"]
    assert {value.dtype for fields in memory.values() for value in fields.values()} == {kept}


def test_a_state_can_be_asked_for_outside_a_job() -> None:
    job = Job().train(1)
    inside = copy.deepcopy(job.optimizer.state_dict())
    mpisign.shutdown()
    assert_equal(job.optimizer.state_dict(), inside)


# ------------------------------------------------------------------------------------------------ resuming


@methods
def test_going_back_to_an_earlier_state(method: Method) -> None:
    job = Job(method).train(2)
    earlier = job.everything()
    later = job.train(2).everything()
    assert_equal(job.resume(earlier).everything(), earlier)
    assert_equal(job.train(2).everything(), later)


def test_the_loaded_memory_is_a_copy() -> None:
    saved = Job().train(2).everything()
    kept = copy.deepcopy(saved["optimizer"]["mpisign"])
    Job().resume(saved).train(2)
    assert_equal(saved["optimizer"]["mpisign"], kept)


def test_resuming_in_a_model_of_another_type_or_layout() -> None:
    """The memory takes the layout of the parameters it is loaded for."""
    saved = Job().train(2).everything()
    job = Job()
    job.model[1].weight.data = job.model[1].weight.detach().t().contiguous().t()
    job.resume(saved)
    memory = job.optimizer.state_dict()["mpisign"]["memory"][2]["momentum"]
    assert memory.stride() == job.model[1].weight.stride()
    assert_equal(memory, saved["optimizer"]["mpisign"]["memory"][2]["momentum"])
    assert_equal(
        Job(dtype=torch.bfloat16).resume(saved).optimizer.state_dict()["mpisign"]["memory"][2],
        {"momentum": saved["optimizer"]["mpisign"]["memory"][2]["momentum"]},
    )


# ------------------------------------------------------------------------------- states of other optimizers


def test_the_state_of_a_plain_optimizer_loads_with_a_warning() -> None:
    job = Job().train(2)
    plain = copy.deepcopy(job.optimizer.wrapped.state_dict())
    other = Job()
    with pytest.warns(UserWarning, match=r"rank 0: the memory \(momentum\) starts fresh.*plain optimizer") as warned:
        other.optimizer.load_state_dict(plain)
    assert [warning.filename for warning in warned] == [__file__], "it should point at the line that loads"
    assert_equal(other.optimizer.wrapped.state_dict(), plain)
    assert other.optimizer.state_dict()["mpisign"]["memory"] == {}
    other.train(1)


@pytest.mark.parametrize("method", FORGETFUL.values(), ids=FORGETFUL)
def test_without_a_memory_there_is_nothing_to_warn_of(method: Method) -> None:
    Job(method).optimizer.load_state_dict(Job(method).train(1).optimizer.wrapped.state_dict())


def test_a_plain_optimizer_loads_our_state() -> None:
    job = Job().train(2)
    plain = SGD(job.model.parameters(), lr=1.0)
    plain.load_state_dict(job.optimizer.state_dict())
    assert_equal(plain.state_dict(), job.optimizer.wrapped.state_dict())


def test_the_state_of_another_method_starts_the_memory_fresh() -> None:
    saved = Job(mpisign.lion()).train(2).everything()
    job = Job(mpisign.signum())
    with pytest.warns(UserWarning, match="starts fresh.*method 'lion'"):
        job.resume(saved)
    assert job.optimizer.state_dict()["mpisign"]["memory"] == {}
    job.train(1)
    assert job.optimizer.report is not None
    assert job.optimizer.report.step == 2, "the ranks' common count of steps goes on"


def test_with_momentum_ef21_is_another() -> None:
    for before, now in ((mpisign.ef21(), mpisign.ef21_sgdm()), (mpisign.ef21_sgdm(), mpisign.ef21())):
        saved = Job(before).train(2).everything()
        with pytest.warns(UserWarning, match=r"the memory \(ef21.*\) starts fresh"):
            Job(now).resume(saved).train(1)


def test_the_state_of_another_rank_starts_the_memory_fresh() -> None:
    saved = Job().train(2).everything()
    saved["optimizer"]["mpisign"]["rank"] = 3
    job = Job()
    with pytest.warns(UserWarning, match="state of rank 3"):
        job.resume(saved)
    assert job.optimizer.state_dict()["mpisign"]["memory"] == {}


def of_another_size(state: State) -> State:
    return {**state, "mpisign": {**state["mpisign"], "size": 4}}


def of_a_newer_version(state: State) -> State:
    return {**state, "mpisign": {**state["mpisign"], "version": 1000}}


def of_another_model(state: State) -> State:
    return Job(wide=41).train(1).optimizer.state_dict()


def of_a_larger_model(state: State) -> State:
    memory = {**state["mpisign"]["memory"], 99: state["mpisign"]["memory"][0]}
    return {**state, "mpisign": {**state["mpisign"], "memory": memory}}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (of_another_size, "rank 0: .* job of 4 ranks and this one has 1.* -n 4"),
        (of_a_newer_version, "version 1000"),
        (of_another_model, r"momentum of parameter \d has shape \(.*41"),
        (of_a_larger_model, "parameter 99"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil: Callable[[State], State], message: str) -> None:
    job = Job().train(2)
    saved = spoil(copy.deepcopy(job.optimizer.state_dict()))
    job.train(1)
    before = job.everything()
    with pytest.raises(CheckpointError, match=message):
        job.optimizer.load_state_dict(saved)
    assert_equal(job.everything(), before)
    assert_equal(job.train(1).everything(), Job().train(4).everything())


def test_other_groups_are_an_error_and_change_nothing() -> None:
    job = Job().train(2)
    before = job.everything()
    saved = copy.deepcopy(before["optimizer"])
    saved["param_groups"] *= 2
    with pytest.raises(CheckpointError, match=r"\['param_groups'\] has 2 groups, and this optimizer 1"):
        job.optimizer.load_state_dict(saved)
    assert_equal(job.everything(), before)


def test_giving_the_memory_up_as_the_error_advises() -> None:
    saved = of_another_size(Job().train(2).optimizer.state_dict())
    saved.pop("mpisign")
    job = Job()
    with pytest.warns(UserWarning, match="starts fresh"):
        job.optimizer.load_state_dict(saved)
    job.train(1)


# --------------------------------------------------------------------------------------------------- hooks


def test_state_dict_hooks() -> None:
    optimizer = Job().train(1).optimizer
    calls: list[Any] = []
    optimizer.register_state_dict_pre_hook(calls.append)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": sorted(state)})
    optimizer.wrapped.register_state_dict_post_hook(lambda o, state: {**state, "inner": True})
    state = optimizer.state_dict()
    assert calls == [optimizer]
    assert state["note"] == ["inner", "mpisign", "param_groups", "state"]


def test_load_hooks() -> None:
    saved = Job().train(2).everything()["optimizer"]
    optimizer = Job().optimizer
    calls = []

    def double_lr(o: Any, state: State) -> State:
        calls.append(("before", o))
        groups = [{**group, "lr": 2 * group["lr"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(double_lr)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(("after", o)))
    optimizer.wrapped.register_load_state_dict_post_hook(lambda o: calls.append(("inner", o)))
    optimizer.load_state_dict(saved)
    assert calls == [("before", optimizer), ("inner", optimizer.wrapped), ("after", optimizer)]
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert saved["param_groups"][0]["lr"] == 0.01
    assert_equal(optimizer.state_dict()["mpisign"], saved["mpisign"])


def test_a_load_hook_may_drop_the_memory() -> None:
    saved = of_another_size(Job().train(2).everything()["optimizer"])
    optimizer = Job().optimizer
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {k: v for k, v in state.items() if k != "mpisign"})
    with pytest.warns(UserWarning, match="starts fresh"):
        optimizer.load_state_dict(saved)


# -------------------------------------------------------------------------------------------------- copies


def by_deepcopy(job: Job) -> Job:
    return copy.deepcopy(job)


def by_pickle(job: Job) -> Job:
    return pickle.loads(pickle.dumps(job))


def by_torch_save(job: Job) -> Job:
    file = io.BytesIO()
    torch.save(job, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copied = pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save])


@methods
@copied
def test_a_copy_trains_on_alone(copied: Callable[[Job], Job], method: Method) -> None:
    job = Job(method).train(2)
    before = job.everything()
    other = copied(job)
    assert [id(p) for p in other.optimizer.param_groups[0]["params"]] == [id(p) for p in other.model.parameters()]
    other.train(2)
    assert_equal(job.everything(), before)
    job.train(2)
    assert_equal(other.everything(), job.everything())
    assert_equal(job.everything(), Job(method).train(4).everything())


@copied
def test_a_copy_keeps_options_and_names(copied: Callable[[Job], Job]) -> None:
    job = Job(mpisign.lion(), zeros="abstain", ties="zero", exchange="allgather", seed=9)
    other = copied(job)
    assert repr(other.optimizer) == repr(job.optimizer)
    other.model[0].weight.grad = other.model[0].weight.detach().to_sparse()
    with pytest.raises(mpisign.GradientError, match=r"group0\.param0"):
        other.optimizer.step()


@copied
def test_a_copy_with_a_scheduler_attached_steps_itself(copied: Callable[[Job], Job]) -> None:
    """A scheduler hangs a wrapper of step() on the object, bound to the original."""
    job = Job()
    job.scheduler = StepLR(job.optimizer, 1, gamma=0.5)
    job.train(1)
    other = copied(job)
    before = job.everything()
    other.train(1)
    assert_equal(job.everything(), before)
    assert_equal(job.train(1).everything(), other.everything())


def test_a_copy_in_the_middle_of_a_synchronized_step_starts_clean() -> None:
    job = Job().train(1)
    for parameter in job.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    job.optimizer.synchronize()
    copy.deepcopy(job).train(1)


def test_a_copy_can_be_unpickled_outside_a_job() -> None:
    """A process that only looks at a checkpoint is in no job."""
    frozen = pickle.dumps(Job().train(1))
    mpisign.shutdown()
    job = pickle.loads(frozen)
    assert job.optimizer.state_dict()["mpisign"]["step"] == 1
    mpisign.init()
    job.train(1)
