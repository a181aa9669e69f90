"""A change of one weight matrix: what methods propose, regularizers trim and the session adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """An update ``left @ right.T`` in the stored weight's own orientation.

    left: (rows, r), right: (columns, r), of one dtype, float32 or float64.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.left), len(self.right)

    def dense(self) -> Tensor:
        """The update as a matrix (rows, columns)."""
        return self.left @ self.right.T

    def contiguous(self) -> LowRank:
        """With factors laid out row by row: the bits of their product can depend on the layout."""
        return LowRank(self.left.contiguous(), self.right.contiguous())

    def smaller(self, dtype: torch.dtype) -> LowRank | Dense:
        """This update, or a matrix of ``dtype`` if that holds fewer numbers (thousands of facts)."""
        (rows, r), columns = self.left.shape, len(self.right)
        return self if r * (rows + columns) <= rows * columns else Dense(self.dense().to(dtype))


@dataclass(frozen=True)
class Dense:
    """An update as a matrix in the stored weight's own orientation, float32 or float64."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns

    def dense(self) -> Tensor:
        return self.matrix

    def contiguous(self) -> Dense:
        return Dense(self.matrix.contiguous())


Update = LowRank | Dense
