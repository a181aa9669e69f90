"""The search both ROME and MEMIT make: a vector d that, added at the subject, makes a model say the target.

d minimises, by Adam,

    mean over contexts of NLL(target | context + prompt, hidden at subject := hidden + d) per target token
    + kl_factor * KL(p_d || p_0) of the next token after the subject in "subject is a"
    + v_weight_decay * |d| / |v0|^2

(Meng et al. 2022, eq. 4; MEMIT, Meng et al. 2023, section 4.3). Details are those of the published code,
including what its text leaves out: the norm in the decay term is not squared; the KL term is read at the
subject's last token; the search stops at a loss under 0.05 before the step; the last of
``v_num_grad_steps`` evaluations takes no step; after each step |d| <= clamp_norm_factor * |v0|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from harness_rect.edits import Edit
from harness_rect.methods.base import HyperParameters
from harness_rect.methods.contexts import fill
from harness_rect.models import EditableLM
from harness_rect.models.lm import hidden_of, unflatten

LOSS_FLOOR = 5e-2
KL_PROMPT = "{} is a"


class SearchHyperParameters(HyperParameters):
    """Hyper-parameters of the search, named as in the files of ROME and MEMIT, and two of follow-up work.

    mpes: stop as soon as every target token is the most probable one in all contexts (ENCORE, Gupta et al.
    2025).
    norm_anchor: give v0 + d the norm of v0 when the search is done, so that values cannot grow with
        the number of edits (norm-anchor scaling).
    """

    fact_token: Literal["subject_last"] = "subject_last"
    v_num_grad_steps: int = Field(default=25, ge=1)
    v_lr: float = Field(default=0.5, gt=0)
    v_weight_decay: float = Field(default=0.5, ge=0)
    clamp_norm_factor: float = Field(default=4.0, gt=0)
    kl_factor: float = Field(default=0.0625, ge=0)
    mpes: bool = False
    norm_anchor: bool = False


@dataclass(frozen=True)
class _Prompts:
    """One fact's prompts as a batch: a row a context with the target, then one row with the KL prompt.

    subject_positions: of the subject's last token, a row each. rows, positions: places whose logits predict
    the target tokens of all contexts. targets: those tokens. weights: 1 / (contexts * target length).
    """

    sequences: list[list[int]]
    subject_positions: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor


def subject_position(lm: EditableLM, edit: Edit, template: str) -> int:
    """Index of the subject's last token in the prompt under ``template``."""
    offset = template.index("{}")
    return lm.encoder.token_at(fill(template, edit.text), offset + edit.subject_span[1] - 1)


def _prompts(lm: EditableLM, edit: Edit, templates: Sequence[str]) -> _Prompts:
    sequences, subjects = [], []
    places: list[tuple[int, int, int, float]] = []
    for row, template in enumerate(templates):
        prompt, target = lm.encoder.continuation(fill(template, edit.text), edit.target)
        sequences.append(prompt + target[:-1])
        subjects.append(subject_position(lm, edit, template))
        weight = 1 / (len(templates) * len(target))
        places += [(row, len(prompt) - 1 + i, token, weight) for i, token in enumerate(target)]
    kl_text = fill(KL_PROMPT, edit.subject)
    sequences.append(lm.encoder.ids(kl_text))
    subjects.append(lm.encoder.token_at(kl_text, len(edit.subject) - 1))
    rows, positions, targets, weights = zip(*places, strict=True)
    return _Prompts(
        sequences,
        torch.tensor(subjects),
        torch.tensor(rows),
        torch.tensor(positions),
        torch.tensor(targets),
        torch.tensor(weights),
    )


def search_value(
    lm: EditableLM,
    edit: Edit,
    templates: Sequence[str],
    module: nn.Module,
    v0: Tensor,
    settings: SearchHyperParameters,
    read_block: nn.Module | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Find d for one fact.

    Args:
        module: where d is added to the output: a down projection (ROME) or a block (MEMIT).
        v0: that output at the bare prompt, (d_model,), float32.
        read_block: the block whose output goes through the final norm and head for the NLL (MEMIT's
            ``v_loss_layer``); None reads the model's own logits.

    Returns:
        d, (d_model,), float32, and what the search did: evaluations, first and last loss terms, norms.
    """
    prompts = _prompts(lm, edit, templates)
    batch = lm.batch(prompts.sequences)
    device = v0.device
    kl_row, where = len(prompts.sequences) - 1, prompts.subject_positions
    all_rows = torch.arange(len(prompts.sequences))
    # The target places of all contexts, then the subject's last token in the KL prompt.
    rows = torch.cat([prompts.rows, torch.tensor([kl_row])])
    positions = torch.cat([prompts.positions, where[-1:]])
    targets, weights = prompts.targets.to(device), prompts.weights.to(device)
    d = torch.zeros_like(v0, requires_grad=True)
    optimiser = torch.optim.Adam([d], lr=settings.v_lr)
    v0_norm = v0.norm()
    read: list[Tensor] = []

    def add_d(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = hidden_of(output)
        out = unflatten(hidden, batch).clone()
        out[all_rows, where] = (out[all_rows, where].float() + d).to(out.dtype)
        out = out.view_as(hidden)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read[:] = [hidden_of(output)]

    handles = [module.register_forward_hook(add_d)]
    if read_block is not None:
        handles.append(read_block.register_forward_hook(keep_output))
    kl_before: Tensor | None = None
    trace: list[dict[str, float]] = []
    try:
        for step in range(settings.v_num_grad_steps):
            with torch.enable_grad():
                logits = lm.logits_at(batch, rows, positions)
                kl_after = logits[-1].to(device).float().log_softmax(-1)
                if kl_before is None:
                    kl_before = kl_after.detach()
                said = logits[:-1]
                if read_block is not None:
                    said = lm.unembed(read[0][prompts.rows, prompts.positions])
                log_probs = said.to(device).float().log_softmax(-1)
                nll = -(log_probs[torch.arange(len(targets)), targets] * weights).sum()
                kl = settings.kl_factor * (kl_after.exp() * (kl_after - kl_before)).sum()
                decay = settings.v_weight_decay * d.norm() / v0_norm**2
                loss = nll + kl + decay
            trace.append({"loss": loss.item(), "nll": nll.item(), "kl": kl.item(), "decay": decay.item()})
            if loss < LOSS_FLOOR or step == settings.v_num_grad_steps - 1:
                break
            if settings.mpes and bool((log_probs.argmax(-1) == targets).all()):
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                limit = settings.clamp_norm_factor * v0_norm
                if d.norm() > limit:
                    d.mul_(limit / d.norm())
    finally:
        for handle in handles:
            handle.remove()
    d = d.detach()
    if settings.norm_anchor:
        d = (v0 + d) * (v0_norm / (v0 + d).norm()) - v0
    return d, {
        "evaluations": len(trace),
        **trace[-1],
        "first_nll": trace[0]["nll"],
        "v0_norm": v0_norm.item(),
        "d_norm": d.norm().item(),
    }
