"""PRUNE: restrain the large singular values of everything edited so far (Ma et al., ICLR 2025)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

BASE = 1.2
_largest: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of original weights: they are asked for at every step


def prune(update: Tensor, weight: Tensor, original: Tensor, *, base: float = BASE) -> Tensor:
    """Trim an update so that the accumulated one, A = W + dW - W_0, has its singular values restrained.

    Every singular value s >= s_max(W_0) of A becomes log_base(s) - log_base(s_max) + s_max; the others stay.

    Args:
        update: dW, (rows, columns). weight: W before this edit. original: W_0. All of one shape.

    Returns:
        dW' with W + dW' - W_0 = the restrained A, of the dtype of ``update``.
    """
    limit = largest_singular_value(original)
    accumulated = (weight.double() - original.double()) + update.double()
    if float(accumulated.norm()) < limit:  # no singular value is larger than the Frobenius norm
        return update.clone()
    wide = accumulated.shape[0] <= accumulated.shape[1]
    a = accumulated if wide else accumulated.T
    squares, left = torch.linalg.eigh(a @ a.T)  # of the smaller side; only large values are needed of it
    s = squares.clamp_min(0).sqrt()
    large = s >= limit
    if not large.any():
        return update.clone()
    u, s = left[:, large], s[large]
    restrained = (s.log() - math.log(limit)) / math.log(base) + limit
    change = u @ (((restrained - s) / s).unsqueeze(1) * (u.T @ a))
    return (update.double() + (change if wide else change.T)).to(update.dtype)


def largest_singular_value(weight: Tensor) -> float:
    """s_max in float64; remembered as long as the tensor lives."""
    if weight not in _largest:
        w = weight.double()
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        _largest[weight] = math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))
    return float(_largest[weight])
