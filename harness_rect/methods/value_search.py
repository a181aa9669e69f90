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

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.base import HyperParameters, Steps
from harness_rect.methods.contexts import fill
from harness_rect.models import EditableLM
from harness_rect.models.forward import Prompts, open_forward
from harness_rect.models.forwards import fused_gelu
from harness_rect.models.graphs import recorded_after_first_call

LOSS_FLOOR = 5e-2
KL_PROMPT = "{} is a"


class SearchHyperParameters(HyperParameters):
    """Hyper-parameters of the search, named as in the files of ROME and MEMIT, and one of follow-up work.

    v_num_grad_steps: up to 100,000.
    mpes: stop as soon as every target token is the most probable one in all contexts (ENCORE, Gupta et al.
    2025).
    """

    fact_token: Literal["subject_last"] = "subject_last"
    v_num_grad_steps: Steps = 25
    v_lr: float = Field(default=0.5, gt=0)
    v_weight_decay: float = Field(default=0.5, ge=0)
    clamp_norm_factor: float = Field(default=4.0, gt=0)
    kl_factor: float = Field(default=0.0625, ge=0)
    mpes: bool = False


#: Tokens, padding included, of the prompts that are searched together on a CPU; and the share of a GPU's free
#: memory that they may take.
CPU_TOKENS = 3072
GPU_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Request:
    """A fact to search for. v0: the output to be changed, at the bare prompt, (d_model,), float32."""

    edit: Edit
    v0: Tensor

    def on_cpu(self) -> Request:
        return Request(self.edit, self.v0.cpu())


@dataclass(frozen=True)
class _Row:
    """One prompt of a fact: under a context, with the target; or the KL prompt up to the subject, without.

    Attributes:
        fact: index of the fact. sequence: token ids. subject: index of the subject's last token.
        first: index of the token that predicts the first of ``targets``, the target's tokens.
        weight: 1 / (contexts * target length).
        kl: whether the KL term is read at the subject.
    """

    fact: int
    sequence: list[int]
    subject: int
    first: int = 0
    targets: tuple[int, ...] = ()
    weight: float = 0.0
    kl: bool = False


def subject_position(lm: EditableLM, edit: Edit, template: str) -> int:
    """Index of the subject's last token in the prompt under ``template``."""
    offset = template.index("{}")
    return lm.encoder.token_at(fill(template, edit.text), offset + edit.subject_span[1] - 1)


def until_subject(lm: EditableLM, edit: Edit, template: str) -> list[int]:
    """Token ids of the prompt under ``template`` up to the subject: what follows is not seen there."""
    return lm.encoder.ids(fill(template, edit.text))[: subject_position(lm, edit, template) + 1]


