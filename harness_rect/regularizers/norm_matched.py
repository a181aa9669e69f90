"""Norm-matched shrinkage: the control that has the norm of RECT's update and nothing else of it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from harness_rect.precision import where_double_is
from harness_rect.regularizers.base import Regularizer, Share, WeightState
from harness_rect.regularizers.rect import Convention, Rect
from harness_rect.regularizers.scale import scaled
from harness_rect.updates import Dense, Update


class NormMatched(Regularizer):
    """dW' = dW |RECT_k(dW)| / |dW| in Frobenius norms, k = ``keep``."""

    name = "norm_matched"
    title = "Norm-matched"
    paper = "a control"
    summary = "all of it, scaled to the norm that `rect` with the same settings leaves"

    keep: Share = Field(description="the share k that RECT would keep, to whose norm the update is scaled")
    rect_convention: Convention = "paper"

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        dense = Dense(update.dense().to(weight))
        norm = _norm(dense)
        if norm == 0:
            return update
        kept = Rect(keep=self.keep, rect_convention=self.rect_convention)
        return scaled(update, _norm(kept.trim(dense, weight, original, state)) / norm)


def _norm(update: Update) -> float:
    """The Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(where_double_is(update.dense()), dtype=torch.float64))
