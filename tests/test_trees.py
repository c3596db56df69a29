"""mpisign.trees: optimizers' states as JSON and tensors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from mpisign.trees import dtype_of, flatten, name_of, unflatten


def there_and_back(tree: Any) -> Any:
    tensors: list[torch.Tensor] = []
    return unflatten(json.loads(json.dumps(flatten(tree, tensors))), tensors)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_states_of_torchs_optimizers(kind: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    back = there_and_back(state)
    assert back["param_groups"] == state["param_groups"]
    assert back["state"].keys() == state["state"].keys()
    for place, values in state["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(back["state"][place][key]), torch.as_tensor(value))


def test_types_come_back() -> None:
    tree = {0: (1, 2.5, None), "a": [True, "text", ("b",)], 3: {"inner": {}}, "dtype": torch.bfloat16, "e": []}
    back = there_and_back(tree)
    assert back == tree
    assert [type(key) for key in back] == [int, str, int, str, str]
    assert type(back["a"][0]) is bool


def test_numbers_come_back_exactly() -> None:
    tree = {
        "lr": 0.1 + 0.2,
        "big": 2**80,
        "inf": math.inf,
        "np": np.float64(1 / 3),
        "i": np.int64(7),
        "f": np.float32(0.1),
    }
    back = there_and_back(tree)
    assert back == {**tree, "f": float(np.float32(0.1))}
    assert math.isnan(there_and_back({"nan": math.nan})["nan"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_dtypes_by_name(dtype: torch.dtype) -> None:
    assert dtype_of(name_of(dtype)) == dtype


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match=r"state\['param_groups'\]\[0\]\['x'\] is a builtins.object"):
        flatten({"param_groups": [{"x": object()}]}, [])
    with pytest.raises(TypeError, match=r"state has the key 1.5"):
        flatten({1.5: 0}, [])


@pytest.mark.parametrize(
    "tree",
    [
        *([], ["tensor"], ["tensor", 3], ["tensor", -1], ["tensor", True], ["tensor", "0"]),
        *(["code", "print()"], [1, 2, 3], ["dtype", "float33"], [["dict", []], 1]),
        *(["dict", [["a"]]], ["dict", [[[], 1]]], ["dict", 3], ["list", 3]),
    ],
    ids=str,
)
def test_what_is_no_tree_is_an_error(tree: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError)):
        unflatten(tree, [torch.zeros(1)])
