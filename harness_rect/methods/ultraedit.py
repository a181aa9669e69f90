"""UltraEdit (Gu et al. 2025, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing", arXiv
2505.14679).

One forward and one backward pass a batch. At the places that predict the target tokens, each edited matrix
gives its input h (d_in) and the gradient g (d_out) of the NLL at its output. Running means and standard
deviations of [h; g] over the whole stream, this batch included, normalise both, and with H the rows h and

    v = - lr |h^|^2 g^          (h^, g^ normalised)
    dW^T = (H^T H + I)^-1 H^T V

written as H^T (H H^T + I)^-1 V, a system of the size of the batch's target tokens. Matrices of one shape
share their statistics, as in the published code. A stream's very first token has no deviation from its mean,
so a first batch of one token changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.base import Context, HyperParameters, LowRank, Method, Proposal, Update
from harness_rect.methods.gradients import inputs_and_gradients, targets_of, token_nll
from harness_rect.models import Architecture, EditableLM
from harness_rect.statistics.running import Running

EPSILON = torch.finfo(torch.float32).eps


class UltraEditHyperParameters(HyperParameters):
    """lr: eta of the paper. layers: blocks whose down projections are edited."""

    layers: list[int] = Field(min_length=1)
    lr: float = Field(default=1e-6, gt=0)


def default_hparams(architecture: Architecture) -> dict[str, Any]:
    """For a model without a preset: the blocks from two thirds of the depth on, the last left out."""
    n = architecture.n_layers
    first = min(2 * n // 3, max(0, n - 2))
    return {"layers": list(range(first, max(first + 1, n - 1)))}


def propose(
    lm: EditableLM, edits: Sequence[Edit], hparams: UltraEditHyperParameters, context: Context
) -> Proposal:
    """Updates of all layers for one batch of facts; the running statistics go into ``context.state``."""
    layers = sorted(set(hparams.layers))
    targets = targets_of(lm, [lm.encoder.continuation(edit.text, edit.target) for edit in edits])
    nll: list[Tensor] = []

    def loss() -> Tensor:
        nll.append(token_nll(lm, targets))
        return (nll[0] * targets.weights).sum()  # each fact's mean: the published code passes one at a time

    modules = [lm.architecture.down_projections[layer] for layer in layers]
    _, found = inputs_and_gradients(lm, modules, targets.batch, loss)
    rows = {
        m: (x[targets.rows, targets.positions], g[targets.rows, targets.positions])
        for m, (x, g) in found.items()
    }
    for h, g in rows.values():
        _welford(context.state, torch.cat([h, g], 1))
    updates: dict[str, Update] = {}
    for layer, module in zip(layers, modules, strict=True):
        h, g = rows[module]
        normal = _normalised(context.state, torch.cat([h, g], 1))
        h_hat, g_hat = normal.split([h.shape[1], g.shape[1]], 1)
        v = -hparams.lr * h_hat.square().sum(1, keepdim=True) * g_hat
        system = h @ h.T + torch.eye(len(h), dtype=h.dtype, device=h.device)
        # H^T (H H^T + I)^-1 V in two factors: keys H^T, values (H H^T + I)^-1 V.
        values = torch.linalg.solve(system.double(), v.double())
        updates[lm.architecture.weight_name(layer)] = LowRank(*lm.oriented(layer, values.T, h.T.double()))
    each = torch.zeros(len(edits), device=nll[0].device).index_add(
        0, targets.rows.to(nll[0].device), nll[0].detach() * targets.weights
    )
    return Proposal(updates, [{"nll": value} for value in each.tolist()])


def _welford(state: dict[str, Tensor], x: Tensor) -> None:
    """Take rows x (n, d) into the statistics of their width."""
    name = str(x.shape[1])
    running = _statistics(state, x) if f"{name}.n" in state else Running.empty(x.shape[1], x.device)
    running = running.updated(x)
    state[f"{name}.n"] = running.count.cpu()
    state[f"{name}.mean"] = running.mean.cpu()
    state[f"{name}.squares"] = running.squares.cpu()


def _statistics(state: dict[str, Tensor], x: Tensor) -> Running:
    name = str(x.shape[1])
    return Running(*(state[f"{name}.{part}"].to(x.device) for part in ("n", "mean", "squares")))


def _normalised(state: dict[str, Tensor], x: Tensor) -> Tensor:
    running = _statistics(state, x)
    return ((x - running.mean) / (running.deviation + EPSILON)).to(x.dtype)


ULTRAEDIT = Method(
    name="ultraedit",
    hparams=UltraEditHyperParameters,
    default_hparams=default_hparams,
    propose=propose,
    batches=True,
)
