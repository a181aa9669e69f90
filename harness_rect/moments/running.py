"""Mean and standard deviation of rows that arrive batch by batch (Welford; Chan et al.'s parallel update)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness_rect.precision import in_double


@dataclass(frozen=True)
class Running:
    """count: () rows seen; mean: (d,); squares: (d,) sums of squared deviations from it; all float64."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Running:
        zeros = in_double(torch.zeros(width, device=device))
        return cls(zeros.new_zeros(()), zeros, zeros)

    def updated(self, rows: Tensor) -> Running:
        """Including ``rows`` (n, d), n >= 1, on the same device."""
        rows = in_double(rows)
        total, delta = self.count + len(rows), rows.mean(0) - self.mean
        squares = (rows - rows.mean(0)).square().sum(0) + delta.square() * self.count * len(rows) / total
        return Running(total, self.mean + delta * len(rows) / total, self.squares + squares)

    @property
    def deviation(self) -> Tensor:
        """(d,) standard deviation, with n - 1; zero before there are two rows."""
        return (self.squares / (self.count - 1).clamp_min(1)).sqrt()
