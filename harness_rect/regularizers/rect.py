"""RECT: keep the elements of an update with the largest relative change (Gu et al. 2024, section 5).

For one weight W just before an edit and its proposed update dW:

    delta_ij = |dW_ij / W_ij|
    dW'_ij   = dW_ij if delta_ij is among the top k% of all elements of this weight, else 0

"Top k%" is exact: ``N - int(N * (1 - k))`` of N elements are kept. W_ij = 0 with dW_ij != 0 is an infinite
relative change and kept first; 0/0 counts as 0; ties go to the earlier position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Elements of a strided sample that brackets the threshold of large weights, and how many of its standard
#: deviations the bracket is wide on either side.
_SAMPLE, _DEVIATIONS = 100_000, 6


def relative_change(update: Tensor, weight: Tensor) -> Tensor:
    """delta = |dW / W| elementwise, with 0/0 = 0 and x/0 = inf. Shape, dtype and device of ``update``."""
    return (update / weight).abs_().nan_to_num_(nan=0.0, posinf=torch.inf)


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
    threshold, above = count_th_largest(delta, count)
    mask = delta > threshold
    if above < count:
        mask[(delta == threshold).nonzero().flatten()[: count - above]] = True
    return torch.where(
        mask.view_as(update), update, torch.zeros((), dtype=update.dtype, device=update.device)
    )


def count_th_largest(values: Tensor, count: int) -> tuple[Tensor, int]:
    """The ``count``-th largest of the values (n,), which hold no NaN, and how many are larger. No sort of all
    of them.

    A sample gives two values that very likely enclose the wanted one; one pass counts what is above, and only
    what lies between them is searched. If they do not enclose it, everything is.
    """
    n = values.numel()
    if n > 4 * _SAMPLE:
        sample = values[:: n // _SAMPLE].sort(descending=True).values
        m = sample.numel()
        place, spread = count / n * m, _DEVIATIONS * math.sqrt(m) / 2 + 1
        high = sample[max(0, int(place - spread))]
        low = sample[min(m - 1, int(place + spread))]
        above = int((values > high).sum())
        between = values[(values >= low) & (values <= high)]
        if above < count <= above + between.numel():
            threshold = torch.kthvalue(between, between.numel() - (count - above) + 1).values
            return threshold, above + int((between > threshold).sum())
    threshold = torch.kthvalue(values, n - count + 1).values
    return threshold, int((values > threshold).sum())


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
