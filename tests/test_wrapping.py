"""mpisign.wrapping: which optimizers are wrapped, what their parameters are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import parts
import pytest
import torch
from torch import nn, optim

import mpisign
from mpisign import DistributedSignOptimizer, OptionError, wrapping
from mpisign.policy import check_integer

Named = Iterable[tuple[str, torch.Tensor]]


def sgd(*groups: list[nn.Parameter]) -> optim.SGD:
    return optim.SGD([{"params": group} for group in groups], lr=0.1)


# ------------------------------------------------------------------------------------------- what may be wrapped


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda params: "sgd", "str is not a torch.optim.Optimizer"),
        (lambda params: nn.Linear(1, 1), "Linear is not a torch.optim.Optimizer"),
        (lambda params: optim.SGD, "type is not a torch.optim.Optimizer"),
        (optim.LBFGS, "LBFGS cannot be wrapped.*use SGD"),
        (optim.SparseAdam, "SparseAdam cannot be wrapped.*sparse=False"),
    ],
    ids=["text", "model", "class", "LBFGS", "SparseAdam"],
)
def test_what_cannot_be_wrapped(make: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        wrapping.check_wrappable(make(parts.parameters((3,))))


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad, optim.Rprop, optim.ASGD])
def test_what_can_be_wrapped(kind: Any) -> None:
    wrapping.check_wrappable(kind(parts.parameters((3,)), lr=0.1))


@pytest.mark.parametrize("kind", wrapping.ADAPTIVE, ids=lambda kind: kind.__name__)
def test_optimizers_that_divide_by_a_magnitude_are_warned_of(kind: Any) -> None:
    with pytest.warns(UserWarning, match=rf"^{kind.__name__} divides each coordinate.*mpisign\.lion\(\)"):
        wrapping.warn_if_adaptive(kind(parts.parameters((3, 3))))


def test_so_are_kinds_of_them_and_no_others(recwarn: pytest.WarningsRecorder) -> None:
    class Mine(optim.Adam):
        pass

    wrapping.warn_if_adaptive(Mine(parts.parameters((3,))))
    assert str(recwarn.pop(UserWarning).message).startswith("Mine divides")
    for kind in (optim.SGD, optim.ASGD, optim.Rprop):
        wrapping.warn_if_adaptive(kind(parts.parameters((3,)), lr=0.1))
    assert not recwarn.list


@pytest.mark.usefixtures("world")
@parts.each_method_that(parts.runs_alone)
def test_only_votes_are_too_small_for_adam(name: str, recwarn: pytest.WarningsRecorder) -> None:
    method = parts.methods_for(1)[name]
    DistributedSignOptimizer(optim.Adam(parts.parameters((3,))), method=method)
    assert [str(w.message).split()[0] for w in recwarn.list] == ["Adam"] * method.elects


@pytest.mark.usefixtures("world")
def test_the_warning_points_at_the_users_line() -> None:
    with pytest.warns(UserWarning, match="divides") as caught:
        DistributedSignOptimizer(optim.Adam(parts.parameters((3,))))
    assert caught[0].filename == __file__


def test_a_method_that_was_told_no_epoch_is_named() -> None:
    with pytest.warns(UserWarning, match=r"^dgc changes with the epoch.*set_epoch\(epoch\) on every rank"):
        wrapping.warn_of_epochs(mpisign.dgc())


# ------------------------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize("epoch", [3, np.int64(3), np.uint8(3), torch.tensor(3)], ids=lambda it: type(it).__name__)
def test_epochs_are_whole_numbers_of_any_kind(epoch: Any) -> None:
    number = check_integer("epoch", epoch, 0)
    assert (type(number), number) == (int, 3)


@pytest.mark.parametrize("epoch", [-1, 1.0, "1", None, np.float32(1), torch.tensor(-2), torch.tensor([1, 2])], ids=str)
def test_other_epochs_are_refused(epoch: Any) -> None:
    with pytest.raises(OptionError, match=r"epoch=.* must be an int of 0 or more"):
        check_integer("epoch", epoch, 0)


def test_the_first_epoch_is_0() -> None:
    assert check_integer("epoch", 0, 0) == 0


# ------------------------------------------------------------------------------------------------ frozen, scaled


def test_frozen_parameters_lose_their_gradients_and_others_do_not() -> None:
    tensors = parts.parameters((3,), (2,), (1,))
    parts.give(tensors, [torch.ones(3), torch.ones(2), None])
    tensors[1].requires_grad_(False)
    kept = tensors[0].grad
    wrapping.drop_frozen(tensors)
    assert [t.grad is None for t in tensors] == [False, True, True]
    assert tensors[0].grad is kept


# --------------------------------------------------------------------------------------------------------- names


def test_without_names_a_parameter_is_called_by_its_place() -> None:
    a, b, c = parts.parameters((3,), (2,), (1,))
    optimizer = sgd([a, b], [c])
    expected = {a: "group0.param0", b: "group0.param1", c: "group1.param0"}
    assert wrapping.default_names(optimizer.param_groups) == expected
    assert wrapping.names_of(optimizer, None) == expected


def test_names_that_torch_was_given_are_used() -> None:
    (a, b), (c,) = parts.parameters((3,), (2,)), parts.parameters((1,))
    optimizer = optim.SGD([("first", a), ("second", b)], lr=0.1)
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch takes no names")
    assert wrapping.names_of(optimizer, None) == {a: "first", b: "second"}
    groups = [*optimizer.param_groups, {"params": [c]}]
    assert wrapping.default_names(groups) == {a: "first", b: "second", c: "group1.param0"}


def test_names_are_of_what_the_optimizer_holds() -> None:
    """Names of frozen parameters that it does not hold are no harm."""
    a, b, frozen = parts.parameters((3,), (2,), (1,))
    frozen.requires_grad_(False)
    given = [("a", a), ("frozen", frozen), ("b", b)]
    assert wrapping.names_of(sgd([b, a]), iter(given)) == {a: "a", b: "b"}
    assert wrapping.names_of(sgd([b, a, frozen]), given) == {a: "a", b: "b", frozen: "frozen"}


def test_a_model_names_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    names = wrapping.names_of(optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    assert list(names.values()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    "entry",
    ["weight", ("weight",), ("weight", 1), (1, torch.zeros(1)), ["weight", torch.zeros(1)], ("a", torch.zeros(1), 2)],
    ids=["text", "one", "number", "name is a number", "list", "three"],
)
def test_names_come_in_pairs(entry: Any) -> None:
    with pytest.raises(OptionError, match=r"pass model.named_parameters\(\)"):
        wrapping.names_of(sgd(parts.parameters((3,))), [entry])


def test_parameters_alone_are_no_names() -> None:
    tensors = parts.parameters((2, 2))  # which unpacks into two
    with pytest.raises(OptionError, match=r"pass model.named_parameters\(\)"):
        wrapping.names_of(sgd(tensors), tensors)  # type: ignore[arg-type]


def test_a_name_is_of_one_parameter_and_a_parameter_has_one_name() -> None:
    a, b = parts.parameters((3,), (2,))
    with pytest.raises(OptionError, match="one parameter is named twice, 'x' and 'y'"):
        wrapping.names_of(sgd([a, b]), [("x", a), ("y", a)])
    with pytest.raises(OptionError, match="two parameters are named 'x'"):
        wrapping.names_of(sgd([a, b]), [("x", a), ("x", b)])


def numbered(tensors: list[nn.Parameter]) -> Named:
    return [(f"w{i}", tensor) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize(
    ("count", "says"),
    [(1, "'w0'"), (3, "'w0', 'w1', 'w2'"), (4, "'w0', 'w1', 'w2' and 1 more"), (10, "'w0', 'w1', 'w2' and 7 more")],
)
def test_a_named_parameter_must_be_held(count: int, says: str) -> None:
    strangers = parts.parameters(*[(1,)] * count)
    (held,) = parts.parameters((3,))
    with pytest.raises(OptionError, match=f"named_parameters has {says}, which the optimizer does not"):
        wrapping.names_of(sgd([held]), [*numbered(strangers), ("held", held)])


@pytest.mark.parametrize(
    ("count", "says"),
    [(1, "'group0.param1'"), (5, "'group0.param1', 'group0.param2', 'group0.param3' and 2 more")],
)
def test_a_held_parameter_must_be_named(count: int, says: str) -> None:
    named, *nameless = parts.parameters(*[(1,)] * (1 + count))
    with pytest.raises(OptionError, match=rf"the optimizer has {says} \(group and place\)"):
        wrapping.names_of(sgd([named, *nameless]), [("named", named)])


def test_also_a_frozen_one() -> None:
    a, frozen = parts.parameters((3,), (2,))
    frozen.requires_grad_(False)
    with pytest.raises(OptionError, match=r"'group0\.param1'"):
        wrapping.names_of(sgd([a, frozen]), [("a", a)])
