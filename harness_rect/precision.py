"""Arithmetic in float64, also for devices without it (Apple's GPU)."""

from __future__ import annotations

import torch
from torch import Tensor


def has_double(device: torch.device) -> bool:
    return device.type != "mps"


def where_double_is(tensor: Tensor) -> Tensor:
    """The tensor on its device, or on the CPU if that device has no float64."""
    return tensor if has_double(tensor.device) else tensor.cpu()


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64, :func:`where_double_is`."""
    return where_double_is(tensor).double()
