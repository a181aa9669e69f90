"""MEMIT: Mass-Editing Memory in a Transformer (Meng et al. 2023), and EMMET beside it.

A batch of B facts is spread over the down projections of blocks l_1..l_n. First, for each fact, the residual
stream z wanted at the output of block l_n at the subject's last token is searched as in ROME, with d added at
the block's output. Then for each layer in order, with the layers before it already updated,

    R    = (Z - output of block l_n at the bare prompts) / (n - i), i counted from 0   (eq. 20)
    dW_l = R K^T (lambda C + S + K K^T)^-1                                             (eq. 14)

where K (d_mlp x B) holds the facts' keys, each the mean over context types of the mean over that type's
templates (so the bare prompt weighs one half), C = E[k k^T] over text and lambda = mom2_update_weight. S is
zero, or with ``history: keys`` the sum of the key products of all earlier batches, each read from the model
as that batch left it (AlphaEdit's MEMIT for sequences). ``ridge`` adds a multiple of I beside it (ENCORE,
Gupta et al. 2025). The solve is in float64, see :mod:`harness_rect.methods.key_history`.

EMMET (Gupta et al. 2024, "A Unified Framework for Model Editing") makes the facts an equality constraint
instead: dW_l = R (K^T C^-1 K + emmet_lambda I)^-1 K^T C^-1, ROME's update for a batch.

As in the published code, C is the moment of the unedited model; ours is even where the cache is cold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.methods.base import Context, Method, MomentHyperParameters, Proposal, edit_in_order
from harness_rect.methods.contexts import check_number, check_templates, sample_templates
from harness_rect.methods.fact_reader import FactReader
from harness_rect.methods.key_history import Prior, norm_1, remember_keys, solve_with_history
from harness_rect.methods.nas import NasHyperParameters, anchored, with_reference_norms
from harness_rect.methods.value_search import Request, search_values
from harness_rect.models import Architecture, EditableLM
from harness_rect.models.forwards import fused_gelu
from harness_rect.precision import in_double
from harness_rect.updates import LowRank, Update

#: The two context types: the bare prompt, and this many sampled texts of at most so many tokens.
SAMPLED_CONTEXTS, SAMPLED_LENGTH = 5, 10
#: NAS skips a fact whose value is so many times larger than usual.
NAS_LIMIT = 2


class MassEditHyperParameters(NasHyperParameters, MomentHyperParameters):
    """Hyper-parameters that MEMIT, EMMET and AlphaEdit share, named as in their published files.

    layers: consecutive or not, edited in order; z is read at the output of the last.
    mom2_update_weight: lambda, the weight of what the model knew against the new facts.
    v_loss_layer: the block whose output goes through the final norm and head in the search; None: the last.
    context_templates: a list for each context type, at most 1,000 templates; fixes what is otherwise sampled.
    """

    layers: list[int] = Field(min_length=1)
    layer_selection: Literal["all"] = "all"
    v_loss_layer: int | None = None
    v_weight_decay: float = Field(default=0.5, ge=0)
    clamp_norm_factor: float = Field(default=0.75, gt=0)
    mom2_adjustment: Literal[True] = True
    mom2_update_weight: float = Field(default=15_000, gt=0)
    context_templates: list[list[str]] | None = None

    @model_validator(mode="after")
    def _reads_behind_the_change(self) -> MassEditHyperParameters:
        if self.v_loss_layer is not None and self.v_loss_layer <= max(self.layers):
            raise ValueError(
                f"v_loss_layer: expected a block behind the last edited one ({max(self.layers)})"
            )
        return self

    @field_validator("context_templates")
    @classmethod
    def _templates(cls, groups: list[list[str]] | None) -> list[list[str]] | None:
        check_number(sum(map(len, groups or ())))
        return None if groups is None else [check_templates(group) for group in groups]


class MemitHyperParameters(MassEditHyperParameters):
    """history: whether the keys of earlier batches are protected. ridge: added to the system's diagonal."""

    history: Literal["none", "keys"] = "none"
    ridge: float = Field(default=0.0, ge=0)


class EmmetHyperParameters(MassEditHyperParameters):
    """emmet_lambda: ridge of the facts' own system, which two facts with one key would make singular."""

    emmet_lambda: float = Field(default=0.1, ge=0)


