"""SPHERE ("Energy-Regularized Sequential Model Editing on the Hypersphere", 2025): spare the principal
directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA, BETA = 0.5, 0.5


def sphere(
    update: Tensor,
    weight: Tensor,
    original: Tensor | None = None,
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
) -> Tensor:
    """dW (I - alpha U U^T), U the fewest top eigenvectors that hold a share beta of the rows' energy.

    With W^ the weight with every row scaled to length one, the energy is the sum of the eigenvalues of its
    Gram matrix.

    Args:
        update: dW, (d_model, d_mlp): a row an output. weight: W before this edit, same shape. original:
        unused.
    """
    rows = weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    # The eigenvectors of W^T W from those of the smaller W W^T.
    tall = rows.shape[0] > rows.shape[1]
    gram = rows.T @ rows if tall else rows @ rows.T
    energies, vectors = torch.linalg.eigh(gram)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    share = energies.cumsum(0) / energies.sum()
    count = int((share < beta * (1 - 1e-12)).sum()) + 1
    top = vectors[:, :count]
    u = top if tall else rows.T @ top / energies[:count].sqrt()
    dw = update.double()
    return (dw - alpha * (dw @ u) @ u.T).to(update.dtype)
