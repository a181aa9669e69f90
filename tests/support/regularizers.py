"""Regularizers by name, on plain matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness_rect.config import make_regularizer
from harness_rect.regularizers import REGULARIZERS, WeightState
from harness_rect.updates import Dense


def settings_of(name: str, keep: float = 0.4) -> dict[str, Any]:
    """The settings that a regularizer cannot do without."""
    return {"keep": keep} if "keep" in REGULARIZERS[name].model_fields else {}


def trimming(
    name: str, generator: torch.Generator | None = None, transposed: bool = False, **settings: Any
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``trim(update, weight, original)`` of a regularizer on dense matrices, without a memory."""
    regularizer = make_regularizer(name, settings)

    def trim(update: Tensor, weight: Tensor, original: Tensor) -> Tensor:
        state = WeightState({}, generator or torch.Generator(), transposed)
        return regularizer.trim(Dense(update), weight, original, state).dense()

    return trim
