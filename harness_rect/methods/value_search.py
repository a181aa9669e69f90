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
from harness_rect.models.lm import hidden_of
from harness_rect.models.suffix import suffix_run

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


#: Tokens that one batched search may hold on a CPU, and what a GPU's free memory is shared out by.
CPU_TOKENS = 4096
GPU_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Request:
    """A fact to search for. v0: the output to be changed, at the bare prompt, (d_model,), float32."""

    edit: Edit
    v0: Tensor


@dataclass(frozen=True)
class _Prompts:
    """One fact's prompts: a row a context with the target, then one row with the KL prompt up to the subject.

    starts: for each row the first token that is run again: the subject's last, or an earlier one where the
    tokenizer joins subject and target. subjects: distance of the subject's last token from there. rows,
    offsets: places whose logits predict the target tokens of all contexts, offsets from the row's start; the
    last place is the subject's last token in the KL prompt. targets: the target tokens. weights: 1 /
    (contexts * target length).
    """

    sequences: list[list[int]]
    starts: list[int]
    subjects: list[int]
    rows: list[int]
    offsets: list[int]
    targets: list[int]
    weights: list[float]


def subject_position(lm: EditableLM, edit: Edit, template: str) -> int:
    """Index of the subject's last token in the prompt under ``template``."""
    offset = template.index("{}")
    return lm.encoder.token_at(fill(template, edit.text), offset + edit.subject_span[1] - 1)


def _prompts(lm: EditableLM, edit: Edit, templates: Sequence[str]) -> _Prompts:
    found = _Prompts([], [], [], [], [], [], [])
    for row, template in enumerate(templates):
        prompt, target = lm.encoder.continuation(fill(template, edit.text), edit.target)
        subject = subject_position(lm, edit, template)
        start = min(subject, len(prompt) - 1)
        found.sequences.append(prompt + target[:-1])
        found.starts.append(start)
        found.subjects.append(subject - start)
        found.rows.extend([row] * len(target))
        found.offsets.extend(len(prompt) - 1 + i - start for i in range(len(target)))
        found.targets.extend(target)
        found.weights.extend([1 / (len(templates) * len(target))] * len(target))
    kl_text = fill(KL_PROMPT, edit.subject)
    subject = lm.encoder.token_at(kl_text, len(edit.subject) - 1)
    found.sequences.append(lm.encoder.ids(kl_text)[: subject + 1])  # what follows is not seen there
    found.starts.append(subject)
    found.subjects.append(0)
    found.rows.append(len(templates))
    found.offsets.append(0)
    return found


