"""The second moment C = E[k k^T] of one layer's keys, and the solves that editing needs."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from scipy.sparse.linalg import LinearOperator, onenormest
from torch import Tensor

from harness_rect.errors import UserError
from harness_rect.precision import in_double

log = logging.getLogger(__name__)


#: Multiples of the mean eigenvalue that are tried on the diagonal.
RIDGES = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)


class Factor(NamedTuple):
    """A factorisation of C.

    lower: Cholesky factor, (d_mlp, d_mlp) float64. condition: see :func:`condition_of`. ridge: what was added
    to the diagonal to make C well-conditioned, in mean eigenvalues.
    """

    lower: Tensor
    condition: float
    ridge: float


@dataclass(frozen=True)
class SecondMoment:
    """total: sum of outer products, (d_mlp, d_mlp); count: tokens; origin: the file it came from.

    of_model: fingerprint of the model it was computed for, where the file says it.
    """

    total: Tensor
    count: int
    origin: str
    of_model: str | None = None
    _factors: dict[tuple[torch.device, float], Factor] = field(
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
        return _solve_factored(self._factor(columns.device, ridge).lower, columns)

    @property
    def worst(self) -> Factor | None:
        """Of the factorisations so far the one with the largest condition; None without any."""
        return max(self._factors.values(), key=lambda factor: factor.condition, default=None)

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

    def _factor(self, device: torch.device, ridge: float) -> Factor:
        key = (device, ridge)
        if key not in self._factors:
            c = self.mean.to(device)
            if ridge:
                c = c + ridge * torch.eye(len(c), dtype=c.dtype, device=device)
            self._factors[key] = factor_moment(c, self.total.dtype)
        return self._factors[key]


def factor_moment(moment: Tensor, stored: torch.dtype = torch.float64) -> Factor:
    """Lower Cholesky factor of C in float64.

    A C from fewer tokens than it has rows is singular, and one whose condition exceeds 1 / eps of the dtype
    of its sums is dominated by their rounding. Then the smallest of a few ridges (a multiple of
    the mean eigenvalue on the diagonal) that mends it is added, and the log says which. Any other C is left
    as it is.

    Args:
        moment: C, (d_mlp, d_mlp), symmetric. stored: the dtype of its sums.

    Raises:
        UserError: C is not positive semi-definite.
    """
    c = moment.double()
    scale = float(c.diagonal().mean())
    limit = 1 / torch.finfo(stored).eps
    before, found = None, None
    for ridge in RIDGES:
        damped = c + ridge * scale * torch.eye(len(c), dtype=c.dtype, device=c.device) if ridge else c
        factor, failed = torch.linalg.cholesky_ex(damped)
        condition = math.inf if int(failed) else condition_of(damped, factor)
        before = condition if before is None else before
        if not int(failed):
            found = Factor(factor, condition, ridge)
            if condition <= limit:
                break
    if found is None:
        raise UserError(
            "second moments are not positive semi-definite; the file is damaged or of another model"
        )
    if found.ridge:
        log.warning(
            "second moments of %d dimensions are singular or nearly so; solved with a ridge of %g times the"
            " mean eigenvalue, which makes their condition %.1e instead of %.1e (limit for sums in %s: %.1e):"
            " compute them from more text",
            *(len(c), found.ridge, found.condition, before, str(stored).removeprefix("torch."), limit),
        )
    return found


def condition_of(matrix: Tensor, factor: Tensor) -> float:
    """Condition in the 1-norm of a positive definite matrix that is scaled to a diagonal of ones.

    Rounding of a sum of outer products is relative to the diagonal, and the solution by Cholesky is as exact
    as this condition allows (Demmel 1989). The norm of the inverse is estimated from the factor by Higham's
    method, in a few solves; it is at most too small, rarely by more than a factor of 3.

    Args:
        matrix, factor: (n, n) float64, and its lower Cholesky factor.
    """
    root = matrix.diagonal().sqrt()
    norm = float((matrix.abs() / root).sum(1).div(root).max())

    def solve(column: Any) -> Any:
        x = torch.from_numpy(column).reshape(len(root), -1).to(root)
        return (root[:, None] * _solve_factored(factor, root[:, None] * x)).cpu().numpy()

    size = (len(root), len(root))
    inverse = LinearOperator(size, matvec=solve, rmatvec=solve, matmat=solve, rmatmat=solve, dtype=float)
    return norm * float(onenormest(inverse, t=1))  # t=1 draws nothing at random


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
    return _solve_factored(factor_moment(moment).lower, key.unsqueeze(1)).squeeze(1).float()
