"""Plain shrinkage: the control that makes every step smaller and changes nothing else of it."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from harness_rect.regularizers.base import Regularizer, Share, WeightState
from harness_rect.updates import Dense, LowRank, Update


class Scale(Regularizer):
    """dW' = lambda dW, lambda = ``keep``."""

    name = "scale"
    title = "Scale"
    paper = "a control"
    summary = "all of it, times `keep`"

    keep: Share = Field(description="lambda, the factor of each update: 0.4 or 40%")

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        return scaled(update, self.keep)


def scaled(update: Update, factor: float) -> Update:
    """The update times a factor, low-rank if it is."""
    if isinstance(update, LowRank):
        return LowRank(update.left * factor, update.right)
    return Dense(update.matrix * factor)
