"""RECT: keep the elements of an update with the largest relative change (Gu et al. 2024, section 5).

For one weight W just before an edit and its proposed update dW:

    delta_ij = |dW_ij / W_ij|
    dW'_ij   = dW_ij if delta_ij is among the top k% of all elements of this weight, else 0

"Top k%" is exact: ``N - int(N * (1 - k))`` of N elements are kept. W_ij = 0 with dW_ij != 0 is an infinite
relative change and kept first; 0/0 counts as 0; ties go to the earlier position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from harness_rect.regularizers.base import KEEP, Regularizer, Share, WeightState
from harness_rect.updates import Dense, Update

#: Elements of a strided sample that brackets the threshold of larger weights, at most one in so many, and how
#: many of its standard deviations the bracket is wide on either side.
_SAMPLE, _STRIDE, _DEVIATIONS = 400_000, 16, 5
#: Elements worked on at a time on a CPU: what stays in its cache.
_CHUNK = 1 << 19


#: Which relative change is meant, for all regularizers that compute RECT.
Convention = Annotated[
    Literal["paper", "alphaedit"],
    Field(
        description="paper: the top k% of abs(dW/W), an exact count; alphaedit: abs(dW/(W+1e-8)), as in"
        " AlphaEdit's MEMIT+RECT"
    ),
]


class Rect(Regularizer):
    """RECT with either definition of the relative change, see :func:`rect` and :func:`rect_alphaedit`."""

    name = "rect"
    title = "RECT"
    paper = "[Gu et al. 2024](https://arxiv.org/abs/2401.04700)"
    summary = "the share `keep` of elements with the largest relative change"

    keep: Share = KEEP
    rect_convention: Convention = "paper"

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        trimmed = rect if self.rect_convention == "paper" else rect_alphaedit
        return Dense(trimmed(update.dense().to(weight), weight, keep=self.keep))

    def elements_left(self, update: Tensor) -> int | None:
        if self.rect_convention != "paper":
            return None  # all ties are kept
        return min(kept_count(update.numel(), self.keep), int(torch.count_nonzero(update)))


def relative_change(update: Tensor, weight: Tensor) -> Tensor:
    """delta = |dW / W| elementwise, with 0/0 = 0 and x/0 = inf. Shape, dtype and device of ``update``."""
    return _change_or_nan(update, weight).nan_to_num_(nan=0.0, posinf=torch.inf)


def _change_or_nan(update: Tensor, weight: Tensor) -> Tensor:
    return (update / weight).abs_()


def _change_of_alphaedit(update: Tensor, weight: Tensor) -> Tensor:
    return (update / (weight + 1e-8)).abs_().nan_to_num_(nan=0.0, posinf=torch.inf)


def kept_count(n: int, keep: float) -> int:
    """How many of ``n`` elements RECT keeps for a share ``keep`` in [0, 1]."""
    return n - int(n * (1 - keep))


def rect(update: Tensor, weight: Tensor, *, keep: float) -> Tensor:
    """RECT as the paper defines it.

    Args:
        update: dW, any shape, finite. weight: W before this edit, same shape.
        keep: share kept, 0 to 1.

    Returns:
        The update with all but exactly ``kept_count`` elements set to zero; a new tensor.
    """
    return keep_largest(update, weight, relative_change, keep=keep)


def keep_largest(
    update: Tensor, weight: Tensor, change: Callable[[Tensor, Tensor], Tensor], *, keep: float
) -> Tensor:
    """The update with all but the ``kept_count`` elements of largest ``change`` set to zero; a new tensor.

    Args:
        update, weight: of one shape. change: (part of the update, of the weight) -> sizes, none of them NaN.
    """
    n = update.numel()
    count = kept_count(n, keep)
    if count >= n:
        return update.clone()
    if count <= 0:
        return torch.zeros_like(update)
    changes = _Changes(update, weight, change)
    cut = count_th_largest(changes, count)
    return _kept(changes, cut, count - cut.above).view_as(update)


def rect_alphaedit(update: Tensor, weight: Tensor, *, keep: float) -> Tensor:
    """RECT as AlphaEdit's MEMIT+RECT (Fang et al. 2025) computes it, reused by NSE, BLUE and NAS.

    Relative change is |dW / (W + 1e-8)| and an element is kept where it reaches the ``int(N (1 - k))``-th
    smallest value: one element more than :func:`rect`, and all of its ties. Arguments as in :func:`rect`.
    """
    n = update.numel()
    rank = int(n * (1 - keep))
    if rank <= 0:
        return update.clone()
    changes = _Changes(update, weight, _change_of_alphaedit)
    cut = count_th_largest(changes, n - rank + 1)
    return _kept(changes, cut, cut.equal).view_as(update)


class _Changes:
    """The relative changes of a weight in its order, computed a chunk at a time and never kept."""

    def __init__(self, update: Tensor, weight: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.update, self.weight, self.change = update.detach().flatten(), weight.detach().flatten(), change
        self.columns = update.shape[-1] if update.dim() else 1
        self.size = _CHUNK if update.device.type == "cpu" else max(1, update.numel())

    def __len__(self) -> int:
        return self.update.numel()

    def __iter__(self) -> Iterator[Tensor]:
        for part in zip(self.update.split(self.size), self.weight.split(self.size), strict=True):
            yield self.change(*part)

    def against(self, bound: Tensor) -> _Changes:
        """The same to compare with this bound and larger ones: above 0, a 0/0 that stays NaN reaches none."""
        if self.change is relative_change and bool(bound > 0):
            return _Changes(self.update, self.weight, _change_or_nan)
        return self

    def sample(self, stride: int) -> Tensor:
        """One of ``stride``, or some more, elements, from all columns: in those of low-rank updates sizes
        differ.
        """
        while math.gcd(stride, self.columns) > 1:
            stride += 1
        return self.change(self.update[::stride], self.weight[::stride])


@dataclass(frozen=True)
class Cut:
    """The count-th largest of some values: how many are larger, and how many equal it."""

    threshold: Tensor
    above: int
    equal: int


def count_th_largest(values: _Changes, count: int) -> Cut:
    """Find the ``count``-th largest value without sorting all of them; no value may be NaN.

    A sample gives two values that very likely enclose the wanted one; one pass counts what is above, and only
    what lies between them is searched. If they do not enclose it, everything is.
    """
    n = len(values)
    if n > _SAMPLE:
        sample = _sorted(values.sample(max(_STRIDE, n // _SAMPLE)))
        m = sample.numel()
        place, spread = count / n * m, _DEVIATIONS * math.sqrt(m) / 2 + 1
        high = sample[m - 1 - max(0, int(place - spread))]
        low = sample[m - 1 - min(m - 1, int(place + spread))]
        above, parts = 0, []
        for chunk in values.against(low):
            larger, inside = _above_and_between(chunk, low, high)
            above += larger
            parts.append(inside)
        between = torch.cat(parts)
        if above < count <= above + between.numel():
            return _searched(between, count - above, above)
    return _searched(torch.cat(list(values)), count, 0)


def _has_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _sorted(values: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(values.numpy())) if _has_numpy(values) else values.sort().values


def _above_and_between(values: Tensor, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
    """How many values exceed ``high``, and those from ``low`` to ``high`` in their order."""
    if not _has_numpy(values):
        over = values > high
        return int(torch.count_nonzero(over)), values[(values >= low).logical_xor_(over)]
    array = values.numpy()  # compared, counted and searched several times faster
    above = array > high.item()
    places = np.flatnonzero(np.logical_xor(array >= low.item(), above))
    return int(np.count_nonzero(above)), values.take(torch.from_numpy(places))


def _empty_like(tensor: Tensor) -> Tensor:
    """On a CPU from numpy, which asks for large pages: fetching small ones takes longer than filling them."""
    if not _has_numpy(tensor):
        return torch.empty_like(tensor)
    return torch.from_numpy(np.empty(tensor.shape, dtype=str(tensor.dtype).removeprefix("torch.")))


def _searched(values: Tensor, count: int, above: int) -> Cut:
    place = values.numel() - count
    if _has_numpy(values):  # its partition uses wide registers
        threshold = torch.from_numpy(np.partition(values.numpy(), place)[place : place + 1])[0]
    else:
        threshold = torch.kthvalue(values, place + 1).values
    larger, equal = (values > threshold).sum(), (values == threshold).sum()
    return Cut(threshold, above + int(larger), int(equal))


def _kept(changes: _Changes, cut: Cut, ties: int) -> Tensor:
    """The update, flat, where its change is above the threshold, and at the first ``ties`` that equal it."""
    changes = changes.against(cut.threshold)
    result = _empty_like(changes.update)
    pieces = zip(changes.update.split(changes.size), changes, result.split(changes.size), strict=True)
    for part, delta, kept in pieces:
        if ties == cut.equal:
            # As numbers, multiplying by which is fast, and in delta's place.
            mask = delta.ge_(cut.threshold)
        else:
            equal = (delta == cut.threshold).nonzero().flatten()[: max(0, ties)]
            mask = delta.gt_(cut.threshold)
            mask[equal] = 1
            ties -= equal.numel()
        torch.mul(part, mask, out=kept)
    return result
