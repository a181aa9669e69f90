"""Random k%: the paper's ablation baseline that keeps elements without looking at them (Gu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


def random_keep(
    update: Tensor,
    weight: Tensor,
    original: Tensor | None = None,
    *,
    keep: float,
    generator: torch.Generator,
) -> Tensor:
    """Keep each element of ``update`` independently with probability ``keep``.

    Args:
        update: dW, any shape. weight, original: unused.
        generator: a CPU generator, so that the mask does not depend on the device.
    """
    mask = torch.rand(update.shape, generator=generator) < keep
    return torch.where(
        mask.to(update.device), update, torch.zeros((), dtype=update.dtype, device=update.device)
    )
