"""The second moment of one layer: its file format and the one solve editing needs.

The format is the public one of ROME's statistics (``<module>_<dtype>_mom2_<n>.npz``): ``mom2.mom2`` is the
SUM of outer products (d_mlp, d_mlp), ``mom2.count`` the number of tokens, ``sample_size`` the number of
documents. Ours adds ``fingerprint``, a JSON text saying what was sampled. Nothing is ever unpickled.
"""

from __future__ import annotations

import logging
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness_rect.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SecondMoment:
    """total: sum of outer products, (d_mlp, d_mlp); count: tokens; origin: the file it came from."""

    total: Tensor
    count: int
    origin: str

    @property
    def mean(self) -> Tensor:
        """C = E[k k^T] in float64."""
        return self.total.double() / self.count


def read_moment(path: Path, d_mlp: int) -> SecondMoment:
    """Read one npz file.

    Raises:
        UserError: naming the file and what is wrong with it (not an npz, arrays missing, another width).
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            total, count = arrays["mom2.mom2"], int(arrays["mom2.count"])
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{path}: not a file of second moments (expected an npz with mom2.mom2 and mom2.count): {error}"
        ) from None
    if total.shape != (d_mlp, d_mlp):
        raise UserError(
            f"{path}: second moments of shape {total.shape} do not fit this model, whose keys have {d_mlp}"
            " elements"
        )
    if count <= 0 or not np.isfinite(total).all():
        raise UserError(
            f"{path}: second moments must be finite and over at least one token (count is {count})"
        )
    return SecondMoment(torch.from_numpy(total), count, str(path))


def write_moment(path: Path, total: Tensor, count: int, documents: int, fingerprint: str) -> None:
    """Write one npz file in the public layout; appears under its name only when complete."""
    arrays = {
        "mom2.mom2": total.numpy(),
        "mom2.count": np.asarray(count),
        "sample_size": np.asarray(documents),
        "fingerprint": np.asarray(fingerprint),
    }
    write_arrays(path, arrays)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """``np.savez`` under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def solve_moment(moment: Tensor, key: Tensor) -> Tensor:
    """C^-1 k, solved in float64 by Cholesky.

    A C from fewer tokens than it has rows is singular; then the smallest of a few ridges (a multiple of the
    mean eigenvalue on the diagonal) that makes it positive definite is added, and the log says which.

    Args:
        moment: C, (d_mlp, d_mlp), symmetric. key: (d_mlp,) float32.

    Returns:
        (d_mlp,) float32 on the key's device.
    """
    c = moment.double().to(key.device if key.device.type != "mps" else "cpu")
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
            solution = torch.cholesky_solve(key.double().to(c.device).unsqueeze(1), factor).squeeze(1)
            return solution.float().to(key.device)
    raise UserError("second moments are not positive semi-definite; the file is damaged or of another model")
