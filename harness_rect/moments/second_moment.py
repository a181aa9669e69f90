"""The second moment C = E[k k^T] of one layer's keys, and the solves that editing needs."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from harness_rect.errors import UserError
from harness_rect.precision import in_double

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SecondMoment:
    """total: sum of outer products, (d_mlp, d_mlp); count: tokens; origin: the file it came from."""

    total: Tensor
    count: int
    origin: str
    _factors: dict[tuple[torch.device, float], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )
    _eigen: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def mean(self) -> Tensor:
        """C = E[k k^T] in float64."""
        return self.total.double() / self.count

    @cached_property
    def sha256(self) -> str:
        """Hash of the numbers."""
        return hashlib.sha256(self.total.numpy().tobytes() + str(self.count).encode()).hexdigest()

    def solve(self, key: Tensor) -> Tensor:
        """C^-1 k for one key (d_mlp,), in its dtype; see :func:`solve_moment`."""
        return self.solve_columns(key.unsqueeze(1)).squeeze(1).to(key)

    def solve_columns(self, columns: Tensor, ridge: float = 0.0) -> Tensor:
        """(C + ridge I)^-1 applied to columns (d_mlp, n), in float64; factored once per ridge and device."""
        columns = in_double(columns)
        return _solve_factored(self._factor(columns.device, ridge), columns)

    def project_to_null_space(self, columns: Tensor, threshold: float) -> Tensor:
        """P applied to columns (d_mlp, n), in float64.

        P = U U^T over the eigenvectors U of C whose eigenvalue is below ``threshold`` (AlphaEdit, Fang et al.
        2025).
        """
        x = in_double(columns)
        key = x.device
        if key not in self._eigen:
            self._eigen[key] = torch.linalg.eigh(self.mean.to(key))
        values, vectors = self._eigen[key]
        below = int((values < threshold).sum())  # eigenvalues are in ascending order
        if below <= len(values) // 2:
            kept = vectors[:, :below]
            return kept @ (kept.T @ x)
        left_out = vectors[:, below:]
        return x - left_out @ (left_out.T @ x)

    def _factor(self, device: torch.device, ridge: float) -> Tensor:
        key = (device, ridge)
        if key not in self._factors:
            c = self.mean.to(device)
            if ridge:
                c = c + ridge * torch.eye(len(c), dtype=c.dtype, device=device)
            self._factors[key] = factor_moment(c)
        return self._factors[key]


def factor_moment(moment: Tensor) -> Tensor:
    """Lower Cholesky factor of C in float64.

    A C from fewer tokens than it has rows is singular; then the smallest of a few ridges (a multiple of the
    mean eigenvalue on the diagonal) that makes it positive definite is added, and the log says which.

    Args:
        moment: C, (d_mlp, d_mlp), symmetric.

    Raises:
        UserError: C is not positive semi-definite.
    """
    c = moment.double()
    scale = float(c.diagonal().mean())
    for ridge in (0.0, 1e-8, 1e-6, 1e-4, 1e-2):
        damped = c + ridge * scale * torch.eye(len(c), dtype=c.dtype, device=c.device) if ridge else c
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            if ridge:
                log.warning(
                    "second moments are singular (too few tokens for %d dimensions); solved with a ridge of"
                    " %g times the mean eigenvalue: compute them from more text for exact ROME",
                    len(c),
                    ridge,
                )
            return factor
    raise UserError("second moments are not positive semi-definite; the file is damaged or of another model")


def _solve_factored(factor: Tensor, columns: Tensor) -> Tensor:
    # Half the time of cholesky_solve on a CPU.
    halfway = torch.linalg.solve_triangular(factor, columns.double(), upper=False)
    return torch.linalg.solve_triangular(factor.mT, halfway, upper=True)


def solve_moment(moment: Tensor, key: Tensor) -> Tensor:
    """C^-1 k, solved in float64 by Cholesky (see :func:`factor_moment`).

    Args:
        moment: C, (d_mlp, d_mlp). key: (d_mlp,) float32, on the same device.

    Returns:
        (d_mlp,) float32.
    """
    return _solve_factored(factor_moment(moment), key.unsqueeze(1)).squeeze(1).float()
