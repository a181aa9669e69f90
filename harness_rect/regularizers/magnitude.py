"""Magnitude k%: the control that keeps the largest changes, where RECT keeps the largest relative ones."""

from __future__ import annotations

from torch import Tensor

from harness_rect.regularizers.base import KEEP, Regularizer, Share, WeightState
from harness_rect.regularizers.rect import keep_largest
from harness_rect.updates import Dense, Update


class Magnitude(Regularizer):
    """See :func:`magnitude`."""

    name = "magnitude"
    title = "Magnitude"
    paper = "a control"
    summary = "the share `keep` of elements with the largest absolute value"

    keep: Share = KEEP

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        return Dense(magnitude(update.dense().to(weight), keep=self.keep))


def magnitude(update: Tensor, *, keep: float) -> Tensor:
    """Keep the largest |dW|: exactly ``N - int(N (1 - keep))`` of N elements, ties by position.

    Args:
        update: dW, any shape, finite. keep: share kept, 0 to 1.
    """
    return keep_largest(update, update, lambda dw, _: dw.abs(), keep=keep)
