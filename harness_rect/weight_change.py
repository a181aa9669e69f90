"""Distance of an edited weight from the original: the overfitting measures of Gu et al. 2024, section 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness_rect.precision import where_double_is
from harness_rect.regularizers.rect import relative_change

#: The paper's two thresholds of the relative change.
THRESHOLDS = (0.077, 0.171)
#: Edges of the histogram, log10 of the relative change.
LOG10_EDGES = tuple(-6 + 0.25 * i for i in range(37))
#: Rows and columns of the heat map of |dW|.
HEAT_MAP = (16, 32)


def weight_change(weight: Tensor, original: Tensor) -> dict[str, Any]:
    """Measures of dW = weight - original, both float32 of one shape.

    Returns:
        manhattan_distance: sum of |dW|. frobenius_distance. changed: share of elements that differ.
        share_over: threshold -> share of elements whose delta = |dW / W_original| exceeds it.
        delta_histogram: counts of log10(delta) between LOG10_EDGES, with those below and above first and
            last; unchanged elements are not counted. heat_map: mean |dW| over a coarse grid, rows as stored.
    """
    original = where_double_is(original)
    difference = where_double_is(weight) - original
    size = difference.abs()
    delta = relative_change(difference, original).flatten()
    changed = delta[delta > 0]
    edges = torch.tensor(LOG10_EDGES, dtype=torch.float64, device=delta.device)
    places = torch.bucketize(changed.double().log10(), edges)
    counts = torch.bincount(places, minlength=len(LOG10_EDGES) + 1)
    grid = F.adaptive_avg_pool2d(size[None, None], HEAT_MAP)[0, 0]
    return {
        "manhattan_distance": float(size.sum(dtype=torch.float64)),
        "frobenius_distance": float(difference.norm()),
        "changed": int(torch.count_nonzero(difference)) / difference.numel(),
        "share_over": {str(limit): float((delta > limit).double().mean()) for limit in THRESHOLDS},
        "delta_histogram": counts.tolist(),
        "heat_map": [[float(f"{value:.3g}") for value in row] for row in grid.tolist()],
    }
