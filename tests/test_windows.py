"""mpisign.windows at one rank: what the model holds within a window, and what a state of one brings back."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from windowed import backward, batch, layers, local, train, values

import mpisign
from mpisign import CheckpointError, DistributedSignOptimizer, SynchronizationError
from mpisign.windows import Windows

pytestmark = pytest.mark.usefixtures("world")

# ------------------------------------------------------------------------------------------ what the model holds


def test_the_common_parameters_are_shown_and_taken_away_again() -> None:
    model = layers()
    optimizer = local(model)
    initial = values(model)
    train(model, optimizer, range(1))
    mine = values(model)
    with optimizer.common_parameters():
        assert all(map(torch.equal, values(model), initial))
        with optimizer.common_parameters():
            assert all(map(torch.equal, values(model), initial))
        backward(model, 1)
        with pytest.raises(SynchronizationError, match="leave it first"):
            optimizer.step()
    assert all(map(torch.equal, values(model), mine))
    with pytest.raises(ZeroDivisionError), optimizer.common_parameters():
        raise ZeroDivisionError
    assert all(map(torch.equal, values(model), mine))


def test_a_state_of_the_common_parameters_begins_a_window() -> None:
    model = layers()
    optimizer = local(model)
    train(model, optimizer, range(4))
    with optimizer.common_parameters():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert optimizer.state_dict()["mpisign"]["local_steps"]["position"] == 1
    other = layers(1)
    resumed = local(other)
    for it, state in zip((other, resumed), saved, strict=True):
        it.load_state_dict(state)
    train(other, resumed, range(2))
    assert resumed.report is None
    train(other, resumed, range(2, 3))
    assert resumed.report is not None


def test_without_every_all_parameters_are_common() -> None:
    model = layers()
    optimizer = DistributedSignOptimizer(SGD(model.parameters(), lr=0.1))
    train(model, optimizer, range(1))
    mine = values(model)
    with optimizer.common_parameters():
        assert all(map(torch.equal, values(model), mine))
    assert optimizer.outer is None


def test_what_is_loaded_between_windows_is_common() -> None:
    """Into the model alone, before the first step and later; within a window it is a part of the difference."""
    model, other = layers(), layers(1)
    optimizer = local(model, 2)
    for _ in range(2):
        model.load_state_dict(other.state_dict())
        train(model, optimizer, range(1))
        with optimizer.common_parameters():
            assert all(map(torch.equal, values(model), values(other)))
        train(model, optimizer, range(1, 2))
    before = values(model)
    train(model, optimizer, range(1))
    model.load_state_dict(other.state_dict())
    with optimizer.common_parameters():
        assert all(map(torch.equal, values(model), before))


def test_what_is_loaded_between_windows_is_common_at_once() -> None:
    """To whoever evaluates or saves before the next step; a window that has ended undecided keeps what is common."""
    model, other = layers(), layers(1)
    optimizer = local(model, 2)
    train(model, optimizer, range(2))
    model.load_state_dict(other.state_dict())
    with optimizer.common_parameters():
        assert all(map(torch.equal, values(model), values(other)))
        inside = optimizer.state_dict()["mpisign"]["local_steps"]["common"]
    for common in (inside, optimizer.state_dict()["mpisign"]["local_steps"]["common"]):
        assert all(torch.equal(common[place], value) for place, value in enumerate(values(other)))
    optimizer = local(model, 2, delay=1)
    train(model, optimizer, range(2))
    with optimizer.common_parameters():
        assert all(map(torch.equal, values(model), values(other)))


@pytest.mark.parametrize("late", [False, True])
def test_sixteen_bits_gather_what_is_less_than_their_precision(late: bool) -> None:
    """What rounding takes from the common parameters is no motion: neither where there is none, nor beside some."""
    tensor = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    windows = Windows([tensor])
    (common,) = windows.common([tensor])
    for _ in range(8):
        windows.begin()
        tensor.data[1] -= 2.0**-6
        windows.stepped([tensor])
        if late:
            windows.part()
            windows.begin()
            windows.stepped([tensor])
            windows.differ_as_sent()
        else:
            windows.differ()
        assert common.grad is not None
        assert common.grad.tolist() == [0.0, 2.0**-6]
        common.data -= 2.0**-11  # another rank has moved
        windows.meet() if late else windows.end()
        assert tensor.tolist() == common.detach().to(torch.bfloat16).tolist()
    assert tensor.tolist() == common.tolist() == [1 - 2.0**-8, 1 - 2.0**-8]


@pytest.mark.parametrize("size", [0.5, 1.0, 0.998])
def test_sixteen_bits_keep_what_is_done_after_a_windows_end(size: float) -> None:
    tensor = nn.Parameter(torch.full((1,), size, dtype=torch.bfloat16))
    windows = Windows([tensor])
    (common,) = windows.common([tensor])
    windows.begin()
    windows.stepped([tensor])
    windows.part()
    windows.begin()
    tensor.data -= 2.0**-6
    windows.stepped([tensor])
    common.data -= 0.3001
    windows.meet()
    windows.differ()
    assert common.grad is not None
    assert common.grad.item() == 2.0**-6


def test_parameters_that_move_to_another_type() -> None:
    model = layers()
    optimizer = local(model, 2)
    train(model, optimizer, range(2))
    model.float()
    for at in range(2):
        model.zero_grad()
        model(batch(at).float()).square().mean().backward()
        optimizer.wrapped.state.clear()
        optimizer.step()
    assert {p.dtype for p in optimizer.outer.param_groups[0]["params"]} == {torch.float32}
    assert optimizer.report.step == 1


def test_channels_last_and_transposed_weights() -> None:
    tensors = [
        nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, 7).t()),
        nn.Parameter(torch.randn(6, 4)[:, ::2]),
    ]
    plain = [nn.Parameter(t.detach().clone()) for t in tensors]
    optimizer, sgd = (
        DistributedSignOptimizer(SGD(tensors, lr=0.1), every=2, method=mpisign.mean()),
        SGD(plain, lr=0.1),
    )
    for _ in range(4):
        for ours, theirs in zip(tensors, plain, strict=True):
            ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(theirs)
        optimizer.step()
        sgd.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tensors, plain, strict=True))


def test_frozen_parameters_cost_no_memory() -> None:
    """As most of a model's do that is fine-tuned by adapters; one that is thawed has a common value from then on."""
    model = layers()
    model[0].requires_grad_(False)
    optimizer = local(model, 2)
    train(model, optimizer, range(3))
    commons = optimizer.outer.param_groups[0]["params"]
    assert [c.numel() for c in commons] == [0, 0, 16, 2]
    mpisign.check_consistency(model, optimizer)
    model[0].requires_grad_(True)
    train(model, optimizer, range(3, 6))
    assert [c.numel() for c in commons] == [48, 8, 16, 2]
    assert torch.allclose(commons[0], model[0].weight)
    other = layers(1)
    other[0].requires_grad_(False)
    resumed = local(other, 2)
    resumed.load_state_dict(optimizer.state_dict())
    train(other, resumed, range(2))
    assert [c.numel() for c in resumed.outer.param_groups[0]["params"]] == [0, 0, 16, 2]