def default_hparams(architecture: Architecture) -> dict[str, Any]:
    """For a model without a preset: up to five layers that end at about a third of the depth."""
    last = max(architecture.n_layers // 3, 1 if architecture.n_layers > 2 else 0)
    return {"layers": list(range(max(0, last - 4), last + 1))}


def contexts(lm: EditableLM, hparams: MassEditHyperParameters, seed: int) -> list[list[str]]:
    """The context types: those of the hyper-parameters, or the bare prompt and five sampled prefixes."""
    if hparams.context_templates is not None:
        return hparams.context_templates
    bare, *sampled = sample_templates(lm, [(SAMPLED_LENGTH, SAMPLED_CONTEXTS)], seed)
    return [[bare], sampled]


#: (layer, keys K (d_mlp, B), residuals R (d_model, B) float64) -> dW of that layer, as it is stored.
Solve = Callable[[int, Tensor, Tensor], Update]


def _search(
    lm: EditableLM, reader: FactReader, hparams: MassEditHyperParameters
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """(v0, d, what each search did).

    v0 is the output of the last edited block at the bare prompts, v0 + d the one wanted: (facts, d_model).
    """
    last = max(hparams.layers)
    with fused_gelu(lm.model):
        bare = reader.bare_outputs(last)
        found = search_values(
            lm,
            [Request(edit, v0) for edit, v0 in zip(reader.edits, bare, strict=True)],
            [template for group in reader.groups for template in group],
            last,
            hparams,
            at_block=True,
            loss_layer=hparams.v_loss_layer,
        )
    return bare, torch.stack([d for d, _ in found]), [trace for _, trace in found]


def _values(
    lm: EditableLM, edits: Sequence[Edit], hparams: MassEditHyperParameters, groups: list[Any], layer: int
) -> Tensor:
    """v* of each fact, (facts, d_model), which NAS measures: the MLP's part of the output wanted."""
    reader = FactReader(lm, edits, groups)
    return reader.bare_mlp_outputs(layer) + _search(lm, reader, hparams)[1]


def edit_layers(
    lm: EditableLM,
    edits: Sequence[Edit],
    hparams: MassEditHyperParameters,
    context: Context,
    solve: Solve,
) -> Proposal:
    """Updates of all layers for one batch of facts."""
    layers = sorted(set(hparams.layers))
    reader = FactReader(lm, edits, context.templates)
    bare, change, traces = _search(lm, reader, hparams)
    targets, skipped = bare + change, list[int]()
    if hparams.nas:
        with fused_gelu(lm.model):
            mlp = reader.bare_mlp_outputs(layers[-1])
        values, skipped = anchored(mlp + change, hparams, NAS_LIMIT)
        targets = bare - mlp + values
        norms = (mlp + change).norm(dim=1).tolist()
        traces = [trace | {"value_norm": norm} for trace, norm in zip(traces, norms, strict=True)]
    if skipped:
        kept = [i for i in range(len(edits)) if i not in skipped]
        if not kept:
            return Proposal({}, traces, skipped)
        reader = FactReader(lm, [edits[i] for i in kept], context.templates)
        bare, targets = bare[kept], targets[kept]

    def update_of(index: int, layer: int) -> Update:
        keys = reader.keys([layer], hold=True)[layer]
        outputs = reader.bare_outputs(layers[-1]) if index else bare
        residual = (targets - outputs.to(targets.device)) / (len(layers) - index)
        return solve(layer, keys.T, in_double(residual.T.to(keys.device)))

    return Proposal(edit_in_order(lm, layers, update_of), traces, skipped)


def product(lm: EditableLM, layer: int, residuals: Tensor, solved: Tensor) -> Update:
    """dW = R X^T as it is stored, for R (d_model, n) and X (d_mlp, n), both float64."""
    dtype = lm.weight(lm.architecture.weight_name(layer)).dtype
    update = LowRank(*lm.oriented(layer, residuals, solved))
    return update.smaller(torch.promote_types(dtype, torch.float32))


#: (hyper-parameters, context, layer) -> how A^-1 of that layer is applied (see key_history).
PriorOf = Callable[[Any, Context, int], Prior]


def propose_with(
    lm: EditableLM, edits: Sequence[Edit], hparams: Any, context: Context, *, prior_of: PriorOf
) -> Proposal:
    """Updates of all layers for one batch of facts, solved with ``prior_of`` and the keys remembered."""

    def solve(layer: int, keys: Tensor, residuals: Tensor) -> Update:
        prior = prior_of(hparams, context, layer)
        solved = solve_with_history(prior, keys, context.state, str(layer), context.note_keys(layer))
        return product(lm, layer, residuals, solved)

    return edit_layers(lm, edits, hparams, context, solve)


def keys_now(
    lm: EditableLM, edits: Sequence[Edit], hparams: MassEditHyperParameters, context: Context
) -> dict[int, Tensor]:
    """Edited layer -> K (d_mlp, B) of these facts in the model as it is."""
    with fused_gelu(lm.model):
        read = FactReader(lm, edits, context.templates).keys(sorted(set(hparams.layers)))
    return {layer: keys.T for layer, keys in read.items()}


def remember_facts(
    lm: EditableLM, edits: Sequence[Edit], hparams: Any, context: Context, *, prior_of: PriorOf
) -> None:
    """Add this batch's keys, read from the edited model, to S."""
    for layer, keys in keys_now(lm, edits, hparams, context).items():
        remember_keys(prior_of(hparams, context, layer), keys, context.state, str(layer))


def _prior(hparams: MemitHyperParameters, context: Context, layer: int) -> Prior:
    moment, weight = context.second_moment(layer), hparams.mom2_update_weight
    return lambda keys: moment.solve_columns(keys, hparams.ridge / weight) / weight


def _after_step(
    lm: EditableLM, edits: Sequence[Edit], hparams: MemitHyperParameters, context: Context
) -> None:
    if hparams.history == "keys":
        remember_facts(lm, edits, hparams, context, prior_of=_prior)


def propose_emmet(
    lm: EditableLM, edits: Sequence[Edit], hparams: EmmetHyperParameters, context: Context
) -> Proposal:
    """EMMET's updates of all layers for one batch of facts."""

    def solve(layer: int, keys: Tensor, residuals: Tensor) -> Update:
        solved = context.second_moment(layer).solve_columns(keys)
        system = in_double(keys).T @ solved
        system += hparams.emmet_lambda * torch.eye(len(system), dtype=system.dtype, device=system.device)
        least = hparams.emmet_lambda  # no eigenvalue is below it
        context.note_keys(layer)(norm_1(system) / least if least else float(torch.linalg.cond(system, 1)))
        try:
            return product(lm, layer, residuals, torch.linalg.solve(system, solved, left=False))
        except torch.linalg.LinAlgError:
            raise UserError(
                "emmet: two facts of a batch have the same key and cannot both hold; give emmet_lambda > 0"
            ) from None

    return edit_layers(lm, edits, hparams, context, solve)


MEMIT = Method(
    name="memit",
    title="MEMIT",
    paper="[Meng et al. 2023](https://arxiv.org/abs/2210.07229)",
    summary="several down projections, rank B each",
    needs="subject, second moments",
    cost="a value search (6 contexts) for each fact, all together; a B x B solve for each layer",
    hparams=MemitHyperParameters,
    default_hparams=default_hparams,
    propose=partial(propose_with, prior_of=_prior),
    prepare=partial(
        with_reference_norms,
        layers=lambda hparams: [max(hparams.layers)],
        contexts=contexts,
        find_values=_values,
    ),
    contexts=contexts,
    needs_statistics=lambda hparams: sorted(set(hparams.layers)),
    after_step=_after_step,
    batches=True,
    at_subject=True,
)
EMMET = replace(
    MEMIT,
    name="emmet",
    title="EMMET",
    paper="[Gupta et al. 2024](https://arxiv.org/abs/2403.14236)",
    summary="as MEMIT, facts as equality constraints",
    cost="as MEMIT",
    hparams=EmmetHyperParameters,
    propose=propose_emmet,
    after_step=lambda *arguments: None,
    presets="memit",
    ignored_keys=frozenset(("update_norm_lambda",)),
)
