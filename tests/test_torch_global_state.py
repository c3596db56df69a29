"""What the library makes says where it lies, and its step leaves autograd and inference mode, as the closure does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import mpisign

ROOT = Path(mpisign.__file__).parent
NAMES = {maker.__name__ for maker in _device_constructors()} | {"Generator"}


def forgotten(tree: ast.AST) -> list[int]:
    """The lines in which torch is asked for a tensor that lies wherever a program has last said."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    made = [call for call in calls if ast.unparse(call.func.value) == "torch" and call.func.attr in NAMES]
    told = {call for call in made if any(word.arg == "device" for word in call.keywords)}
    told |= {call for call in made if call.func.attr == "Generator" and call.args}
    return [call.lineno for call in made if call not in told]


def test_devices_are_said() -> None:
    assert {"zeros", "empty", "tensor", "as_tensor", "arange", "full", "randn", "empty_strided"} <= NAMES
    assert forgotten(ast.parse("a = torch.zeros(3)\nb = torch.zeros(3, device=c)\nd = torch.Generator()")) == [1, 3]
    found = {str(path): forgotten(ast.parse(path.read_text())) for path in ROOT.rglob("*.py")}
    assert len(found) > 50
    assert not {path: lines for path, lines in found.items() if lines}


def test_a_closure_in_inference_mode(world: None) -> None:
    """It is what computes gradients, so it runs outside; autocast around a step is its affair."""
    model = torch.nn.Linear(4, 4)
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5))
    inputs = torch.ones(1, 4)
    types = []

    def closure() -> torch.Tensor:
        out = model(inputs)
        types.append(out.dtype)
        out.float().sum().backward()
        return out.sum()

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure)
    optimizer.step(closure)  # momentum that was made in inference mode could not be changed here
    assert types == [torch.bfloat16, torch.float32]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("method", [mpisign.signum(), mpisign.mean(), mpisign.monna(0)], ids=str)
def test_gradients_with_a_graph(world: None, method: mpisign.Method) -> None:
    """``backward(create_graph=True)`` leaves gradients that are no leaves."""
    parameter = torch.nn.Parameter(torch.ones(3, 5).t())
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1), method=method)
    for _ in range(2):
        optimizer.zero_grad()
        (parameter**3).sum().backward(create_graph=True)
        optimizer.step()
    assert parameter.max() < 1.0
    assert parameter.is_leaf


def test_the_global_state_is_left_as_it_was(world: None) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = mpisign.DistributedSignOptimizer(torch.optim.SGD([parameter], lr=0.1))
    parameter.grad = torch.ones(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.is_grad_enabled()
