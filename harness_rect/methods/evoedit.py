"""EvoEdit (Lyu et al., ACL 2026, "EvoEdit: Evolving Null-space Alignment for Robust and Efficient Knowledge
Editing").

AlphaEdit with a projector that shrinks instead of a sum of key products. P starts as AlphaEdit's, and

    dW = R (K^T P K + L2 I)^-1 (P K)^T
    P <- P - Q Q^T after each batch,  Q the left singular vectors of P K with s > max(d_mlp, B) eps s_1

so that no later update acts on the keys of earlier batches at all. P is kept as AlphaEdit's and all Q.

As in the published code, directions with s <= 1e-10 are rounding and not removed either. That code computes
in float32 with 1e-6 added to the B x B system, leaves out a batch whose |P K| or mean residual is tiny, and
takes Q from the keys that it solved with; here the keys are read from the model as the batch (trimmed and
rounded) left it, which are the same where nothing is trimmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from harness_rect.edits import Edit
from harness_rect.methods.alphaedit import ALPHAEDIT, AlphaEditHyperParameters
from harness_rect.methods.base import Context
from harness_rect.methods.key_history import Prior
from harness_rect.methods.memit import keys_now, propose_with
from harness_rect.models import EditableLM
from harness_rect.precision import in_double

#: Singular values of P K up to here are rounding.
ROUNDING = 1e-10


def _projector(hparams: AlphaEditHyperParameters, context: Context, layer: int) -> Prior:
    moment, removed = context.second_moment(layer), context.state.get(f"{layer}.removed")

    def project(columns: torch.Tensor) -> torch.Tensor:
        x = moment.project_to_null_space(columns, hparams.nullspace_threshold)
        if removed is None:
            return x
        q = removed.to(x)
        return x - q @ (q.T @ x)

    return project


def _prior(hparams: AlphaEditHyperParameters, context: Context, layer: int) -> Prior:
    project = _projector(hparams, context, layer)
    return lambda keys: project(keys) / hparams.L2


def shrink_projectors(
    lm: EditableLM, edits: Sequence[Edit], hparams: AlphaEditHyperParameters, context: Context
) -> None:
    """Take the keys of this batch, read from the edited model, out of P."""
    for layer, keys in keys_now(lm, edits, hparams, context).items():
        projected = _projector(hparams, context, layer)(in_double(keys))
        q, s, _ = torch.linalg.svd(projected, full_matrices=False)
        limit = max(projected.shape) * torch.finfo(s.dtype).eps * float(s[0])
        new = q[:, s > max(limit, ROUNDING)].cpu()
        before = context.state.get(f"{layer}.removed", new[:, :0])
        context.state[f"{layer}.removed"] = torch.cat([before, new], 1).contiguous()


EVOEDIT = replace(
    ALPHAEDIT,
    name="evoedit",
    title="EvoEdit",
    paper="[Lyu et al. 2026](https://arxiv.org/abs/2510.13851)",
    summary="as AlphaEdit, in a null space from which the keys of earlier batches are removed",
    cost="as AlphaEdit",
    propose=partial(propose_with, prior_of=_prior),
    after_step=shrink_projectors,
    ignored_keys=frozenset(("apply_woodbury",)),
)
