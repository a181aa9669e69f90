"""PRUNE: restrain the large singular values of everything edited so far (Ma et al., ICLR 2025).

The paper restrains the update once, after all edits. As a regularizer it does so after each: what is above
the limit then is restrained again by later steps. While all updates of a weight are low-rank, the accumulated
update is kept as two factors, and only matrices of its rank are decomposed.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from harness_rect.precision import in_double
from harness_rect.regularizers.base import Regularizer, WeightState
from harness_rect.updates import Dense, LowRank, Update

BASE = 1.2
#: s_max of original weights, which every step needs.
_largest: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Prune(Regularizer):
    """See :func:`prune`. While the accumulated update of a weight is low-rank, it is kept in factors."""

    name = "prune"
    title = "PRUNE"
    paper = "[Ma et al. 2025](https://arxiv.org/abs/2405.16821)"
    summary = (
        "singular values of the accumulated update above the largest of the original weight grow as a"
        " logarithm only"
    )

    base: float = Field(default=BASE, gt=1, description="base of the logarithm")

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        factors = self._accumulated(update, original, state.memory)
        if factors is None:
            return Dense(prune(update.dense().to(weight), weight, original, base=self.base))
        accumulated = (factors[0] @ factors[1].T).to(weight)
        return Dense(accumulated - (weight - original.float()))

    def _accumulated(
        self, update: Update, original: Tensor, memory: MutableMapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """The restrained accumulated update in factors; None from where on a matrix is as cheap."""
        names = ("left", "right")
        if "dense" in memory:
            return None
        if isinstance(update, LowRank):
            left, right = in_double(update.left), in_double(update.right)
            if "left" in memory:
                before = [memory[name].to(left.device) for name in names]
                left, right = torch.cat([before[0], left], 1), torch.cat([before[1], right], 1)
            if 2 * left.shape[1] <= min(len(left), len(right)):
                factors = prune_factors(left, right, largest_singular_value(original), base=self.base)
                memory.update(zip(names, (factor.cpu() for factor in factors), strict=True))
                return factors
        for name in names:
            memory.pop(name, None)
        memory["dense"] = torch.ones(1)
        return None


def prune(update: Tensor, weight: Tensor, original: Tensor, *, base: float = BASE) -> Tensor:
    """Trim an update so that the accumulated one, A = W + dW - W_0, has its singular values restrained.

    Every singular value s >= s_max(W_0) of A becomes log_base(s) - log_base(s_max) + s_max; the others stay.
    Nothing is restrained where W_0 is zero.
    This is the dense form; :func:`prune_factors` does the same for a low-rank A.

    Args:
        update: dW, (rows, columns). weight: W before this edit. original: W_0. All of one shape.

    Returns:
        dW' with W + dW' - W_0 = the restrained A, of the dtype of ``update``.
    """
    limit = largest_singular_value(original)
    if limit == 0:  # its logarithm is asked for
        return update.clone()
    proposed = in_double(update)
    accumulated = (in_double(weight) - in_double(original)) + proposed
    if float(accumulated.norm()) < limit:  # no singular value is larger than the Frobenius norm
        return update.clone()
    wide = accumulated.shape[0] <= accumulated.shape[1]
    a = accumulated if wide else accumulated.T
    squares, left = torch.linalg.eigh(a @ a.T)  # of the smaller side; only large values are needed of it
    s = squares.clamp_min(0).sqrt()
    large = s >= limit
    u, s = left[:, large], s[large]
    restrained = _restrained(s, limit, base)
    change = u @ (((restrained - s) / s).unsqueeze(1) * (u.T @ a))
    return (proposed + (change if wide else change.T)).to(update)


def prune_factors(left: Tensor, right: Tensor, limit: float, *, base: float = BASE) -> tuple[Tensor, Tensor]:
    """The accumulated update A = left right^T restrained, in factors again.

    Args:
        left: (rows, r). right: (columns, r). limit: s_max(W_0).

    Returns:
        factors of the same shapes at most, float64, without directions that hold nothing.
    """
    if limit == 0:
        return in_double(left), in_double(right)
    q_left, core_left = torch.linalg.qr(in_double(left))
    q_right, core_right = torch.linalg.qr(in_double(right))
    u, s, vt = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    held = s > s.max() * 1e-14
    s = torch.where(s >= limit, _restrained(s.clamp_min(limit), limit, base), s)[held]
    return q_left @ u[:, held] * s, q_right @ vt.T[:, held]


def _restrained(s: Tensor, limit: float, base: float) -> Tensor:
    return (s.log() - math.log(limit)) / math.log(base) + limit


def largest_singular_value(weight: Tensor) -> float:
    """s_max in float64; remembered as long as the tensor lives."""
    if weight not in _largest:
        w = in_double(weight)
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        _largest[weight] = math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))
    return float(_largest[weight])
