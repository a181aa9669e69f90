"""The second moment of one layer: its file format and the one solve editing needs.

The format is the public one of ROME's statistics (``<module>_<dtype>_mom2_<n>.npz``): ``mom2.mom2`` is the
SUM of outer products (d_mlp, d_mlp), ``mom2.count`` the number of tokens, ``sample_size`` the number of
documents. Ours adds ``fingerprint``, a JSON text saying what was sampled. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness_rect.errors import UserError
from harness_rect.io.files import written_whole
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
        """C^-1 k as :func:`solve_moment`, C being factored once for each device."""
        return self.solve_columns(key.unsqueeze(1)).squeeze(1).to(key)

    def solve_columns(self, columns: Tensor, ridge: float = 0.0) -> Tensor:
        """(C + ridge I)^-1 applied to columns (d_mlp, n), in float64; factored once for each ridge and
        device.
        """
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
        below = int((values < threshold).sum())  # eigenvalues come in rising order
        if below <= len(values) // 2:
            kept = vectors[:, :below]
            return kept @ (kept.T @ x)
        left_out = vectors[:, below:]
        return x - left_out @ (left_out.T @ x)

    def _factor(self, device: torch.device, ridge: float = 0.0) -> Tensor:
        key = (device, ridge)
        if key not in self._factors:
            c = self.mean.to(device)
            if ridge:
                c = c + ridge * torch.eye(len(c), dtype=c.dtype, device=device)
            self._factors[key] = factor_moment(c)
        return self._factors[key]


def read_moment(path: Path, d_mlp: int) -> SecondMoment:
    """Read one npz file.

    Raises:
        UserError: naming the file and what is wrong with it (not an npz, arrays missing, another width).
    """
    try:
        total, count = _sum_and_count(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a file of second moments (expected an npz with mom2.mom2 and mom2.count): {reason}"
        ) from None
    if total.shape != (d_mlp, d_mlp):
        raise UserError(
            f"{path}: second moments of shape {total.shape} do not fit this model,"
            f" whose keys have {d_mlp} elements"
        )
    if count <= 0 or not np.isfinite(total).all():
        raise UserError(
            f"{path}: second moments must be finite and over at least one token (count is {count})"
        )
    return SecondMoment(torch.from_numpy(total), count, str(path))


def _sum_and_count(path: Path) -> tuple[np.ndarray, int]:
    arrays = np.load(path, allow_pickle=False)
    if isinstance(arrays, np.ndarray):
        raise ValueError("it holds a single array")
    with arrays:
        total, count = arrays["mom2.mom2"], int(arrays["mom2.count"])
    if total.dtype.kind not in "fiu":
        raise ValueError(f"mom2.mom2 holds {total.dtype}")
    return total, count


def write_moment(path: Path, total: Tensor, count: int, documents: int, fingerprint: str) -> None:
    """Write one npz file in the public layout; appears under its name only when complete."""
    arrays = {
        "mom2.mom2": total.numpy(),
        "mom2.count": np.asarray(count),
        "sample_size": np.asarray(documents),
        "fingerprint": np.asarray(fingerprint),
    }
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def factor_moment(moment: Tensor) -> Tensor:
    """Lower Cholesky factor of C in float64.

    A C from fewer tokens than it has rows is singular; then the smallest of a few ridges (a multiple of the
    mean eigenvalue on the diagonal) that makes it positive definite is added, and the log says which.

    Args:
        moment: C, (d_mlp, d_mlp), symmetric.

    Raises:
        UserError: if C is not positive semi-definite.
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
