"""Numbers that a device finds out and this rank must know: all of a moment come to the host with one wait."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from mpisign.backends import Count, Flag

__all__ = ["Answers"]


class Answers:
    """On a GPU they are copied to pinned memory on the current stream, where what is enqueued next delays nobody.

    Each question has a key, and one answer until it is asked again.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._pinned = cuda
        self._here: dict[Hashable, torch.Tensor] = {}
        self._copied = torch.cuda.Event() if cuda else None

    def ask(self, key: Hashable, answer: Count | Flag) -> None:
        """Begin to bring a 0-d tensor to the host; a plain number is there."""
        if not isinstance(answer, torch.Tensor):
            answer = torch.tensor(answer, device="cpu")
        if key not in self._here or self._here[key].dtype != answer.dtype:
            self._here[key] = torch.empty((), dtype=answer.dtype, device="cpu", pin_memory=self._pinned)
        self._here[key].copy_(answer, non_blocking=True)

    def asked(self) -> None:
        """This is the moment: what was enqueued by now is waited for."""
        if self._copied is not None:
            self._copied.record()

    def ready(self) -> bool:
        """Whether they are here, without waiting."""
        return self._copied is None or self._copied.query()

    def told(self, key: Hashable) -> int:
        """The answer; the first to be told after :meth:`asked` waits."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._here[key])
