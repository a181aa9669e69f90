"""PCA k%: the paper's ablation baseline, as its script computes it (Gu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


def pca(
    update: Tensor, weight: Tensor | None = None, original: Tensor | None = None, *, keep: float
) -> Tensor:
    """Put the first principal-component SCORES of an update where the update was.

    The script fits PCA with n = int(keep * d_model) components on dW as (d_mlp samples x d_model features)
    and writes the scores into the first n columns of a zero matrix. That is no reconstruction of dW (a
    rank-one update would be restored by any n >= 1), which is why the paper's PCA loses most edits. Offered
    as published, for comparison with its figures; the signs of the components are scikit-learn's.

    Args:
        update: dW, (d_model, d_mlp). weight, original: unused.
        keep: share of the components, 0 to 1.
    """
    from sklearn.decomposition import PCA  # takes a second to import

    n = min(int(keep * update.shape[0]), *update.shape)
    result = torch.zeros_like(update)
    if n > 0:
        samples = update.T.cpu().double().numpy()
        scores = PCA(n_components=n, svd_solver="full").fit_transform(samples)
        result[:n] = torch.from_numpy(scores.T.copy()).to(update)
    return result