def _rows(lm: EditableLM, fact: int, edit: Edit, templates: Sequence[str]) -> list[_Row]:
    found = []
    for template in templates:
        prompt, target = lm.encoder.continuation(fill(template, edit.text), edit.target)
        subject, weight = subject_position(lm, edit, template), 1 / (len(templates) * len(target))
        found.append(_Row(fact, prompt + target[:-1], subject, len(prompt) - 1, tuple(target), weight))
    text = fill(KL_PROMPT, edit.subject)
    subject = lm.encoder.token_at(text, len(edit.subject) - 1)
    ids = lm.encoder.ids(text)[: subject + 1]  # what follows the subject cannot change what is read there
    for i, row in enumerate(found):  # a prompt that begins with the subject gives the same there
        if row.sequence[: row.subject + 1] == ids and row.subject < row.first:
            found[i] = replace(row, kl=True)
            return found
    return [*found, _Row(fact, ids, subject, kl=True)]


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

    The facts are shared out over ``lm.processes``, each of which makes batches of its share; that changes
    the last bits of d, as other batches do.

    Args:
        layer, at_block: d is added to the output of this block (MEMIT) or of its down projection (ROME).
        loss_layer: the block whose output goes through the final norm and head for the NLL (MEMIT's
            ``v_loss_layer``); None reads the model's own logits.

    Returns:
        for each fact d, (d_model,), float32, and what the search did: evaluations, first and last loss terms,
        norms.
    """
    search = _Search(list(requests), list(templates), layer, settings, at_block, loss_layer)
    number = min(lm.processes.number, len(requests))
    if number == 1:
        return search.run(lm)
    order = sorted(range(len(requests)), key=lambda i: len(lm.encoder.ids(requests[i].edit.text)))
    shares = [order[rank::number] for rank in range(number)]
    parts = [replace(search, requests=[requests[i].on_cpu() for i in share]) for share in shares]
    job = SharedSearch(parts, list(lm.changing))
    found = dict[int, tuple[Tensor, dict[str, Any]]]()
    for share, part in zip(shares, lm.processes.share(job, partial(search_share, lm)), strict=False):
        found |= {i: (d.to(requests[i].v0), trace) for i, (d, trace) in zip(share, part, strict=True)}
    return [found[i] for i in range(len(requests))]


@dataclass(frozen=True)
class _Search:
    """The arguments of :func:`search_values`."""

    requests: list[Request]
    templates: list[str]
    layer: int
    settings: SearchHyperParameters
    at_block: bool
    loss_layer: int | None

    def run(self, lm: EditableLM) -> list[tuple[Tensor, dict[str, Any]]]:
        """Search in this process alone."""
        rows = [_rows(lm, i, request.edit, self.templates) for i, request in enumerate(self.requests)]
        # Facts of similar length together: less padding.
        order = sorted(range(len(rows)), key=lambda i: max(len(row.sequence) for row in rows[i]))
        found: dict[int, tuple[Tensor, dict[str, Any]]] = {}
        while order:
            chosen: list[int] = []
            limit = _token_limit(lm, self.layer)
            while order and (not chosen or _tokens([rows[i] for i in [*chosen, order[0]]]) <= limit):
                chosen.append(order.pop(0))
            group = [replace(row, fact=at) for at, i in enumerate(chosen) for row in rows[i]]
            group.sort(key=lambda row: len(row.sequence) - row.subject)  # decides the order of sums
            v0 = torch.stack([self.requests[i].v0 for i in chosen])
            where = self.layer, self.at_block, self.loss_layer
            terms = _LossTerms(lm, group, len(chosen), *where, self.settings)
            found.update(zip(chosen, _search(terms, v0, self.settings), strict=True))
        return [found[i] for i in range(len(rows))]


@dataclass(frozen=True)
class SharedSearch:
    """A search in several processes: the part of each, and the weights that the main one has changed."""

    parts: list[_Search]
    weights: list[str]


def search_share(lm: EditableLM, job: SharedSearch) -> list[tuple[Tensor, dict[str, Any]]]:
    """This process's part of a search in several; d on the CPU. All of ``lm.processes`` must call it."""
    for name in job.weights:
        lm.processes.as_main_(lm.weight(name).data)
    if (rank := lm.processes.rank) >= len(job.parts):
        return []
    part = job.parts[rank]
    device = lm.weight(lm.architecture.weight_name(part.layer)).device
    requests = [Request(request.edit, request.v0.to(device)) for request in part.requests]
    with fused_gelu(lm.model):  # as in every search of the main process
        found = replace(part, requests=requests).run(lm)
    return [(d.cpu(), trace) for d, trace in found]


def _tokens(facts: Sequence[Sequence[_Row]]) -> int:
    """Tokens of these facts' prompts, aligned at the subject and padded."""
    rows = [row for fact in facts for row in fact]
    behind = max(len(row.sequence) - row.subject for row in rows)
    return (max(row.subject for row in rows) + behind) * len(rows)


def _token_limit(lm: EditableLM, layer: int) -> int:
    device = lm.input_device
    if device.type != "cuda":
        return CPU_TOKENS
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserved - allocated
    a = lm.architecture
    # What a token keeps for the backward pass: about 16 d_model + 4 d_mlp numbers in every later block.
    token = (a.n_layers - layer) * (16 * a.d_model + 4 * a.d_mlp) * next(lm.model.parameters()).itemsize
    return max(256, int(GPU_MEMORY_SHARE * free / token))


