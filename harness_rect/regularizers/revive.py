"""REVIVE ("Spectral Characterization and Mitigation of Sequential Knowledge Editing Collapse", Zhang et al.
2026): spare the dominant singular directions of the original weight.

With W_0 = U S V^T and r the least rank whose singular values hold the share tau of the total,

    dW' = (I - U_r U_r^T) dW (I - V_r V_r^T)

The paper says neither whether shares are of the singular values or of their squares, nor which tau it takes,
and there is no public code: both are settings with defaults of ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from harness_rect.precision import in_double
from harness_rect.regularizers.base import Regularizer, Share, WeightState
from harness_rect.updates import Dense, LowRank, Update

Spectrum = Literal["values", "squares"]
TAU = 0.5


class Revive(Regularizer):
    """dW between the complements of the :func:`dominant_directions` of W_0, tau = ``keep``.

    The directions are computed once for each weight and kept in its memory.
    """

    name = "revive"
    title = "REVIVE"
    paper = "[Zhang et al. 2026](https://arxiv.org/abs/2601.11042)"
    summary = "what lies outside the dominant singular directions of the original weight, on both sides"

    keep: Share = Field(
        default=TAU,
        description="tau, the share of W_0's spectrum whose directions no update touches;"
        f" {TAU} if not given",
    )
    revive_spectrum: Spectrum = Field(
        default="values",
        description="what tau is a share of: the singular values, or their squares; the paper does not say",
    )

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        memory, names = state.memory, ("left", "right")
        if "left" not in memory:
            found = dominant_directions(original, self.keep, self.revive_spectrum)
            memory.update(zip(names, (each.contiguous().cpu() for each in found), strict=True))
        if not memory["left"].numel():
            return update
        if isinstance(update, LowRank):
            left, right = in_double(update.left), in_double(update.right)
            u, v = (memory[name].to(left) for name in names)
            return LowRank(_outside(u, left), _outside(v, right))
        dw = in_double(update.matrix)
        u, v = (memory[name].to(dw) for name in names)
        return Dense(_outside(v, _outside(u, dw).T).T.to(update.matrix))


def _outside(directions: Tensor, columns: Tensor) -> Tensor:
    """(I - Q Q^T) applied to columns, for orthonormal Q."""
    return columns - directions @ (directions.T @ columns)


def dominant_directions(weight: Tensor, tau: float, spectrum: Spectrum = "values") -> tuple[Tensor, Tensor]:
    """U_r and V_r of the least rank r whose singular values, or their squares, hold the share ``tau``.

    Args:
        weight: W_0, (rows, columns). tau: 0 to 1; 0 gives r = 0.

    Returns:
        orthonormal columns (rows, r) and (columns, r), float64.
    """
    w = in_double(weight)
    wide = w.shape[0] <= w.shape[1]
    a = w if wide else w.T
    # The singular vectors of the shorter side from its Gram matrix, and an orthonormal basis of the other's.
    short = torch.linalg.eigh(a @ a.T).eigenvectors.flip(1)
    long = a.T @ short
    s = long.norm(dim=0)
    held = (s**2 if spectrum == "squares" else s).cumsum(0)
    wanted = tau * held[-1] * (1 - 1e-12)
    rank = int((held < wanted).sum()) + 1 if wanted > 0 else 0
    short, long = short[:, :rank], torch.linalg.qr(long[:, :rank]).Q
    return (short, long) if wide else (long, short)
