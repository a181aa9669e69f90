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

from dataclasses import replace
from functools import partial

from pydantic import Field

from harness_rect.methods.base import Context
from harness_rect.methods.key_history import Prior
from harness_rect.methods.memit import MEMIT, MassEditHyperParameters, propose_with, remember_facts


class AlphaEditHyperParameters(MassEditHyperParameters):
    """MEMIT's, and those of the projection. ``mom2_update_weight`` of published files has no effect.

    nullspace_threshold: eigenvalues of C below it span the space left to edits. L2: weight of |dW|^2.
    """

    nullspace_threshold: float = Field(default=2e-2, gt=0)
    L2: float = Field(default=10.0, gt=0)


def _prior(hparams: AlphaEditHyperParameters, context: Context, layer: int) -> Prior:
    moment = context.second_moment(layer)
    return lambda keys: moment.project_to_null_space(keys, hparams.nullspace_threshold) / hparams.L2


ALPHAEDIT = replace(
    MEMIT,
    name="alphaedit",
    title="AlphaEdit",
    paper="[Fang et al. 2025](https://arxiv.org/abs/2410.02355)",
    summary="as MEMIT, inside the null space of C, with the keys of all earlier batches",
    cost="as MEMIT, and one eigendecomposition of C for each layer",
    hparams=AlphaEditHyperParameters,
    propose=partial(propose_with, prior_of=_prior),
    after_step=partial(remember_facts, prior_of=_prior),
    ignored_keys=frozenset(("P_loc",)),  # where its code keeps P
)