class _LossTerms:
    """NLL and KL of some facts as functions of d, with their gradient."""

    def __init__(
        self,
        lm: EditableLM,
        rows: Sequence[_Row],
        facts: int,
        layer: int,
        at_block: bool,
        loss_layer: int | None,
        settings: SearchHyperParameters,
    ) -> None:
        self.facts, self.kl_factor, self.counts_wrong = facts, settings.kl_factor, settings.mpes
        at_block = at_block or lm.writes_to_stream(layer)  # the same then, and the block need not run again
        device = lm.input_device

        def whole(numbers: Iterable[int]) -> Tensor:
            return torch.tensor(list(numbers), dtype=torch.long, device=device)

        said = [(i, j) for i, row in enumerate(rows) for j in range(len(row.targets))]
        kl = [i for i, row in enumerate(rows) if row.kl]
        self.row_fact = whole(row.fact for row in rows)
        self.said_fact, self.kl_fact = (
            whole(rows[i].fact for i in which) for which in ([i for i, _ in said], kl)
        )
        self.targets = whole(rows[i].targets[j] for i, j in said)
        self.weights = torch.tensor([rows[i].weight for i, _ in said], device=device)
        prompts = Prompts(
            sequences=[row.sequence for row in rows],
            changed=whole(row.subject for row in rows),
            layer=layer,
            at_block=at_block,
            rows=whole([*(i for i, _ in said), *kl]),
            positions=whole([*(rows[i].first + j for i, j in said), *(rows[i].subject for i in kl)]),
            loss_layer=None if loss_layer == lm.architecture.n_layers - 1 else loss_layer,
            early=len(said),
        )
        self.forward, before = open_forward(lm, prompts)
        self.kl_before = before[len(said) :].float().log_softmax(-1)
        tokens = _tokens([rows])
        # Without a reference to itself, what the search holds is freed as soon as it ends.
        with_gradient = partial(_LossTerms._terms, weakref.proxy(self), gradient=True)
        self._with_gradient = recorded_after_first_call(with_gradient, lm, tokens)

    def evaluate(self, d: Tensor, *, gradient: bool) -> tuple[Tensor, ...]:
        """What target and KL prompts add to each fact's loss.

        Args:
            d: (facts, d_model) float32.

        Returns:
            (facts, 3) float32: NLL, weighted KL, and with ``mpes`` the number of target tokens that are not
            the most probable; with ``gradient`` also the gradient of NLL + KL in d.
        """
        return self._with_gradient(d) if gradient else self._terms(d, gradient=False)

    def _terms(self, d: Tensor, *, gradient: bool) -> tuple[Tensor, ...]:
        d = d.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self.forward.logits(d[self.row_fact.to(d.device)])
        log_p = logits.detach().float().log_softmax(-1)
        said, kl = log_p[: len(self.targets)], log_p[len(self.targets) :]
        targets, weights = self.targets.to(log_p.device), self.weights.to(log_p.device)
        terms = torch.zeros(self.facts, 3, device=d.device)
        if self.counts_wrong:
            wrong = (said.argmax(-1) != targets).float()
            terms[:, 2].index_add_(0, self.said_fact.to(d.device), wrong.to(d.device))
        nll = _nll_(said, targets, weights)
        terms[:, 0].index_add_(0, self.said_fact.to(d.device), nll.to(d.device))
        divergence = _kl_(kl, self.kl_before.to(kl.device), self.kl_factor)
        terms[:, 1].index_add_(0, self.kl_fact.to(d.device), divergence.to(d.device))
        if not gradient:
            return (terms,)
        return terms, torch.autograd.grad(logits, d, log_p.to(logits.dtype))[0]


# Both losses in closed form: autograd would keep several more tensors of the size of the logits.


def _nll_(log_p: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(n,) weighted NLL of the targets; log_p (n, vocabulary) becomes its gradient in the logits."""
    at = torch.arange(len(targets), device=targets.device), targets
    nll = -log_p[at] * weights
    log_p.exp_().mul_(weights.unsqueeze(1))
    log_p[at] -= weights
    return nll


def _kl_(log_p: Tensor, before: Tensor, factor: float) -> Tensor:
    """(n,) factor * KL(p || before); log_p (n, vocabulary) becomes its gradient in the logits."""
    difference = log_p - before
    p = log_p.exp()
    divergence = (p * difference).sum(-1)
    log_p.copy_(difference.sub_(divergence.unsqueeze(1)).mul_(p).mul_(factor))
    return factor * divergence


def _search(
    loss_terms: _LossTerms, v0: Tensor, settings: SearchHyperParameters
) -> list[tuple[Tensor, dict[str, Any]]]:
    """d and what the search did, for each fact; v0 (facts, d_model) float32."""
    count = len(v0)
    d = torch.zeros_like(v0, requires_grad=True)
    optimiser = torch.optim.Adam([d], lr=settings.v_lr)
    v0_norm = v0.norm(dim=1)
    scale = settings.v_weight_decay / v0_norm**2
    first_nll = torch.zeros(count)
    results: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    for step in range(settings.v_num_grad_steps):
        last = step == settings.v_num_grad_steps - 1
        terms, *gradient = loss_terms.evaluate(d, gradient=not last)
        norms = d.detach().norm(dim=1)
        nll, kl, wrong = terms.cpu().unbind(1)
        decay = (norms * scale).cpu()
        loss = nll + kl + decay
        if step == 0:
            first_nll = nll
        done = (loss < LOSS_FLOOR) | last
        if settings.mpes:
            done |= wrong == 0
        values = torch.stack([loss, nll, kl, decay], 1)
        for i in range(count):
            if done[i] and i not in results:
                trace = dict(zip(("loss", "nll", "kl", "decay"), values[i].tolist(), strict=True))
                results[i] = (d[i].detach().clone(), {"evaluations": step + 1, **trace})
        if len(results) == count:
            break
        with torch.no_grad():
            unit = d / norms.clamp_min(torch.finfo(d.dtype).tiny).unsqueeze(1)
            d.grad = gradient[0] + unit * scale.unsqueeze(1)
            optimiser.step()
            limit = settings.clamp_norm_factor * v0_norm
            norms = d.norm(dim=1)
            d.mul_(torch.where(norms > limit, limit / norms, 1.0).unsqueeze(1))
    found = []
    for i in range(count):
        value, trace = results[i]
        norms = {"v0_norm": v0[i].norm().item(), "d_norm": value.norm().item()}
        found.append((value, {**trace, "first_nll": float(first_nll[i]), **norms}))
    return found


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
