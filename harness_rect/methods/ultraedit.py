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
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.methods.base import Context, HyperParameters, Method, Proposal, down_projections
from harness_rect.methods.gradients import target_gradients
from harness_rect.methods.key_history import norm_1
from harness_rect.models import Architecture, EditableLM
from harness_rect.moments.running import Running
from harness_rect.precision import in_double
from harness_rect.updates import LowRank, Update

EPSILON = torch.finfo(torch.float32).eps


class UltraEditHyperParameters(HyperParameters):
    """Hyper-parameters of UltraEdit, named as in its published files.

    layers: blocks whose down projections are edited, unless inner_params names MLP matrices. lr: eta of the
    paper.
    token: the positions whose rows are used: those that predict the target (``ans``), or all (``mask``).
    """

    layers: list[int] = Field(default_factory=list)
    inner_params: list[str] | None = None
    lr: float = Field(default=1e-6, gt=0)
    token: Literal["ans", "mask"] = "ans"

    @model_validator(mode="after")
    def _either(self) -> UltraEditHyperParameters:
        if bool(self.layers) == bool(self.inner_params):
            raise ValueError("expected either layers or inner_params")
        return self


def default_hparams(architecture: Architecture) -> dict[str, Any]:
    """For a model without a preset: the blocks from two thirds of the depth on, the last left out."""
    n = architecture.n_layers
    first = min(2 * n // 3, max(0, n - 2))
    return {"layers": list(range(first, max(first + 1, n - 1)))}


def edited_weights(lm: EditableLM, hparams: UltraEditHyperParameters) -> list[str]:
    """Names of the edited weights; inner_params may leave out ``.weight``, as the published files do."""
    if hparams.inner_params is None:
        return down_projections(lm, hparams)
    matrices = {_in_block(name): name for block in lm.architecture.mlp_matrices for name in block}
    names = [name.removesuffix(".weight") for name in hparams.inner_params]
    for name in names:
        if _in_block(name) not in matrices:
            first = min(matrices.values())
            raise UserError(
                f"inner_params: {name} is not an MLP matrix of this model; those are {first}, ..."
            )
    return [f"{matrices[_in_block(name)]}.weight" for name in names]


def _in_block(name: str) -> str:
    """``52.mlp.up_proj``: what stands before it depends on the version of transformers."""
    return ".".join(name.split(".")[-3:])


def propose(
    lm: EditableLM, edits: Sequence[Edit], hparams: UltraEditHyperParameters, context: Context
) -> Proposal:
    """Updates of all layers for one batch of facts; the running statistics go into ``context.state``."""
    weights = edited_weights(lm, hparams)
    # The sum of the facts' means: the published code passes one fact at a time.
    targets, found, details = target_gradients(
        lm, edits, weights, lambda targets, nll: (nll * targets.weights).sum()
    )
    which, where = targets.rows, targets.positions
    if hparams.token == "mask":
        which, where = targets.batch.mask.cpu().nonzero().T
    rows = {name: torch.cat([x[which, where], g[which, where]], 1) for name, (x, g) in found.items()}
    for each in rows.values():
        wide = in_double(each)
        running = _statistics(context.state, wide).updated(wide)
        parts = vars(running).items()
        context.state.update({f"{wide.shape[1]}.{part}": value.cpu() for part, value in parts})
    updates: dict[str, Update] = {}
    for name, each in rows.items():
        wide = in_double(each)
        running = _statistics(context.state, wide)
        widths = lm.widths(name)
        h = each[:, : widths[0]]
        normal = ((wide - running.mean) / (running.deviation + EPSILON)).to(each)
        h_hat, g_hat = normal.split(widths, 1)
        v = -hparams.lr * h_hat.square().sum(1, keepdim=True) * g_hat
        system = h @ h.T + torch.eye(len(h), dtype=h.dtype, device=h.device)
        context.note_keys(name.removesuffix(".weight"))(norm_1(system))  # no eigenvalue is below 1
        # H^T (H H^T + I)^-1 V in two factors: keys H^T, values (H H^T + I)^-1 V.
        values = torch.linalg.solve(in_double(system), in_double(v))
        factors = values.T, in_double(h.T)
        updates[name] = LowRank(*(reversed(factors) if lm.is_transposed(name) else factors))
    return Proposal(updates, details)


def _statistics(state: dict[str, Tensor], rows: Tensor) -> Running:
    """The statistics of all earlier rows of this width, on the device of ``rows`` (n, d)."""
    width = rows.shape[1]
    if f"{width}.count" not in state:
        return Running.empty(width, rows.device)
    return Running(*(state[f"{width}.{part}"].to(rows.device) for part in ("count", "mean", "squares")))


ULTRAEDIT = Method(
    name="ultraedit",
    title="UltraEdit",
    paper="[Gu et al. 2025](https://arxiv.org/abs/2505.14679)",
    summary="down projections of several blocks",
    needs="nothing; running statistics over the stream",
    cost="one forward and one backward pass",
    hparams=UltraEditHyperParameters,
    default_hparams=default_hparams,
    propose=propose,
    weights=edited_weights,
    batches=True,
    ignored_keys=frozenset(
        ("alg", "dropout", "no_grad_layers", "batch_size_once", "editor_batch_size", "silent", "half")
    ),
)
