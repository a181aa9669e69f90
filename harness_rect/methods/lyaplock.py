"""LyapLock (Wang et al., EMNLP 2025, "LyapLock: Bounded Knowledge Preservation in Sequential Large Language
Model Editing").

MEMIT's values, keys, residuals and order of layers, with a solve that also returns to what the model knew and
keeps earlier facts, and a weight of the former that grows with the drift D. With W the weight before a batch,
W_0 before all, V_0 K_0^T = W_0 C, and K_p, V_p = W_p K_p the keys and outputs of all earlier batches,

    dW = [V R K^T + a Z lambda (V_0 K_0^T - W C) + V (V_p K_p^T - W K_p K_p^T)] A^-1
    A  = V (K K^T + K_p K_p^T) + a Z lambda C
    D  = tr(C W^T W) - 2 tr(V_0 K_0^T W^T) + tr(V_0 V_0^T) = tr((W - W_0) C (W - W_0)^T)
    Z <- max(Z + a (D - alpha D_base) + b, sqrt(alpha D_base))        after each batch

where D_base is D after the first batch, a = 1 / sqrt(alpha D_base), and Z starts at sqrt(alpha D_base), so
that the first batch is MEMIT's with lambda = mom2_update_weight. W + dW is the solution of one regression:

    W + dW = W_0 + T X^T,   X = (a Z lambda / V C + J J^T)^-1 J,   J = [K_p, K],   T = [V_p, W K + R] - W_0 J

which is solved through the small system of :mod:`harness_rect.methods.key_history`. The update is dense from
the second batch on.

alpha, V and b are arguments of the published code and not in its files; in the first batch it takes V = 1
whatever is given. It takes keys, outputs and D from its own update; here they are read from the model as the
batch (trimmed and rounded) left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.base import Context, Proposal
from harness_rect.methods.key_history import solve_with_history
from harness_rect.methods.memit import MEMIT, MassEditHyperParameters, edit_layers, keys_now, product
from harness_rect.models import EditableLM
from harness_rect.precision import in_double
from harness_rect.updates import Dense, Update


class LyapLockHyperParameters(MassEditHyperParameters):
    """MEMIT's, and those of the bound on the drift.

    alpha: the drift that is allowed, in multiples of that after the first batch. V: weight of new and earlier
    facts. b: added to Z after each batch.
    """

    mom2_update_weight: float = Field(default=1000, gt=0)
    alpha: float = Field(default=60.0, gt=0)
    V: float = Field(default=1.0, gt=0)
    b: float = 0.0


def propose(
    lm: EditableLM, edits: Sequence[Edit], hparams: LyapLockHyperParameters, context: Context
) -> Proposal:
    """Updates of all layers for one batch of facts."""
    state = context.state

    def solve(layer: int, keys: Tensor, residuals: Tensor) -> Update:
        moment = context.second_moment(layer)
        z, floor = state.get(f"{layer}.queue", torch.ones(2)).tolist()
        weight = z / floor * hparams.mom2_update_weight / hparams.V  # a Z lambda / V
        change = _change(lm, layer, context)
        k, t = _with_earlier(layer, in_double(keys), residuals + change @ in_double(keys), state)
        note = context.note_keys(layer)
        x = solve_with_history(lambda columns: moment.solve_columns(columns) / weight, k, {}, "", note)
        if f"{layer}.keys" not in state:
            return product(lm, layer, t, x)
        left, right = lm.oriented(layer, t, x)
        name = lm.architecture.weight_name(layer)
        dtype = torch.promote_types(lm.weight(name).dtype, torch.float32)
        return Dense((left @ right.T - (change.T if lm.is_transposed(name) else change)).to(dtype))

    return edit_layers(lm, edits, hparams, context, solve)


def remember(
    lm: EditableLM, edits: Sequence[Edit], hparams: LyapLockHyperParameters, context: Context
) -> None:
    """Keep this batch's keys and outputs, read from the edited model, and let Z follow the drift."""
    state = context.state
    for layer, keys in keys_now(lm, edits, hparams, context).items():
        change = _change(lm, layer, context)
        k, t = _with_earlier(layer, in_double(keys), change @ in_double(keys), state)
        if k.shape[1] > len(k):  # as many columns as dimensions have the same J J^T and T J^T
            q, r = torch.linalg.qr(k.T)
            k, t = r.T, t @ q
        kept = {f"{layer}.keys": k, f"{layer}.values": t}
        drift = float((change @ context.second_moment(layer).mean.to(change) * change).sum())
        if f"{layer}.queue" in state:
            z, floor = state[f"{layer}.queue"].tolist()
        else:
            z = floor = (hparams.alpha * drift) ** 0.5
        if floor > 0:  # else nothing has changed yet, and the next batch is the first
            z = max(z + (drift - floor**2) / floor + hparams.b, floor)
            kept[f"{layer}.queue"] = torch.tensor([z, floor], dtype=torch.float64)
        state |= {name: value.contiguous().cpu() for name, value in kept.items()}


def _change(lm: EditableLM, layer: int, context: Context) -> Tensor:
    """W - W_0, (d_model, d_mlp) float64."""
    name = lm.architecture.weight_name(layer)
    change = in_double(lm.weight(name).data) - in_double(context.original(name))
    return change.T if lm.is_transposed(name) else change


def _with_earlier(
    layer: int, keys: Tensor, values: Tensor, state: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """J (d_mlp, n) and T (d_model, n): those of all earlier batches, and these."""
    if f"{layer}.keys" not in state:
        return keys, values
    before = state[f"{layer}.keys"].to(keys), state[f"{layer}.values"].to(values)
    return torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)


LYAPLOCK = replace(
    MEMIT,
    name="lyaplock",
    title="LyapLock",
    paper="[Wang et al. 2025](https://arxiv.org/abs/2505.15702)",
    summary="as MEMIT, from the original weights for all facts so far, the drift bounded; dense",
    cost="as MEMIT, and for each layer an n x n solve for all n facts so far and a product with C",
    hparams=LyapLockHyperParameters,
    propose=propose,
    after_step=remember,
)