def test_differences_cost_no_memory_between_exchanges() -> None:
    model = layers()
    optimizer = local(model, 2)
    train(model, optimizer, range(3))
    assert all(c.grad is None for c in optimizer.outer.param_groups[0]["params"])


# --------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_state_goes_on_bit_for_bit(steps: int, model_first: bool) -> None:
    def build(seed: int = 0) -> tuple[nn.Sequential, DistributedSignOptimizer]:
        model = layers(seed)
        method = mpisign.double_squeeze()
        return model, local(model, method=method, outer=lambda its: SGD(its, lr=0.7, momentum=0.9))

    model, optimizer = build()
    train(model, optimizer, range(steps))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(steps, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = build(1)
    for name, it in (("model", other), ("optimizer", resumed))[:: 1 if model_first else -1]:
        it.load_state_dict(saved[name])
    train(other, resumed, range(steps, 8))
    assert all(map(torch.equal, values(other), values(model)))
    assert resumed.report.step == optimizer.report.step


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(by: str) -> None:
    model = layers()
    optimizer = local(model, method=mpisign.scaled_vote())
    train(model, optimizer, range(4))
    if by == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    for _ in range(2):
        train(model, optimizer, range(4, 8))
        train(twin, other, range(4, 8))
        assert all(map(torch.equal, values(twin), values(model)))


def test_a_state_without_windows_begins_one() -> None:
    """A plain optimizer's, and one of votes on gradients, whose memory is in other units."""
    model = layers()
    plain = AdamW(model.parameters(), lr=0.01)
    train(model, plain, range(2))
    optimizer = local(model, method=mpisign.scaled_vote(0.9))
    with pytest.warns(UserWarning, match="starts fresh"):
        optimizer.load_state_dict(plain.state_dict())
    train(model, optimizer, range(3))
    assert int(optimizer.state[model[0].weight]["step"]) == 5
    voting = DistributedSignOptimizer(AdamW(model.parameters(), lr=0.01), method=mpisign.scaled_vote(0.9))
    with pytest.warns(UserWarning, match="starts fresh"):
        voting.load_state_dict(optimizer.state_dict())


def spoilt(state: dict[str, Any], where: str) -> dict[str, Any]:
    its = state["mpisign"]["local_steps"]
    wrong: dict[str, Any] = {
        "position": -1,
        "touched": [99],
        "trained": "all",
        "common": {0: torch.zeros(3)},
        "sent": {0: torch.zeros(3)},
        "moved": [-1],
        "outer": [],
    }
    its[where] = wrong[where]
    return state


@pytest.mark.parametrize("where", ["position", "touched", "trained", "common", "sent", "moved", "outer"])
def test_a_damaged_state_changes_nothing(where: str) -> None:
    model = layers()
    optimizer = local(model)
    train(model, optimizer, range(4))
    good = copy.deepcopy(optimizer.state_dict())
    other = layers(1)
    resumed = local(other)
    train(other, resumed, range(1))
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(CheckpointError, match=rf"rank 0: .*'{where}'"):
        resumed.load_state_dict(spoilt(good, where))
    after = resumed.state_dict()
    assert str(after) == str(before)


def test_a_window_that_is_decided_late() -> None:
    """What moved after the end of a window is added to what is decided on it; where nothing moved, all is common."""
    tensors = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.full((1,), 0.1))]
    windows = Windows(tensors)
    common = windows.common(tensors)
    windows.begin()
    tensors[0].data += 1.0
    windows.stepped(tensors[:1])
    windows.part()
    assert (windows.position, windows.is_undecided, windows.is_apart) == (0, True, True)
    windows.begin()
    tensors[0].data[0] += 0.25
    windows.stepped(tensors[:1])
    windows.differ_as_sent()
    assert common[0].grad is not None
    assert common[0].grad.tolist() == [-1.0, -1.0]
    assert common[1].grad is None
    common[0].data += 3.0  # as an outer optimizer does
    common[1].data += 1.0
    tensors[0].data[1] = float("nan")
    windows.meet()
    assert tensors[0].tolist() == [3.25, 3.0]
    assert tensors[1].item() == common[1].item()
    assert common[0].grad is None
    assert (windows.position, windows.is_undecided) == (1, False)


def test_what_was_sent_follows_the_parameters() -> None:
    tensors = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    windows = Windows(tensors)
    windows.begin()
    windows.stepped(tensors)
    windows.part()
    tensors[1].data = torch.ones(5)
    windows.follow(tensors)
    assert set(windows.state_dict()["sent"]) == {0}
    windows.follow(tensors[1:])
    assert not windows.is_undecided


def test_windows_take_only_what_they_have_given() -> None:
    tensors = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    windows = Windows(tensors)
    windows.begin()
    windows.stepped(tensors[1:])
    state = windows.checked(windows.state_dict(), "rank 0")
    assert (state["position"], state["touched"], state["trained"]) == (1, [1], [0, 1])
    assert [tuple(value.shape) for value in state["common"].values()] == [(2, 3), (4,)]
    with pytest.raises(CheckpointError, match="and not a dict"):
        windows.checked(None, "rank 0")
