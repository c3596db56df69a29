"""What each step did, written to TensorBoard, Weights & Biases or a CSV file."""

from __future__ import annotations

import csv
import os
from typing import Any

from mpisign.errors import OptionError
from mpisign.optimizer import DistributedSignOptimizer
from mpisign.places import rank
from mpisign.policy import check_integer

__all__ = ["ReportWriter", "write_reports"]


def write_reports(optimizer: DistributedSignOptimizer, to: Any, *, every: int = 1) -> ReportWriter:
    """Write ``optimizer.report.as_dict()`` after its steps, on rank 0. Not collective.

    Args:
        to: the path of a CSV file, which is replaced; a TensorBoard ``SummaryWriter``; or what has W&B's
            ``log(dict, step=...)``, such as ``wandb.init()``. Of other ranks' it is not looked at: None will do.
        every: after each so manyth step.

    Returns:
        What writes; ``close()`` it, or use it as a context.

    Raises:
        OptionError: it is none of these, or ``every`` is below 1.

    Example::

        from mpisign.integrations.reports import write_reports

        with write_reports(optimizer, "steps.csv", every=10):
            train()
    """
    return ReportWriter(optimizer, to, every=every)


class ReportWriter:
    """Made by :func:`write_reports`."""

    def __init__(self, optimizer: DistributedSignOptimizer, to: Any, *, every: int = 1) -> None:
        self._every = check_integer("every", every, 1)
        self._file: Any = None
        self._rows: Any = None
        self._to: Any = None
        if not isinstance(optimizer, DistributedSignOptimizer):
            raise OptionError(f"{type(optimizer).__name__} has no reports: pass the DistributedSignOptimizer")
        if rank() == 0:
            if isinstance(to, (str, os.PathLike)):
                self._file = open(to, "w", newline="")  # noqa: SIM115 - it stays open until close()
            elif callable(getattr(to, "add_scalar", None)) or callable(getattr(to, "log", None)):
                self._to = to
            else:
                raise OptionError(
                    f"to={to!r:.80} is no path of a CSV file, no SummaryWriter with add_scalar(), and nothing with "
                    f"W&B's log()"
                )
        self._steps = 0
        self._last: Any = None
        self._handle: Any = optimizer.register_step_post_hook(self._after) if rank() == 0 else None

    def _after(self, optimizer: Any, args: Any, options: Any) -> None:
        if optimizer.report is self._last:  # a local step, without an exchange
            return
        self._last = optimizer.report
        self._steps += 1
        if self._steps % self._every == 0:
            self.write(optimizer.report.as_dict())

    def write(self, numbers: dict[str, float]) -> None:
        """Write one step's; ``step`` is among them."""
        step = int(numbers["step"])
        if self._file is not None:
            if self._rows is None:
                self._rows = csv.DictWriter(self._file, numbers)
                self._rows.writeheader()
            self._rows.writerow(numbers)
            self._file.flush()  # a job may be killed
            return
        named = {f"mpisign/{name}": value for name, value in numbers.items() if name != "step"}
        if hasattr(self._to, "add_scalar"):
            for name, value in named.items():
                self._to.add_scalar(name, value, step)
        else:
            self._to.log(named, step=step)

    def close(self) -> None:
        """Write no more. A SummaryWriter or run that was given stays open: it is its owner's."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
