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
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from harness_rect.edits import Edit
from harness_rect.methods.base import Context, HyperParameters, LowRank, Method, Proposal
from harness_rect.methods.contexts import check_templates, fill
from harness_rect.models import Architecture, EditableLM
from harness_rect.models.lm import unflatten

LOSS_FLOOR = 5e-2
KL_PROMPT = "{} is a"


class RomeHyperParameters(HyperParameters):
    """Hyper-parameters of ROME, named as in its published files.

    layers: blocks edited one after the other, each with the updates of those before it in place.
    mom2_*: which second moments to use (see ``harness_rect.statistics``).
    context_templates: fixes the templates instead of sampling them.
    """

    layers: list[int] = Field(min_length=1)
    fact_token: Literal["subject_last"] = "subject_last"
    v_num_grad_steps: int = Field(default=25, ge=1)
    v_lr: float = Field(default=0.5, gt=0)
    v_weight_decay: float = Field(default=1e-3, ge=0)
    clamp_norm_factor: float = Field(default=4.0, gt=0)
    kl_factor: float = Field(default=0.0625, ge=0)
    mom2_adjustment: bool = False
    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = Field(default=100_000, ge=1)
    mom2_dtype: Literal["float32", "float64"] = "float32"
    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    context_templates: list[str] | None = None

    @field_validator("context_templates")
    @classmethod
    def _templates(cls, templates: list[str] | None) -> list[str] | None:
        return None if templates is None else check_templates(templates)