def search_values(
    lm: EditableLM,
    requests: Sequence[Request],
    templates: Sequence[str],
    layer: int,
    settings: SearchHyperParameters,
    *,
    at_block: bool,
    loss_layer: int | None = None,
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Find d for every fact, many facts in one batch; each stops, decays and is clamped on its own.

    Args:
        layer, at_block: d is added to the output of this block (MEMIT) or of its down projection (ROME).
        loss_layer: the block whose output goes through the final norm and head for the NLL (MEMIT's
            ``v_loss_layer``); None reads the model's own logits.

    Returns:
        for each fact d, (d_model,), float32, and what the search did: evaluations, first and last loss terms,
        norms.
    """
    prompts = [_prompts(lm, request.edit, templates) for request in requests]
    # Facts of like length together: less padding.
    order = sorted(range(len(requests)), key=lambda i: max(map(len, prompts[i].sequences)))
    found: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    while order:
        chosen: list[int] = []
        limit = _token_limit(lm, layer)
        while order and (not chosen or _tokens(prompts, [*chosen, order[0]]) <= limit):
            chosen.append(order.pop(0))
        group = _Group(lm, [prompts[i] for i in chosen], layer, at_block, loss_layer)
        v0 = torch.stack([requests[i].v0 for i in chosen])
        found.update(zip(chosen, group.search(v0, settings), strict=True))
    return [found[i] for i in range(len(requests))]


def _tokens(prompts: Sequence[_Prompts], chosen: Sequence[int]) -> int:
    """Tokens of the first, full pass over these facts, padding included."""
    earlier = max(max(prompts[i].starts) for i in chosen)
    rows = [row for i in chosen for row in zip(prompts[i].sequences, prompts[i].starts, strict=True)]
    later = max(len(sequence) - start for sequence, start in rows)
    return (earlier + later) * len(rows)


def _token_limit(lm: EditableLM, layer: int) -> int:
    device = lm.input_device
    if device.type != "cuda":
        return CPU_TOKENS
    # What one token keeps for the backward pass: about 16 vectors of d_model and 4 of d_mlp in every later
    # block.
    a = lm.architecture
    each = (a.n_layers - layer) * (16 * a.d_model + 4 * a.d_mlp) * next(lm.model.parameters()).itemsize
    free = (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )
    return max(256, int(GPU_MEMORY_SHARE * free / each))


class _Group:
    """Facts that are searched for in one batch."""

    def __init__(
        self, lm: EditableLM, prompts: Sequence[_Prompts], layer: int, at_block: bool, loss_layer: int | None
    ) -> None:
        self.lm, self.prompts, self.loss_layer = lm, prompts, loss_layer
        at_block = at_block or lm.writes_to_stream(layer)  # the same then, and the block need not run again
        self.module = lm.block(layer) if at_block else lm.down_projection(layer)
        self.skipped = layer + 1 if at_block else layer

    def _places(self, facts: Sequence[int]) -> None:
        """Lay out the rows of these facts (indices into ``prompts``), one after the other."""
        chosen = [self.prompts[i] for i in facts]
        first = [0]
        for p in chosen:
            first.append(first[-1] + len(p.sequences))
        self.row_fact = torch.tensor([i for i, p in zip(facts, chosen, strict=True) for _ in p.sequences])
        self.subjects = torch.tensor([s for p in chosen for s in p.subjects])
        said = [
            (f + r, o)
            for f, p in zip(first, chosen, strict=False)
            for r, o in zip(p.rows[:-1], p.offsets, strict=False)
        ]
        kl = [(f + p.rows[-1], p.offsets[-1]) for f, p in zip(first, chosen, strict=False)]
        rows, offsets = zip(*said, *kl, strict=True)
        self.rows, self.offsets = torch.tensor(rows), torch.tensor(offsets)
        self.said_fact = torch.tensor([i for i, p in zip(facts, chosen, strict=True) for _ in p.targets])
        self.targets = torch.tensor([t for p in chosen for t in p.targets])
        self.weights = torch.tensor([w for p in chosen for w in p.weights])

    def search(self, v0: Tensor, settings: SearchHyperParameters) -> list[tuple[Tensor, dict[str, Any]]]:
        """d and what the search did, for each fact; v0 (facts, d_model) float32."""
        lm, device, count = self.lm, v0.device, len(v0)
        active = list(range(count))
        self._places(active)
        sequences = [s for p in self.prompts for s in p.sequences]
        starts = [s for p in self.prompts for s in p.starts]
        suffix, logits = suffix_run(lm, sequences, starts, self.skipped, self.rows, self.offsets)
        kl_before = logits[len(self.targets) :].to(device).float().log_softmax(-1)
        d = torch.zeros_like(v0, requires_grad=True)
        optimiser = torch.optim.Adam([d], lr=settings.v_lr)
        v0_norm = v0.norm(dim=1)
        first_nll = torch.zeros(count)
        results: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        read: list[Tensor] = []

        def add_d(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = hidden_of(output)
            out = hidden.view(*suffix.ids.shape, -1).clone()
            every = torch.arange(len(out))
            where = suffix.places(every, self.subjects)
            out[every, where] = (out[every, where].float() + d[self.row_fact].to(out.device)).to(out.dtype)
            out = out.view_as(hidden)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            read[:] = [hidden_of(output)]

        reads = self.loss_layer is not None and self.loss_layer != lm.architecture.n_layers - 1
        hooks: list[tuple[nn.Module, Any]] = [(self.module, add_d)]
        if reads:
            hooks.append((lm.block(int(self.loss_layer or 0)), keep_output))
        with lm.hooked_in_order(hooks):
            for step in range(settings.v_num_grad_steps):
                said_fact, targets = self.said_fact.to(device), self.targets.to(device)
                with torch.enable_grad():
                    logits = suffix.logits(self.rows, self.offsets)
                    said, kl_logits = logits[: len(targets)], logits[len(targets) :]
                    if reads:
                        rows, offsets = self.rows[: len(targets)], self.offsets[: len(targets)]
                        said = lm.unembed(read[0][rows, suffix.places(rows, offsets)])
                    log_probs = said.to(device).float().log_softmax(-1)
                    taken = log_probs[torch.arange(len(targets)), targets] * self.weights.to(device)
                    nll = torch.zeros(count, device=device).index_add(0, said_fact, -taken)
                    kl_after = kl_logits.to(device).float().log_softmax(-1)
                    divergence = (kl_after.exp() * (kl_after - kl_before)).sum(-1)
                    kl = torch.zeros(count, device=device).index_add(
                        0, torch.tensor(active, device=device), settings.kl_factor * divergence
                    )
                    decay = settings.v_weight_decay * d.norm(dim=1) / v0_norm**2
                    loss = nll + kl + decay
                terms = torch.stack([loss, nll, kl, decay]).detach().T.cpu()
                if step == 0:
                    first_nll = terms[:, 1]
                done = (terms[:, 0] < LOSS_FLOOR) | (step == settings.v_num_grad_steps - 1)
                if settings.mpes:
                    wrong = torch.zeros(count, device=device).index_add(
                        0, said_fact, (log_probs.argmax(-1) != targets).float()
                    )
                    done |= (wrong == 0).cpu()
                for i in active:
                    if done[i]:
                        trace = dict(zip(("loss", "nll", "kl", "decay"), terms[i].tolist(), strict=True))
                        results[i] = (d[i].detach().clone(), {"evaluations": step + 1, **trace})
                remaining = [i for i in active if i not in results]
                if not remaining:
                    break
                (d.grad,) = torch.autograd.grad(loss[remaining].sum(), d)
                optimiser.step()
                with torch.no_grad():
                    limit = settings.clamp_norm_factor * v0_norm
                    norms = d.norm(dim=1)
                    d.mul_(torch.where(norms > limit, limit / norms, 1.0).unsqueeze(1))
                if 2 * len(remaining) <= len(active):
                    stays = torch.tensor([i in remaining for i in self.row_fact.tolist()]).nonzero().flatten()
                    kl_before = kl_before[torch.tensor([i in remaining for i in active], device=device)]
                    suffix = suffix.select(stays)
                    active = remaining
                    self._places(active)
        return [self._finished(*results[i], v0[i], float(first_nll[i]), settings) for i in range(count)]

    @staticmethod
    def _finished(
        d: Tensor, trace: dict[str, Any], v0: Tensor, first_nll: float, settings: SearchHyperParameters
    ) -> tuple[Tensor, dict[str, Any]]:
        if settings.norm_anchor:
            d = (v0 + d) * (v0.norm() / (v0 + d).norm()) - v0
        return d, {**trace, "first_nll": first_nll, "v0_norm": v0.norm().item(), "d_norm": d.norm().item()}


def search_value(
    lm: EditableLM,
    edit: Edit,
    templates: Sequence[str],
    layer: int,
    v0: Tensor,
    settings: SearchHyperParameters,
    *,
    at_block: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`search_values` for one fact."""
    return search_values(lm, [Request(edit, v0)], templates, layer, settings, at_block=at_block)[0]
