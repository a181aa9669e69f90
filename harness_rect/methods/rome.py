"""ROME: Rank-One Model Editing (Meng et al. 2022, "Locating and Editing Factual Associations in GPT").

One fact (subject s, prompt p, new target t) is written into the down projection W of one block l by a
rank-one update, seen as the insertion of a key-value pair:

    k* = mean over contexts x of the key at s's last token in x + p                (eq. 3)
    u  = C^-1 k* (or k* itself), normalised; C = E[k k^T] over text               (from eq. 2)
    v  = v0 + d, where d minimises                                                 (eq. 4)
           mean over x of NLL(t | x + p, MLP output at s := output + d) per target token
         + kl_factor * KL(p_d || p_0) of the next token after s in "s is a"
         + v_weight_decay * |d| / |v0|^2
    r  = (v - (W k + bias)) / (k . u)
    dW = r u^T

ROME takes k at the bare prompt, though u comes from the averaged k*. r-ROME (Gupta et al. 2024, "Rebuilding
ROME") uses k* in both places; the mismatch can make k . u small and the update explode.

Settings and their meaning are those of the published code, including what its text leaves out: the norm in
the decay term is not squared; the KL term is read at the subject's last token; the search stops at a loss
under 0.05 before the step; the last of ``v_num_grad_steps`` evaluations takes no step; after each step
|d| <= clamp_norm_factor * |v0|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.base import Context, Method, MomentHyperParameters, Proposal, edit_in_order
from harness_rect.methods.contexts import BARE, MOST_TOKENS, check_number, check_templates, sample_templates
from harness_rect.methods.nas import NasHyperParameters, anchored, with_reference_norms
from harness_rect.methods.value_search import Request, search_value, search_values, until_subject
from harness_rect.models import EditableLM
from harness_rect.updates import LowRank

#: NAS skips a fact whose value is so many times larger than usual.
NAS_LIMIT = 5


Length = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class RomeHyperParameters(NasHyperParameters, MomentHyperParameters):
    """Hyper-parameters of ROME, named as in its published files.

    layers: blocks edited one after the other, each with the updates of those before it in place.
    mom2_adjustment: whether u is C^-1 k*, normalised, or k*.
    context_template_length_params: (longest length in tokens, number of texts) pairs, lengths up to 1,000.
    context_templates: fixes the templates instead of sampling them. Of both at most 1,000 templates.
    """

    layers: list[int] = Field(min_length=1)
    v_weight_decay: float = Field(default=1e-3, ge=0)
    clamp_norm_factor: float = Field(default=4.0, gt=0)
    mom2_adjustment: bool = False
    context_template_length_params: tuple[tuple[Length, PositiveInt], ...] = ((5, 10), (10, 10))
    context_templates: list[str] | None = None

    @field_validator("context_template_length_params")
    @classmethod
    def _not_too_many(cls, params: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        check_number(sum(count for _, count in params))
        return params

    @field_validator("context_templates")
    @classmethod
    def _templates(cls, templates: list[str] | None) -> list[str] | None:
        return None if templates is None else check_templates(templates)


def contexts(lm: EditableLM, hparams: RomeHyperParameters, seed: int) -> list[str]:
    """The templates of the hyper-parameters, or ``{}`` and sampled ones."""
    if hparams.context_templates is not None:
        return hparams.context_templates
    return sample_templates(lm, hparams.context_template_length_params, seed)


@dataclass(frozen=True)
class _Key:
    """Key and W k + bias, float32: (d_mlp,), (d_model,)."""

    key: Tensor
    output: Tensor


def _keys(lm: EditableLM, edit: Edit, templates: Sequence[str], layer: int) -> tuple[_Key, _Key]:
    """(averaged over the templates, bare prompt) from one forward pass ending at the layer."""
    batch = lm.batch([until_subject(lm, edit, template) for template in [*templates, BARE]])
    keys, outputs = lm.down_projection_io([layer], batch, batch.last)[layer]
    return _Key(keys[:-1].mean(0), outputs[:-1].mean(0)), _Key(keys[-1], outputs[-1])


def propose(
    lm: EditableLM,
    edits: Sequence[Edit],
    hparams: RomeHyperParameters,
    context: Context,
    *,
    average_key_everywhere: bool,
) -> Proposal:
    """The rank-one update of each layer for one fact, each with the layers before it updated already.

    Raises UserError for prompts the model cannot read.
    """
    (edit,) = edits
    details: dict[str, Any] = {}

    def update_of(index: int, layer: int) -> LowRank | None:
        averaged, bare = _keys(lm, edit, context.templates, layer)
        u = averaged.key
        if hparams.mom2_adjustment:
            u = context.second_moment(layer).solve(averaged.key)
        u = u / u.norm()
        d, trace = search_value(lm, edit, context.templates, layer, bare.output, hparams, at_block=False)
        details[str(layer)] = trace
        if hparams.nas:
            (value,), skipped = anchored((bare.output + d).unsqueeze(0), hparams, NAS_LIMIT, index)
            trace["value_norm"] = (bare.output + d).norm().item()
            if skipped:
                return None
            d = value - bare.output
        replaced = averaged if average_key_everywhere else bare
        overlap = replaced.key @ u
        r = (bare.output + d - replaced.output) / overlap
        trace |= {"key_overlap": overlap.item(), "key_norm": replaced.key.norm().item()}
        return LowRank(*lm.oriented(layer, r.unsqueeze(1), u.unsqueeze(1)))

    updates = edit_in_order(lm, sorted(set(hparams.layers)), update_of)
    return Proposal(updates, [{"layers": details}], skipped=[] if updates else [0])


def _values(
    lm: EditableLM, edits: Sequence[Edit], hparams: RomeHyperParameters, templates: list[str], layer: int
) -> Tensor:
    """v of each fact, (facts, d_model), which NAS measures."""
    batch = lm.batch([until_subject(lm, edit, BARE) for edit in edits])
    _, v0 = lm.down_projection_io([layer], batch, batch.last)[layer]
    requests = [Request(edit, v) for edit, v in zip(edits, v0, strict=True)]
    found = search_values(lm, requests, templates, layer, hparams, at_block=False)
    return v0 + torch.stack([d for d, _ in found])


ROME = Method(
    name="rome",
    title="ROME",
    paper="[Meng et al. 2022](https://arxiv.org/abs/2202.05262)",
    summary="one down projection, rank one",
    needs="subject; second moments if `mom2_adjustment`",
    cost="value search: 20 to 25 partial passes over 21 contexts",
    hparams=RomeHyperParameters,
    default_hparams=lambda architecture: {"layers": [architecture.n_layers // 3]},
    contexts=contexts,
    propose=partial(propose, average_key_everywhere=False),
    prepare=partial(
        with_reference_norms,
        layers=lambda hparams: sorted(set(hparams.layers)),
        contexts=contexts,
        find_values=_values,
    ),
    needs_statistics=lambda hparams: sorted(hparams.layers) if hparams.mom2_adjustment else [],
    at_subject=True,
    presets="rome",
)
R_ROME = replace(
    ROME,
    name="r_rome",
    propose=partial(propose, average_key_everywhere=True),
    title="r-ROME",
    paper="[Gupta et al. 2024](https://arxiv.org/abs/2403.07175)",
    summary="as ROME, the averaged key everywhere",
    needs="as ROME",
    cost="as ROME",
)
