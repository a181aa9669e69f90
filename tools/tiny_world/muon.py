"""Muon: momentum whose matrices are orthogonalised before the step (Jordan et al. 2024), in float32.

In one short trial here it had recalled more facts after 200 steps than AdamW. torch.optim.Muon computes in
bfloat16, which is slow on a CPU, and takes one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon:
    """For square or wide blocks: ``blocks`` are (parameter, number of equal parts along its columns)."""

    def __init__(
        self, blocks: Sequence[tuple[nn.Parameter, int]], weight_decay: float, momentum: float = 0.95
    ) -> None:
        self.blocks = list(blocks)
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.buffers = [torch.zeros_like(parameter) for parameter, _ in self.blocks]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        parts: list[Tensor] = []
        for (parameter, count), buffer in zip(self.blocks, self.buffers, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            buffer.lerp_(gradient, 1 - self.momentum)
            look_ahead = gradient.lerp(buffer, self.momentum)
            wide = look_ahead if look_ahead.shape[0] <= look_ahead.shape[1] else look_ahead.T
            parts += wide.chunk(count, dim=1)
        directions = iter(_orthogonalised(parts))
        for parameter, count in self.blocks:
            wide = torch.cat([next(directions) for _ in range(count)], dim=1)
            direction = wide if wide.shape == parameter.shape else wide.T
            parameter.mul_(1 - rate * self.weight_decay).sub_(direction, alpha=rate)


def _orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each near U V^T of its singular value decomposition, scaled to the step size usual with AdamW."""
    a, b, c = _COEFFICIENTS
    results = list(matrices)
    for shape in {m.shape for m in matrices}:
        where = [i for i, m in enumerate(matrices) if m.shape == shape]
        x = torch.stack([matrices[i] for i in where])
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        for i, result in zip(where, x * (0.2 * max(shape) ** 0.5), strict=True):
            results[i] = result
    return results
