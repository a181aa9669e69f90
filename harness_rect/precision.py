"""Arithmetic in float64 where a device may have none."""

from __future__ import annotations

from torch import Tensor


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it lies, or on the CPU if it lies on Apple's GPU, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
