"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023).

A batch of B facts is spread over the down projections of blocks l_1..l_n. First, for each fact, the residual
stream z wanted at the output of block l_n at the subject's last token is searched as in ROME, with d added at
the block's output. Then for each layer in order, with the layers before it already updated,

    R    = (Z - output of block l_n at the bare prompts) / (n - i), i counted from 0   (eq. 20)
    dW_l = R K^T (lambda C + K K^T)^-1                                                 (eq. 14)

where K (d_mlp x B) holds the facts' keys, each the mean over context types of the mean over that type's
templates (so the bare prompt weighs one half), C = E[k k^T] over text and lambda = mom2_update_weight. The
solve is in float64, through the B x B system that Woodbury's identity leaves: with G = C^-1 K / lambda,
(lambda C + K K^T)^-1 K = G (I + K^T G)^-1.

As in the published code, C is the moment of the unedited model; ours is even where the cache is cold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.base import Context, HyperParameters, LowRank, Method, Proposal
from harness_rect.methods.contexts import check_templates, fill, sample_templates
from harness_rect.methods.value_search import search_value, subject_position
from harness_rect.models import Architecture, EditableLM

#: The two context types: the bare prompt, and this many sampled texts of at most so many tokens.
SAMPLED_CONTEXTS, SAMPLED_LENGTH = 5, 10


class MemitHyperParameters(HyperParameters):
    """Hyper-parameters of MEMIT, named as in its published files.

    layers: consecutive or not, edited in order; z is read at the output of the last.
    mom2_update_weight: lambda, the weight of what the model knew against the new facts.
    v_loss_layer: the block whose output goes through the final norm and head in the search; None: the last.
    context_templates: a list for each context type; fixes what is otherwise sampled.
    """

    layers: list[int] = Field(min_length=1)
    layer_selection: Literal["all"] = "all"
    fact_token: Literal["subject_last"] = "subject_last"
    v_num_grad_steps: int = Field(default=25, ge=1)
    v_lr: float = Field(default=0.5, gt=0)
    v_loss_layer: int | None = None
    v_weight_decay: float = Field(default=0.5, ge=0)
    clamp_norm_factor: float = Field(default=0.75, gt=0)
    kl_factor: float = Field(default=0.0625, ge=0)
    mom2_adjustment: Literal[True] = True
    mom2_update_weight: float = Field(default=15_000, gt=0)
    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = Field(default=100_000, ge=1)
    mom2_dtype: Literal["float32", "float64"] = "float32"
    context_templates: list[list[str]] | None = None

    @field_validator("context_templates")
    @classmethod
    def _templates(cls, groups: list[list[str]] | None) -> list[list[str]] | None:
        return None if groups is None else [check_templates(group) for group in groups]


def default_hparams(architecture: Architecture) -> dict[str, Any]:
    """For a model without a preset: up to five layers that end at about a third of the depth."""
    last = max(architecture.n_layers // 3, 1 if architecture.n_layers > 2 else 0)
    return {"layers": list(range(max(0, last - 4), last + 1))}


def contexts(lm: EditableLM, hparams: MemitHyperParameters, seed: int) -> list[list[str]]:
    """The context types: those of the hyper-parameters, or the bare prompt and five sampled prefixes."""
    if hparams.context_templates is not None:
        return hparams.context_templates
    bare, *sampled = sample_templates(lm, [(SAMPLED_LENGTH, SAMPLED_CONTEXTS)], seed)
    return [[bare], sampled]


def propose(
    lm: EditableLM, edits: Sequence[Edit], hparams: MemitHyperParameters, context: Context
) -> Proposal:
    """Updates of all layers for one batch of facts. The model is as it was when this returns."""
    layers = sorted(set(hparams.layers))
    last = layers[-1]
    flat = [template for group in context.templates for template in group]
    bare = block_outputs(lm, edits, last)
    z, details = [], []
    for edit, v0 in zip(edits, bare, strict=True):
        d, trace = search_value(lm, edit, flat, lm.block(last), v0, hparams, _read_block(lm, hparams))
        z.append(v0 + d)
        details.append(trace)
    targets = torch.stack(z)
    updates: dict[str, LowRank] = {}
    names = [lm.architecture.weight_name(layer) for layer in layers]
    with lm.weights_restored(names[:-1]):
        for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
            keys = fact_keys(lm, edits, layer, context.templates)
            residual = (targets - block_outputs(lm, edits, last)) / (len(layers) - index)
            adjusted = context.second_moment(layer).solve_with_keys(keys.T, hparams.mom2_update_weight)
            updates[name] = LowRank(*lm.oriented(layer, residual.T.double(), adjusted))
            if layer != last:
                weight = lm.weight(name).data
                weight += updates[name].dense().to(weight)
    return Proposal(updates, details)


def _read_block(lm: EditableLM, hparams: MemitHyperParameters) -> Any:
    """The block the search reads, or None where the model's own logits are that."""
    layer = hparams.v_loss_layer
    return None if layer is None or layer == lm.architecture.n_layers - 1 else lm.block(layer)


def block_outputs(lm: EditableLM, edits: Sequence[Edit], layer: int) -> Tensor:
    """(B, d_model) float32: output of block ``layer`` at the subject's last token of the bare prompts."""
    batch = lm.batch([lm.encoder.ids(edit.text) for edit in edits])
    return lm.block_output(layer, batch, [subject_position(lm, edit, "{}") for edit in edits])


def fact_keys(lm: EditableLM, edits: Sequence[Edit], layer: int, groups: Sequence[Sequence[str]]) -> Tensor:
    """(B, d_mlp) float32: each fact's key, the mean over context types of the mean over their templates."""
    keys = []
    for edit in edits:
        texts = [(template, fill(template, edit.text)) for group in groups for template in group]
        batch = lm.batch([lm.encoder.ids(text) for _, text in texts])
        positions = [subject_position(lm, edit, template) for template, _ in texts]
        found, _ = lm.down_projection_io([layer], batch, positions)[layer]
        means = [group.mean(0) for group in found.split([len(group) for group in groups])]
        keys.append(torch.stack(means).mean(0))
    return torch.stack(keys)


MEMIT = Method(
    name="memit",
    hparams=MemitHyperParameters,
    default_hparams=default_hparams,
    contexts=contexts,
    propose=propose,
    needs_statistics=lambda hparams: sorted(set(hparams.layers)),
    batches=True,
)
