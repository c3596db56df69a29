"""The shapes of a known model."""

from __future__ import annotations


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of its parameters, as in He et al. 2015, Table 1."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        outputs = 4 * width
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            if block == 0:
                convolutions.append((outputs, inputs, 1, 1))
            for convolution in convolutions:
                shapes += [convolution, convolution[:1], convolution[:1]]
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]
