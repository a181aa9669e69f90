"""Post-hoc regularizers: pure functions that trim a proposed update of one weight.

Each takes ``(update, weight, original)`` of one shape, W being the weight just before the edit and the
original the weight before all edits, and returns the trimmed update; what else it needs (the share kept, a
random generator) is bound by :func:`make_regularizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from harness_rect.regularizers.pca import pca
from harness_rect.regularizers.prune import largest_singular_value, prune, prune_factors
from harness_rect.regularizers.random import random_keep
from harness_rect.regularizers.rect import rect, rect_alphaedit
from harness_rect.regularizers.sphere import sphere, sphere_factors

Regularizer = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Names accepted for ``regularizer=``, and whether they need ``keep``.
NEEDS_KEEP = {"none": False, "rect": True, "random": True, "pca": True, "prune": False, "sphere": False}
REGULARIZERS = tuple(NEEDS_KEEP)
#: Names accepted for ``rect_convention=``.
RECT_CONVENTIONS = ("paper", "alphaedit")


def make_regularizer(
    name: str, keep: float | None, convention: str, generator: torch.Generator, transposed: bool = False
) -> Regularizer | None:
    """The regularizer of a validated configuration, or None for ``none``.

    Args:
        generator: CPU generator for everything random; unused by deterministic regularizers.
        transposed: whether weights are stored as (inputs, outputs), as GPT-2's are. Regularizers that treat
            rows and columns differently are given (outputs, inputs).
    """
    if name == "none":
        return None
    if name == "prune":
        return prune
    if name == "sphere":
        return _by_rows(sphere) if transposed else sphere
    share = 1.0 if keep is None else keep
    if name == "random":
        return partial(random_keep, keep=share, generator=generator)
    if name == "pca":
        return _by_rows(partial(pca, keep=share)) if transposed else partial(pca, keep=share)
    return partial(rect_alphaedit if convention == "alphaedit" else rect, keep=share)


def _by_rows(regularizer: Regularizer) -> Regularizer:
    return lambda update, weight, original: regularizer(update.T, weight.T, original.T).T


__all__ = [
    "NEEDS_KEEP",
    "RECT_CONVENTIONS",
    "REGULARIZERS",
    "Regularizer",
    "largest_singular_value",
    "make_regularizer",
    "pca",
    "prune",
    "prune_factors",
    "random_keep",
    "rect",
    "rect_alphaedit",
    "sphere",
    "sphere_factors",
]
