"""What regularizers leave of single updates: what a mask does that a scale does not.

``rows(session, regularizers)`` tries regularizers on the updates that a method proposes for the unedited
model, measures the edits, and describes each result by :func:`what_is_left`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harness_rect.measure import averages, measure, measure_baseline, probes
from harness_rect.precision import in_double
from harness_rect.regularizers import Regularizer
from harness_rect.session import EditSession
from harness_rect.session.step import trim
from harness_rect.session.weights import EditedWeights

Row = dict[str, Any]


def rows(
    session: EditSession,
    regularizers: Sequence[Regularizer],
    on_batch: Callable[[int], None] | None = None,
) -> list[Row]:
    """One row for each batch of ``edit_batch_size`` edits of a session, regularizer and edited weight.

    Each batch is proposed for the unedited model, trimmed as the first of a stream (what is random, as the
    batch of its number), applied, measured, and taken back. With a batch size of 1 these are single edits.

    Args:
        on_batch: called with the number of edits done after each batch.

    Columns: batch (1 is the first), edits (ids, joined by commas), weight, regularizer, the regularizer's
    settings, the metrics of :func:`~harness_rect.measure.measure` averaged over the batch (the same in the
    rows of all its weights), update_norm (|dW|), and those of :func:`what_is_left`.
    """
    lm, size, found = session.lm, session.config.edit_batch_size, []
    probed = {edit.id: probes(lm, edit) for edit in session.edits}
    baseline = measure_baseline(lm, probed)
    for start in range(0, len(session.edits), size):
        edits = session.edits[start : start + size]
        ids = [edit.id for edit in edits]
        place = {"batch": start // size + 1, "edits": ",".join(ids)}
        updates = session.propose(edits).updates
        for regularizer in regularizers:
            edited = EditedWeights(lm, list(updates))
            edited.start()
            here = []
            for position, (name, update) in enumerate(updates.items()):
                original, weight = edited.originals[name], edited.masters[name].clone()
                proposed = update.dense().to(weight)
                left = trim(
                    regularizer,
                    update,
                    weight,
                    original,
                    state={},
                    weight=name,
                    place=(session.config.edit_seed, start // size, position),
                    transposed=lm.is_transposed(name),
                )
                trimmed = left.dense().to(weight)
                how = {"weight": name, "regularizer": regularizer.name} | regularizer.model_dump()
                norm = {"update_norm": float(proposed.norm())}
                here.append(how | norm | what_is_left(proposed, trimmed, weight))
                edited.add(name, trimmed)
            measured = averages(list(measure(lm, probed, baseline, ids).values()))
            edited.revert()
            found += [place | row | measured for row in here]
        if on_batch is not None:
            on_batch(start + len(edits))
    return found


def what_is_left(update: Tensor, trimmed: Tensor, weight: Tensor) -> dict[str, float | None]:
    """Describe a trimmed update beside the update it is made of.

    Args:
        update: dW. trimmed: dW'. weight: W just before the edit. All of one shape.

    Returns:
        norm_kept: |dW'| / |dW| in Frobenius norms, None for dW = 0. kept: share of elements that are not 0.
        kept_small_weight: share of the kept elements with |W| below the median of all |W|; where elements are
            kept without looking at W, it is about one half.
        overlap: |u^T dW' v| / |dW'| for the leading singular vectors u, v of dW. It is the same for dW and
            any multiple of it: 1 if dW has rank one. Of a mask of such an update it is norm_kept.
        rank_one_residual: |dW' - B| / |dW'| for the best approximation B of rank one; 0 for a multiple of an
            update of rank one.
        The last three are None where nothing is left.
    """
    dw, left = in_double(update), in_double(trimmed)
    mask, small = left != 0, in_double(weight).abs()
    whole, norm, count = float(dw.norm()), float(left.norm()), int(mask.sum())
    found = {"norm_kept": norm / whole if whole else None, "kept": count / mask.numel()}
    if not count:
        return found | dict.fromkeys(("kept_small_weight", "overlap", "rank_one_residual"))
    u, v = _leading(dw)
    own_u, own_v = _leading(left)
    best = torch.outer(own_u, own_v) * (own_u @ left @ own_v)
    return found | {
        "kept_small_weight": int((small < small.median())[mask].sum()) / count,
        "overlap": abs(float(u @ left @ v)) / norm,
        "rank_one_residual": float((left - best).norm()) / norm,
    }


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The left and right singular vectors of the largest singular value, float64."""
    wide = matrix.shape[0] <= matrix.shape[1]
    a = matrix if wide else matrix.T
    short = torch.linalg.eigh(a @ a.T).eigenvectors[:, -1]
    long = short @ a
    long = long / long.norm()
    return (short, long) if wide else (long, short)
