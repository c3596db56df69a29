"""A state with any part missing or of another kind is an error that names the part, or loads and the next step works.

Never is it a KeyError or the like, and an optimizer that has refused a state is as it was. At one rank.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from methods_table import ALONE
from resumable import assert_equal
from torch import nn, optim

from mpisign import CheckpointError, DistributedSignOptimizer, Method

pytestmark = pytest.mark.usefixtures("world")

Path = tuple[Any, ...]
Make = Callable[[list[nn.Parameter]], optim.Optimizer]

GONE = object()


def deep() -> Any:
    tree: Any = 1
    for _ in range(100_000):
        tree = [tree]
    return tree


SOME = [GONE, None, "text", 1.5, [], {}]
MANY = [
    *SOME,
    -1,
    True,
    10**30,
    float("nan"),
    "x" * 10_000,
    (1, 2),
    {"a": {"b": [1]}},
    {0: {0: {}}},
    torch.ones(7),
    torch.ones(()),
    torch.ones(3, 2, dtype=torch.int64),
    torch.ones(3, 2, dtype=torch.complex64),
    torch.ones(3, 2, device="meta"),
    torch.ones(3, 2).to_sparse(),
    object(),
]

WRAPPED: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.1),
    "Adam in one go": lambda p: optim.Adam(p, lr=0.1, foreach=True),
    "NAdam": lambda p: optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: optim.RAdam(p, lr=0.1),
    "Adamax": lambda p: optim.Adamax(p, lr=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "ASGD": lambda p: optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: optim.Rprop(p, lr=0.1),
}
if hasattr(optim, "Adafactor"):
    WRAPPED["Adafactor"] = lambda p: optim.Adafactor(p, lr=0.1)


class Job:
    """Two parameters in two groups."""

    def __init__(self, method: Method | None = None, make: Make = WRAPPED["SGD with momentum"]) -> None:
        self.parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Adam and its like, around a vote
            self.optimizer = DistributedSignOptimizer(make(self.parameters), method=method)
            self.optimizer.set_epoch(1)
        self.train(2)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for parameter in self.parameters:
                parameter.grad = torch.linspace(-1.0, 2.0, parameter.numel()).view(parameter.shape)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nobody has said which epoch this is
                self.optimizer.step()

    def load(self, state: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a memory starts fresh, or a number is made real
            self.optimizer.load_state_dict(state)


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Where everything in a state is."""
    if path:
        yield path
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, its in inside:
        yield from places(its, (*path, key))


def spoilt(tree: Any, path: Path, value: Any) -> Any:
    """A state with another value at one place, or without it."""
    if not path:
        return value
    key, *rest = path
    items = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    if value is GONE and not rest:
        del items[key]
    else:
        items[key] = spoilt(items[key], tuple(rest), value)
    return items if isinstance(tree, dict) else type(tree)(items.values())


def check(job: Job, state: Any, named: str, where: object) -> bool:
    """Try a state; whether it was refused."""
    before = copy.deepcopy(job.optimizer.state_dict())
    try:
        job.load(state)
    except CheckpointError as error:
        said = str(error)
        assert named in said or (named == "amsgrad" and "max_exp_avg_sq" in said), (where, said)
        assert "rank 0" in said
        assert len(said) < 1500, where
        assert_equal(job.optimizer.state_dict(), before)
        return True
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}") from error
    try:
        job.train(2)
    except Exception as error:
        raise AssertionError(f"{where} has loaded, and then: {error}") from error
    return False


def check_all(build: Callable[[], Job], part: str, values: list[Any]) -> int:
    """How many states were refused."""
    job, refused = build(), 0
    good = copy.deepcopy(job.optimizer.state_dict())
    for path in [it for it in places(good) if (it[0] == "mpisign") == (part == "mpisign")]:
        named = [key for key in path if isinstance(key, str)][-1]
        for value in values:
            if check(job, spoilt(copy.deepcopy(good), path, value), named, (path, str(value)[:40])):
                refused += 1
            else:
                job = build()
    return refused


def quick(names: Iterable[str], some: tuple[str, ...]) -> list[Any]:
    """All of them; whatever is not among ``some`` is like one of these."""
    return [pytest.param(name, marks=[] if name in some else pytest.mark.long) for name in names]


KINDS = ("signum", "double_squeeze", "dp_sign private", "one_bit_adam", "ef21")


@pytest.mark.parametrize("name", quick(ALONE, KINDS))
def test_every_field_of_ours(name: str) -> None:
    assert check_all(lambda: Job(ALONE[name]), "mpisign", MANY if name in KINDS else SOME) > 50


@pytest.mark.parametrize("name", quick(WRAPPED, ("SGD with momentum", "Adam", "Adagrad")))
def test_every_field_of_torch_s(name: str) -> None:
    assert check_all(lambda: Job(make=WRAPPED[name]), "torch", MANY) > 100


@pytest.mark.parametrize(
    "where", [("mpisign",), ("mpisign", "memory", 0), ("state", 0), ("param_groups", 0, "lr")], ids=str
)
def test_what_is_deeply_nested(where: Path) -> None:
    job = Job()
    state = spoilt(job.optimizer.state_dict(), where, deep())
    check(job, state, str([key for key in where if isinstance(key, str)][-1]), where)


