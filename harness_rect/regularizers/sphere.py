"""SPHERE ("Energy-Regularized Sequential Model Editing on the Hypersphere", 2025): spare the principal
directions.

It projects the inputs' side of an update, so that of a low-rank one a single factor changes.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from harness_rect.precision import in_double
from harness_rect.regularizers.base import Regularizer, WeightState
from harness_rect.updates import Dense, LowRank, Update

ALPHA, BETA = 0.5, 0.5


class Sphere(Regularizer):
    """See :func:`sphere`."""

    name = "sphere"
    title = "SPHERE"
    paper = "Energy-Regularized Sequential Model Editing on the Hypersphere, 2025"
    summary = "less of it, by `alpha`, along the principal directions of the weight's rows"

    alpha: float = Field(
        default=ALPHA, ge=0, le=1, description="share of the update removed along the principal directions"
    )
    beta: float = Field(
        default=BETA, gt=0, le=1, description="share of the energy of W that the principal directions hold"
    )

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        if isinstance(update, LowRank):
            factors = sphere_factors(
                update.left, update.right, weight, transposed=state.transposed, **self.model_dump()
            )
            return LowRank(*factors)
        proposed, before = (state.outputs_first(each) for each in (update.dense().to(weight), weight))
        return Dense(state.outputs_first(sphere(proposed, before, **self.model_dump())))


def sphere(update: Tensor, weight: Tensor, *, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """dW (I - alpha U U^T), U the :func:`principal_directions` of W.

    Args:
        update: dW, (d_model, d_mlp): a row an output. weight: W before this edit, same shape.
    """
    u = principal_directions(weight, beta)
    dw = in_double(update)
    return (dw - alpha * (dw @ u) @ u.T).to(update)


def sphere_factors(
    left: Tensor,
    right: Tensor,
    weight: Tensor,
    *,
    transposed: bool = False,
    alpha: float = ALPHA,
    beta: float = BETA,
) -> tuple[Tensor, Tensor]:
    """SPHERE of an update left right^T, in factors: only the one on the inputs' side changes.

    Args:
        left: (rows, r). right: (columns, r). weight: W before this edit, (rows, columns).
        transposed: whether all of these are stored as (inputs, outputs).

    Returns:
        factors of the same shapes, float64.
    """
    left, right = in_double(left), in_double(right)
    u = principal_directions(weight.T if transposed else weight, beta)
    if transposed:
        return left - alpha * u @ (u.T @ left), right
    return left, right - alpha * u @ (u.T @ right)


def principal_directions(weight: Tensor, beta: float) -> Tensor:
    """The fewest top eigenvectors that hold a share ``beta`` of the energy of a weight's rows.

    With W^ the weight with every row scaled to length one, the energy is the sum of the eigenvalues of
    W^T W.

    Args:
        weight: (outputs, inputs).

    Returns:
        orthonormal columns, (inputs, count), float64.
    """
    rows = in_double(weight)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    # The eigenvectors of W^T W from those of the smaller W W^T.
    tall = rows.shape[0] > rows.shape[1]
    gram = rows.T @ rows if tall else rows @ rows.T
    energies, vectors = torch.linalg.eigh(gram)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    share = energies.cumsum(0) / energies.sum()
    count = int((share < beta * (1 - 1e-12)).sum()) + 1
    top = vectors[:, :count]
    return top if tall else rows.T @ top / energies[:count].sqrt()
