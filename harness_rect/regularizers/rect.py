"""RECT: keep the elements of an update with the largest relative change (Gu et al. 2024, section 5).

For one weight W just before an edit and its proposed update dW:

    delta_ij = |dW_ij / W_ij|
    dW'_ij   = dW_ij if delta_ij is among the top k% of all elements of this weight, else 0

"Top k%" is exact: ``N - int(N * (1 - k))`` of N elements are kept. W_ij = 0 with dW_ij != 0 is an infinite
relative change and kept first; 0/0 counts as 0; ties go to the earlier position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_change(update: Tensor, weight: Tensor) -> Tensor:
    """delta = |dW / W| elementwise, with 0/0 = 0 and x/0 = inf. Shape, dtype and device of ``update``."""
    delta = (update / weight).abs_()
    return torch.where(update == 0, torch.zeros((), dtype=delta.dtype, device=delta.device), delta)


def kept_count(n: int, keep: float) -> int:
    """How many of ``n`` elements RECT keeps for a share ``keep`` in [0, 1]."""
    return n - int(n * (1 - keep))


def rect(update: Tensor, weight: Tensor, original: Tensor | None = None, *, keep: float) -> Tensor:
    """RECT as the paper defines it.

    Args:
        update: dW, any shape, finite. weight: W before this edit, same shape. original: unused.
        keep: share kept, 0 to 1.

    Returns:
        The update with all but exactly ``kept_count`` elements set to zero; a new tensor.
    """
    n = update.numel()
    count = kept_count(n, keep)
    if count >= n:
        return update.clone()
    if count <= 0:
        return torch.zeros_like(update)
    delta = relative_change(update, weight).flatten()
    # The count-th largest value, by selection: no sort of the whole weight.
    threshold = torch.kthvalue(delta, n - count + 1).values
    mask = delta > threshold
    ties = (delta == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return torch.where(
        mask.view_as(update), update, torch.zeros((), dtype=update.dtype, device=update.device)
    )


def rect_alphaedit(update: Tensor, weight: Tensor, original: Tensor | None = None, *, keep: float) -> Tensor:
    """RECT as AlphaEdit's MEMIT+RECT (Fang et al. 2025) computes it, reused by NSE, BLUE and NAS.

    Relative change is |dW / (W + 1e-8)| and an element is kept where it reaches the ``int(N (1 - k))``-th
    smallest value: one element more than :func:`rect`, and all of its ties. Arguments as in :func:`rect`.
    """
    n = update.numel()
    rank = int(n * (1 - keep))
    if rank <= 0:
        return update.clone()
    delta = (update / (weight + 1e-8)).abs_()
    threshold = torch.kthvalue(delta.flatten(), rank).values
    return torch.where(delta >= threshold, update, torch.zeros((), dtype=update.dtype, device=update.device))
