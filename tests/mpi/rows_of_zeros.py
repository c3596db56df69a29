"""Parameters whose gradients have rows of zeros, on every rank others."""

from __future__ import annotations

import torch

from . import ballots

# Rows of 64 and of 70 elements, which share words; rows of 63, which are one; vectors, a scalar, nothing.
SHAPES = ((9, 64), (6, 7, 10), (5, 63), (33,), (), (0,), (40, 100), (1,))


def gradients_with_zero_rows(tensors: list[torch.nn.Parameter], *seeds: int) -> list[torch.Tensor]:
    """Small integers, of which a fifth are zero; and whole rows, and whole parameters."""
    random = ballots.generator(*seeds)
    drawn = ballots.draw(tensors, random)
    for gradient in drawn:
        if torch.rand((), generator=random) < 0.3:
            gradient.zero_()
        elif gradient.dim() > 1:
            gradient[torch.rand(gradient.shape[0], generator=random) < 0.4] = 0
    return drawn
