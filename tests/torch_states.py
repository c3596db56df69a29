"""What a program may have told torch before it calls the library: none of it may change a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

State = Callable[[], AbstractContextManager[object]]


@contextmanager
def setting(get: Callable[[], object], put: Callable[[object], object], value: object) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype(dtype: torch.dtype) -> State:
    return lambda: setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def default_device(name: str) -> State:
    return lambda: setting(lambda: None, torch.set_default_device, name)


# On "meta" a tensor has no elements, so that whatever forgets to say its device fails.
STATES: dict[str, State] = {
    "set_default_device": default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "float64": default_dtype(torch.float64),
    "bfloat16": default_dtype(torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 3),
    "seed": lambda: setting(torch.initial_seed, torch.manual_seed, 7),
}


@contextmanager
def all_of(*names: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(STATES[name]())
        yield


MANY: dict[str, State] = {
    "many": lambda: all_of("set_default_device", "bfloat16", "deterministic", "autocast", "threads", "seed"),
    "many, in inference_mode": lambda: all_of("device context", "float64", "threads", "anomalies", "inference_mode"),
}
"""For what takes long."""
