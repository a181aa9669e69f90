"""PCA k%: the paper's ablation baseline, as its script computes it (Gu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from harness_rect.regularizers.base import KEEP, Regularizer, Share, WeightState
from harness_rect.updates import Dense, Update


class Pca(Regularizer):
    """See :func:`pca`."""

    name = "pca"
    title = "PCA"
    paper = "[Gu et al. 2024](https://arxiv.org/abs/2401.04700), as an ablation and as published"
    summary = "the scores of `keep` x d_model principal components, in the first columns: no reconstruction"

    keep: Share = KEEP

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        proposed = state.outputs_first(update.dense().to(weight))
        return Dense(state.outputs_first(pca(proposed, keep=self.keep)))


def pca(update: Tensor, *, keep: float) -> Tensor:
    """Put the first principal-component SCORES of an update where the update was.

    The script fits PCA with n = int(keep * d_model) components on dW as (d_mlp samples x d_model features)
    and writes the scores into the first n columns of a zero matrix. That is no reconstruction of dW (a
    rank-one update would be restored by any n >= 1), which is why the paper's PCA loses most edits. Offered
    as published, for comparison with its figures; the signs of the components are scikit-learn's.

    Args:
        update: dW, (d_model, d_mlp).
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
