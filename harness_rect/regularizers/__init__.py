"""Post-hoc regularizers: pure functions that trim a proposed update of one weight.

Each takes ``(update, weight, original)`` of one shape and returns the trimmed update; what else it needs
(the share kept, a random generator) is bound by :func:`make_regularizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from harness_rect.regularizers.random import random_keep
from harness_rect.regularizers.rect import rect, rect_alphaedit

Regularizer = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Names accepted for ``regularizer=``; all but ``none`` need ``keep``.
REGULARIZERS = ("none", "rect", "random")
#: Names accepted for ``rect_convention=``.
RECT_CONVENTIONS = ("paper", "alphaedit")


def make_regularizer(
    name: str, keep: float | None, convention: str, generator: torch.Generator
) -> Regularizer | None:
    """The regularizer of a validated configuration, or None for ``none``.

    Args:
        generator: CPU generator for everything random; unused by deterministic regularizers.
    """
    if name == "none" or keep is None:
        return None
    if name == "random":
        return partial(random_keep, keep=keep, generator=generator)
    return partial(rect_alphaedit if convention == "alphaedit" else rect, keep=keep)


__all__ = [
    "RECT_CONVENTIONS",
    "REGULARIZERS",
    "Regularizer",
    "make_regularizer",
    "random_keep",
    "rect",
    "rect_alphaedit",
]