def default_hparams(architecture: Architecture) -> dict[str, Any]:
    """For a model without a preset: one layer at about a third of the depth, no second moments."""
    return {"layers": [architecture.n_layers // 3]}


@dataclass(frozen=True)
class _Search:
    """One fact's prompts as a batch: ``contexts`` rows with the target, then one row with the KL prompt."""

    sequences: list[list[int]]
    subject_positions: list[int]
    target_starts: list[int]  # index of the logits that predict the first target token, per context
    target: list[list[int]]


def _searches(lm: EditableLM, edit: Edit, templates: Sequence[str]) -> _Search:
    sequences, positions, starts, targets = [], [], [], []
    for template in templates:
        text = fill(template, edit.text)
        prompt, target = lm.encoder.continuation(text, edit.target)
        sequences.append(prompt + target[:-1])
        positions.append(_subject_position(lm, edit, template))
        starts.append(len(prompt) - 1)
        targets.append(target)
    kl_text = fill(KL_PROMPT, edit.subject)
    sequences.append(lm.encoder.ids(kl_text))
    positions.append(lm.encoder.token_at(kl_text, len(edit.subject) - 1))
    return _Search(sequences, positions, starts, targets)


def _subject_position(lm: EditableLM, edit: Edit, template: str) -> int:
    """Index of the subject's last token in the prompt under ``template``."""
    offset = template.index("{}")
    return lm.encoder.token_at(fill(template, edit.text), offset + edit.subject_span[1] - 1)


@dataclass(frozen=True)
class _Key:
    """Key and W k + bias, float32: (d_mlp,), (d_model,)."""

    key: Tensor
    output: Tensor


def _keys(lm: EditableLM, edit: Edit, templates: Sequence[str], layer: int) -> tuple[_Key, _Key]:
    """(averaged over the templates, bare prompt) from one forward pass ending at the layer."""
    texts = [fill(template, edit.text) for template in templates] + [edit.text]
    positions = [_subject_position(lm, edit, template) for template in [*templates, "{}"]]
    batch = lm.batch([lm.encoder.ids(text) for text in texts])
    keys, outputs = lm.down_projection_io([layer], batch, positions)[layer]
    return _Key(keys[:-1].mean(0), outputs[:-1].mean(0)), _Key(keys[-1], outputs[-1])


def optimise_value(
    lm: EditableLM, edit: Edit, templates: Sequence[str], layer: int, v0: Tensor, hparams: RomeHyperParameters
) -> tuple[Tensor, dict[str, Any]]:
    """Search d of eq. 4 by Adam.

    Args:
        v0: the down projection's output at the bare prompt, (d_model,), float32.

    Returns:
        d, (d_model,), float32, and what the search did: evaluations, last loss terms, norms.
    """
    search = _searches(lm, edit, templates)
    batch = lm.batch(search.sequences)
    device = v0.device
    rows = torch.arange(len(search.sequences))
    where = torch.tensor(search.subject_positions)
    n_contexts = len(search.target)
    d = torch.zeros_like(v0, requires_grad=True)
    optimiser = torch.optim.Adam([d], lr=hparams.v_lr)
    v0_norm = v0.norm()

    def add_d(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        out = unflatten(output, batch).clone()
        out[rows, where] = (out[rows, where].float() + d).to(out.dtype)
        return out.view_as(output)

    handle = lm.down_projection(layer).register_forward_hook(add_d)
    kl_before: Tensor | None = None
    trace: list[dict[str, float]] = []
    try:
        for step in range(hparams.v_num_grad_steps):
            with torch.enable_grad():
                logits = lm.logits(batch)
                kl_after = logits[-1, where[-1]].float().log_softmax(-1)
                if kl_before is None:
                    kl_before = kl_after.detach()
                nll = torch.stack(
                    [
                        _mean_nll(logits[i, start : start + len(ids)], ids)
                        for i, (start, ids) in enumerate(
                            zip(search.target_starts, search.target, strict=True)
                        )
                    ]
                )
                nll_mean = nll.sum().to(device) / n_contexts
                kl = hparams.kl_factor * (kl_after.exp() * (kl_after - kl_before)).sum().to(device)
                decay = hparams.v_weight_decay * d.norm() / v0_norm**2
                loss = nll_mean + kl + decay
            trace.append(
                {"loss": loss.item(), "nll": nll_mean.item(), "kl": kl.item(), "decay": decay.item()}
            )
            if loss < LOSS_FLOOR or step == hparams.v_num_grad_steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                limit = hparams.clamp_norm_factor * v0_norm
                if d.norm() > limit:
                    d.mul_(limit / d.norm())
    finally:
        handle.remove()
    d = d.detach()
    return d, {
        "evaluations": len(trace),
        **trace[-1],
        "first_nll": trace[0]["nll"],
        "v0_norm": v0_norm.item(),
        "d_norm": d.norm().item(),
    }


def _mean_nll(logits: Tensor, ids: Sequence[int]) -> Tensor:
    log_probs = logits.float().log_softmax(-1)
    return -log_probs[torch.arange(len(ids)), torch.tensor(ids)].mean()


def propose(
    lm: EditableLM,
    edits: Sequence[Edit],
    hparams: RomeHyperParameters,
    context: Context,
    *,
    average_key_everywhere: bool,
) -> Proposal:
    """The rank-one update of each layer for one fact, each with the layers before it updated already.

    The model is as it was when this returns. Raises UserError for prompts the model cannot read.
    """
    (edit,) = edits
    layers = sorted(set(hparams.layers))
    updates: dict[str, LowRank] = {}
    detail: dict[str, Any] = {}
    before: dict[str, Tensor] = {}
    try:
        for layer in layers:
            update, detail[str(layer)] = _layer_update(
                lm, edit, hparams, context, layer, average_key_everywhere
            )
            name = lm.architecture.weight_name(layer)
            updates[name] = update
            if layer != layers[-1]:
                weight = lm.weight(name).data
                before[name] = weight.clone()
                weight += update.dense().to(weight)
    finally:
        for name, weight in before.items():
            lm.weight(name).data.copy_(weight)
    return Proposal(updates, [{"layers": detail}])


def _layer_update(
    lm: EditableLM,
    edit: Edit,
    hparams: RomeHyperParameters,
    context: Context,
    layer: int,
    average_key_everywhere: bool,
) -> tuple[LowRank, dict[str, Any]]:
    """dW of one layer for the model as it is now, and what the search did."""
    averaged, bare = _keys(lm, edit, context.templates, layer)
    u = averaged.key
    if hparams.mom2_adjustment:
        u = context.second_moment(layer).solve(averaged.key)
    u = u / u.norm()
    d, trace = optimise_value(lm, edit, context.templates, layer, bare.output, hparams)
    replaced = averaged if average_key_everywhere else bare
    overlap = replaced.key @ u
    r = (bare.output + d - replaced.output) / overlap
    update = LowRank(*lm.oriented(layer, r.unsqueeze(1), u.unsqueeze(1)))
    return update, {**trace, "key_overlap": overlap.item(), "key_norm": replaced.key.norm().item()}


def _needs_statistics(hparams: RomeHyperParameters) -> list[int]:
    return sorted(hparams.layers) if hparams.mom2_adjustment else []


ROME = Method(
    name="rome",
    hparams=RomeHyperParameters,
    default_hparams=default_hparams,
    propose=partial(propose, average_key_everywhere=False),
    needs_statistics=_needs_statistics,
)
R_ROME = Method(
    name="r_rome",
    hparams=RomeHyperParameters,
    default_hparams=default_hparams,
    propose=partial(propose, average_key_everywhere=True),
    needs_statistics=_needs_statistics,
)
