"""Random k%: the paper's ablation baseline that keeps elements without looking at them (Gu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from harness_rect.regularizers.base import KEEP, Regularizer, Share, WeightState
from harness_rect.updates import Dense, Update


class Random(Regularizer):
    """See :func:`random_keep`."""

    name = "random"
    title = "Random"
    paper = "[Gu et al. 2024](https://arxiv.org/abs/2401.04700), as an ablation"
    summary = "each element with probability `keep`"

    keep: Share = KEEP

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        return Dense(random_keep(update.dense().to(weight), keep=self.keep, generator=state.generator))


def random_keep(update: Tensor, *, keep: float, generator: torch.Generator) -> Tensor:
    """Keep each element of ``update`` independently with probability ``keep``.

    Args:
        update: dW, any shape.
        generator: a CPU generator, so that the mask does not depend on the device.
    """
    mask = torch.rand(update.shape, generator=generator) < keep
    return torch.where(
        mask.to(update.device), update, torch.zeros((), dtype=update.dtype, device=update.device)
    )
