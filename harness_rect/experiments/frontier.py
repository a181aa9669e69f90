"""Frontiers: how much ability a regularizer keeps at a share of the edits, over its strengths.

A *curve* is one regularizer over its strengths (``keep``), sorted by them. Where one strength leaves every
update whole, as ``keep=1`` of RECT and ``keep=0`` of REVIVE do, the curve starts at the method without a
regularizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from harness_rect.regularizers import REGULARIZERS, WeightState
from harness_rect.updates import Dense

#: Shares of the reliability without a regularizer at which curves are compared.
LEVELS = (1.0, 0.9, 0.75, 0.5)


class Point(NamedTuple):
    """What one strength leaves in one order of the edits: of the edits, and of the ability."""

    edits: float
    ability: float


def ability_with(curve: Sequence[Point], edits: float) -> float | None:
    """The largest ability on a curve with at least so much of the edits; None if no strength keeps them.

    The curve is its points and the straight lines between neighbours. "At least" and not "just", because a
    regularizer can keep more edits than the method without one: what has more of both is not worse.
    """
    edits -= 1e-9  # 0.75 * 0.8 is more than 0.6
    found = [point.ability for point in curve if point.edits >= edits]
    for one, other in pairwise(curve):
        low, high = sorted((one, other))
        if low.edits < edits < high.edits:
            place = (edits - low.edits) / (high.edits - low.edits)
            found.append(low.ability + place * (high.ability - low.ability))
    return max(found, default=None)


def all_above(curve: Sequence[Point], edits: float) -> bool:
    """Whether all strengths keep more of the edits: the ability at so few is not on the curve."""
    return min(point.edits for point in curve) > edits + 1e-9


def not_dominated(points: Sequence[Point]) -> list[bool]:
    """For each point, whether no other has as much of both and more of one."""
    return [not any(p != q and q.edits >= p.edits and q.ability >= p.ability for q in points) for p in points]


def whole(regularizer: str, settings: Mapping[str, Any]) -> float | None:
    """The ``keep``, 1 or 0, at which a regularizer leaves updates as they are; None if neither does.

    Args:
        settings: all others of the regularizer.
    """
    kind = REGULARIZERS.get(regularizer)
    if kind is None or "keep" not in kind.model_fields:
        return None
    generator = torch.Generator().manual_seed(0)
    update, weight = torch.randn(2, 6, 4, generator=generator)
    for keep in (1.0, 0.0):
        trimmed = kind(**{**settings, "keep": keep}).trim(
            Dense(update), weight, weight, WeightState({}, generator)
        )
        if torch.allclose(trimmed.dense(), update):
            return keep
    return None
