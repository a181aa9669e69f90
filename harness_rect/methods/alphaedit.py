"""AlphaEdit (Fang et al., ICLR 2025, "AlphaEdit: Null-Space Constrained Knowledge Editing for Language
Models").

MEMIT's values, keys, residuals and order of layers, with another solve: the update may only act on keys that
text hardly ever has. With P the projector onto the eigenvectors of C = E[k k^T] whose eigenvalue is below
``nullspace_threshold``, and S the sum of the key products of all earlier batches,

    dW^T = (P (S + K K^T) + L2 I)^-1 P K R^T

solved through the small system of :mod:`harness_rect.methods.key_history`, P / L2 taking the place of A^-1.
The keys of a batch enter S with the model as that batch (trimmed and rounded) left it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.base import Context, Method, Proposal
from harness_rect.methods.key_history import Prior, remember_keys, solve_with_history
from harness_rect.methods.memit import (
    MassEditHyperParameters,
    contexts,
    default_hparams,
    edit_layers,
    fact_keys,
)
from harness_rect.models import EditableLM


class AlphaEditHyperParameters(MassEditHyperParameters):
    """MEMIT's, and what the projection needs. ``mom2_update_weight``, which its files hold, plays no part.

    nullspace_threshold: eigenvalues of C below it span the space left to edits. L2: weight of |dW|^2.
    """

    nullspace_threshold: float = Field(default=2e-2, gt=0)
    L2: float = Field(default=10.0, gt=0)


def _prior(hparams: AlphaEditHyperParameters, context: Context, layer: int) -> Prior:
    moment = context.second_moment(layer)
    return lambda keys: moment.project_to_null_space(keys, hparams.nullspace_threshold) / hparams.L2


def propose(
    lm: EditableLM, edits: Sequence[Edit], hparams: AlphaEditHyperParameters, context: Context
) -> Proposal:
    """Updates of all layers for one batch of facts. The model is as it was when this returns."""

    def adjust(layer: int, keys: Tensor) -> Tensor:
        return solve_with_history(_prior(hparams, context, layer), keys, context.state, str(layer))

    return edit_layers(lm, edits, hparams, context, adjust)


def after_step(
    lm: EditableLM, edits: Sequence[Edit], hparams: AlphaEditHyperParameters, context: Context
) -> None:
    """Add this batch's keys, read from the edited model, to S."""
    for layer in sorted(set(hparams.layers)):
        keys = fact_keys(lm, edits, layer, context.templates).T
        remember_keys(_prior(hparams, context, layer), keys, context.state, str(layer))


ALPHAEDIT = Method(
    name="alphaedit",
    hparams=AlphaEditHyperParameters,
    default_hparams=default_hparams,
    propose=propose,
    contexts=contexts,
    needs_statistics=lambda hparams: sorted(set(hparams.layers)),
    after_step=after_step,
    batches=True,
    at_subject=True,
    set_aside=frozenset(("P_loc",)),  # where its code keeps P
)
