"""Short names for large things: models, and descriptions of runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

#: Elements of each tensor that go into a model's fingerprint. Training, merging and editing all change far
#: more of a tensor than would slip between this many evenly spaced ones.
SAMPLED = 4096


def digest(description: Mapping[str, Any]) -> str:
    """sha256 (hex) of a JSON description, independent of key order."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over every parameter's name, shape, dtype and a fixed sample of its elements."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        # An odd stride walks through all columns; an even one can hit a single column of a square matrix.
        sample = flat[:: (flat.numel() // SAMPLED) | 1].cpu().contiguous()
        total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        total.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return total.hexdigest()
