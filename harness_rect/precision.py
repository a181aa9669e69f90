"""Arithmetic in float64 where a device may have none, as Apple's GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def has_double(device: torch.device) -> bool:
    return device.type != "mps"


def where_double_is(tensor: Tensor) -> Tensor:
    """The tensor where it lies, or on the CPU if its device has no float64."""
    return tensor if has_double(tensor.device) else tensor.cpu()


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64, :func:`where_double_is`."""
    return where_double_is(tensor).double()