@pytest.mark.parametrize(
    "state", [None, 3, "text", [], [1], {}, {"mpisign": {}}, deep(), torch.ones(3)], ids=lambda it: ""
)
def test_what_is_no_state(state: Any) -> None:
    assert check(Job(), state, "stat", "no state")


@pytest.mark.parametrize("ours", WRAPPED)
def test_states_of_other_optimizers(ours: str) -> None:
    """Of the same parameters: wrapped as this one is, and plain."""
    mine = Job(make=WRAPPED[ours])
    for theirs, make in WRAPPED.items():
        state = Job(make=make).optimizer.state_dict()
        check(mine, state, "state", (theirs, ours))
        check(mine, {key: value for key, value in state.items() if key != "mpisign"}, "state", (theirs, "plain", ours))


@pytest.mark.long
@pytest.mark.parametrize("ours", ALONE)
def test_states_of_other_methods(ours: str) -> None:
    mine = Job(ALONE[ours])
    for theirs, method in ALONE.items():
        check(mine, Job(method).optimizer.state_dict(), "mpisign", (theirs, ours))


def test_what_is_missing_is_said_at_load() -> None:
    """And torch alone says it in the next step."""
    job = Job(make=WRAPPED["Adam"])
    state = spoilt(job.optimizer.state_dict(), ("state", 1, "exp_avg_sq"), GONE)
    with pytest.raises(
        CheckpointError, match=r"the next step of Adam would fail: \['state'\]\[1\]\['exp_avg_sq'\] is miss"
    ):
        job.optimizer.load_state_dict(state)
    plain = optim.Adam([nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))], amsgrad=True)
    plain.load_state_dict({key: state[key] for key in ("state", "param_groups")})
    for parameter in plain.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KeyError, match="exp_avg_sq"):
        plain.step()


class Lazy(optim.Optimizer):
    """One of a user's own, whose steps do what nobody else should."""

    steps = 0

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "decay": 0.5})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        type(self).steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["mean"] = group["decay"] * state.get("mean", torch.zeros_like(parameter)) + parameter.grad
                state["count"] = state.get("count", 0) + 1
                parameter.data -= group["lr"] * state["mean"]


def test_an_optimizer_of_ones_own_is_compared_and_takes_no_step() -> None:
    job = Job(make=Lazy)
    good, steps = copy.deepcopy(job.optimizer.state_dict()), Lazy.steps
    job.load(good)
    for path, value, says in (
        (("state", 0, "mean"), GONE, r"\['state'\]\[0\]\['mean'\] is missing"),
        (
            ("state", 0, "mean"),
            torch.ones(7),
            r"\['mean'\] is a tensor \(7,\) of float32, where it keeps a tensor \(3, 2\)",
        ),
        (("param_groups", 0, "decay"), GONE, r"\['param_groups'\]\[0\]\['decay'\] is missing"),
        (("param_groups", 0, "decay"), "x", r"\['decay'\] is 'x', and here 0\.5"),
    ):
        with pytest.raises(CheckpointError, match=says):
            job.load(spoilt(good, path, value))
    assert Lazy.steps == steps


def test_an_optimizer_of_ones_own_may_keep_what_it_likes() -> None:
    """One thing for large parameters and another for small ones, or matrices in a list."""

    class Picky(optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["factors"] = [torch.eye(length) for length in parameter.shape]
                if parameter.numel() > 5:
                    self.state[parameter]["scale"] = torch.ones(1)

    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (2, 2))]
    optimizer = DistributedSignOptimizer(Picky(parameters), method=ALONE["signsgd"])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(good)
    with pytest.raises(CheckpointError, match=r"\['state'\]\[0\]\['factors'\]"):
        optimizer.load_state_dict(spoilt(good, ("state", 0, "factors"), [torch.eye(3), torch.eye(3)]))
    with pytest.raises(CheckpointError, match=r"\['state'\]\[0\]\['scale'\] is missing"):
        optimizer.load_state_dict(spoilt(good, ("state", 0, "scale"), GONE))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (lambda its: optim.SGD(its, lr=0.1), lambda its: optim.SGD(its, lr=0.1, fused=True)),
        (optim.AdamW, lambda its: optim.AdamW(its, foreach=False)),
        (optim.Adafactor, lambda its: optim.Adafactor(its, eps=(1e-6, 1e-3))),
    ],
)
def test_an_option_that_was_none_and_is_not_now(before: Callable[..., Any], now: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = Job(make=before)
        Job(make=now).load(job.optimizer.state_dict())


def test_a_trial_leaves_no_trace() -> None:
    """Neither hooks nor schedulers hear of it, nor random numbers, nor gradients."""
    job = Job(make=WRAPPED["Adam"])
    heard: list[object] = []
    job.optimizer.wrapped.register_step_pre_hook(lambda *_: heard.append("before"))
    job.optimizer.wrapped.register_step_post_hook(lambda *_: heard.append("after"))
    optim.lr_scheduler.StepLR(job.optimizer.wrapped, 1)
    generator = torch.get_rng_state()
    gradients = [parameter.grad.clone() for parameter in job.parameters]
    good = copy.deepcopy(job.optimizer.state_dict())
    job.load(spoilt(good, ("state", 0), {}))
    job.load(good)
    assert heard == []
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(job.parameters, gradients, strict=True))
    assert_equal(job.optimizer.state_dict(), good)
    assert isinstance(job.optimizer.param_groups[0]["lr"], float)
