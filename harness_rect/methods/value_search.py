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

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from harness_rect.edits import Edit
from harness_rect.methods.base import HyperParameters
from harness_rect.methods.contexts import fill
from harness_rect.models import EditableLM
from harness_rect.models.graphs import Run, recorded
from harness_rect.models.lm import hidden_of
from harness_rect.models.suffix import PLACES_AT_ONCE, CannotResume, suffix_run, to_compare, whole_run

LOSS_FLOOR = 5e-2
KL_PROMPT = "{} is a"


class SearchHyperParameters(HyperParameters):
    """Hyper-parameters of the search, named as in the files of ROME and MEMIT, and one of follow-up work.

    mpes: stop as soon as every target token is the most probable one in all contexts (ENCORE, Gupta et al.
    2025).
    """

    fact_token: Literal["subject_last"] = "subject_last"
    v_num_grad_steps: int = Field(default=25, ge=1)
    v_lr: float = Field(default=0.5, gt=0)
    v_weight_decay: float = Field(default=0.5, ge=0)
    clamp_norm_factor: float = Field(default=4.0, gt=0)
    kl_factor: float = Field(default=0.0625, ge=0)
    mpes: bool = False


#: Tokens of the first pass of one batched search on a CPU, and what of a GPU's free memory a search may take.
CPU_TOKENS = 4096
GPU_MEMORY_SHARE = 0.5
#: Tokens run forward and backward at a time on a CPU: matrix products are at their best there.
PART_TOKENS = 1024
#: Steps with at most so many tokens are recorded on a GPU: there launching takes longer than computing.
GRAPH_TOKENS = 2048
#: Facts that are done leave a search when at most this share of it remains: soon, since that is a copy; later
#: where steps are recorded, since they are recorded anew.
REMAINING, REMAINING_RECORDED = 0.875, 0.5
#: From so many rows on, rows of twice their length are run apart from them.
MANY_ROWS = 16


@dataclass(frozen=True)
class Request:
    """A fact to search for. v0: the output to be changed, at the bare prompt, (d_model,), float32."""

    edit: Edit
    v0: Tensor


@dataclass(frozen=True)
class _Row:
    """One prompt of a fact: under a context, with the target; or the KL prompt up to the subject, without.

    fact: index of the fact. start: the first token that is run again: the subject's last, or an earlier one
    where the tokenizer joins subject and target. subject: distance of the subject's last token from there.
    offsets: of the tokens that predict the target, from there. targets: what each should predict. weight: 1 /
    (contexts * target length). kl: offset of the token at which the KL term is read, if it is read here.
    """

    fact: int
    sequence: list[int]
    start: int
    subject: int
    offsets: list[int]
    targets: list[int]
    weight: float
    kl: int | None = None

    @property
    def length(self) -> int:
        """Tokens that are run again."""
        return len(self.sequence) - self.start


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
        subject = subject_position(lm, edit, template)
        start = min(subject, len(prompt) - 1)
        offsets = [len(prompt) - 1 + i - start for i in range(len(target))]
        weight = 1 / (len(templates) * len(target))
        found.append(_Row(fact, prompt + target[:-1], start, subject - start, offsets, target, weight))
    kl_text = fill(KL_PROMPT, edit.subject)
    subject = lm.encoder.token_at(kl_text, len(edit.subject) - 1)
    kl_ids = lm.encoder.ids(kl_text)[: subject + 1]  # what follows the subject is not seen there
    for i, row in enumerate(found):  # a prompt that begins with the subject says the same there
        at = row.start + row.subject
        if row.sequence[: at + 1] == kl_ids and row.subject not in row.offsets:
            found[i] = replace(row, kl=row.subject)
            return found
    return [*found, _Row(fact, kl_ids, subject, 0, [], [], 0.0, kl=0)]


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
    rows = [_rows(lm, i, request.edit, templates) for i, request in enumerate(requests)]
    # Facts of like length together: less padding.
    order = sorted(range(len(requests)), key=lambda i: max(len(row.sequence) for row in rows[i]))
    found: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    while order:
        chosen: list[int] = []
        limit = _token_limit(lm, layer)
        while order and (not chosen or _tokens([rows[i] for i in [*chosen, order[0]]]) <= limit):
            chosen.append(order.pop(0))
        place = {fact: at for at, fact in enumerate(chosen)}
        group = [replace(row, fact=place[row.fact]) for i in chosen for row in rows[i]]
        v0 = torch.stack([requests[i].v0 for i in chosen])
        # On a GPU all that fits in its memory; there, launches cost more than padding.
        part_tokens = PART_TOKENS if lm.input_device.type != "cuda" else limit
        parts = [
            Part(lm, [group[i] for i in part], len(chosen), layer, at_block, loss_layer, settings)
            for part in _parts(group, part_tokens)
        ]
        found.update(zip(chosen, _search(parts, v0, settings), strict=True))
    return [found[i] for i in range(len(requests))]


def _tokens(facts: Sequence[Sequence[_Row]]) -> int:
    """Tokens of the first, full pass over these facts, padding included."""
    rows = [row for fact in facts for row in fact]
    return (max(row.start for row in rows) + max(row.length for row in rows)) * len(rows)


def _token_bytes(lm: EditableLM, layer: int) -> int:
    """What one token keeps for the backward pass: about 16 d_model + 4 d_mlp numbers in every later block."""
    a = lm.architecture
    return (a.n_layers - layer) * (16 * a.d_model + 4 * a.d_mlp) * next(lm.model.parameters()).itemsize


def _token_limit(lm: EditableLM, layer: int) -> int:
    device = lm.input_device
    if device.type != "cuda":
        return CPU_TOKENS
    free = (
        torch.cuda.mem_get_info(device)[0]
        + torch.cuda.memory_reserved(device)
        - torch.cuda.memory_allocated(device)
    )
    return max(256, int(GPU_MEMORY_SHARE * free / _token_bytes(lm, layer)))


def _parts(rows: Sequence[_Row], limit: int) -> list[list[int]]:
    """Indices of the rows that are run together, in at most so many tokens; rows of like length together."""
    found: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i].length):
        part = found[-1] if found else []
        fits = (len(part) + 1) * rows[i].length <= limit
        wasteful = len(part) >= MANY_ROWS and rows[i].length >= 2 * rows[part[-1]].length
        if part and fits and not wasteful:
            part.append(i)
        else:
            found.append([i])
    return found


class Part:
    """Rows of some facts that are run together.

    :meth:`evaluate` is a function of d alone, made of tensor operations without a look at their values.
    in_place: whether the logits may be overwritten; not where a hook may have kept them.
    """

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
        self.lm, self.count, self.kl_factor, self.counts_wrong = lm, facts, settings.kl_factor, settings.mpes
        at_block = at_block or lm.writes_to_stream(layer)  # the same then, and the block need not run again
        self.module = lm.block(layer) if at_block else lm.down_projection(layer)
        last = lm.architecture.n_layers - 1
        self.loss_block = None if loss_layer is None or loss_layer == last else lm.block(loss_layer)
        self._lay_out(rows)
        sequences, starts = [row.sequence for row in rows], [row.start for row in rows]
        skipped = layer + 1 if at_block else layer
        changed = self.subjects if at_block else None
        self.suffix, whole = suffix_run(lm, sequences, starts, skipped, *self._all_places(), changed)
        self._start_kl_from(whole)
        self._expected: Tensor | None = to_compare(whole)  # until the suffix has been compared with it
        head = lm.architecture.head
        watched = [lm.model, *([lm.model.get_submodule(head)] if head else [])]
        self.in_place = not any(module._forward_hooks for module in watched)
        self._replay: Run | None = None
        devices = {p.device for p in lm.model.parameters()}
        self._recordable = len(devices) == 1 and lm.input_device.type == "cuda"

    def _lay_out(self, rows: Sequence[_Row]) -> None:
        device = self.lm.input_device

        def whole(numbers: Iterable[int]) -> Tensor:
            return torch.tensor(list(numbers), dtype=torch.long, device=device)

        self.rows = list(rows)
        said = [(i, j) for i, row in enumerate(rows) for j in range(len(row.targets))]
        kl = [i for i, row in enumerate(rows) if row.kl is not None]
        self.every, self.row_fact = whole(range(len(rows))), whole(row.fact for row in rows)
        self.subjects = whole(row.subject for row in rows)
        self.said_rows, self.kl_rows = whole(i for i, _ in said), whole(kl)
        self.said_offsets = whole(rows[i].offsets[j] for i, j in said)
        self.kl_offsets = whole(rows[i].kl or 0 for i in kl)
        self.said_fact, self.kl_fact = self.row_fact[self.said_rows], self.row_fact[self.kl_rows]
        self.said_every, self.targets = whole(range(len(said))), whole(rows[i].targets[j] for i, j in said)
        self.weights = torch.tensor([rows[i].weight for i, _ in said], device=device)

    def _start_kl_from(self, logits: Tensor) -> None:
        """logits: at :meth:`_all_places`, with nothing added."""
        self.kl_before = logits[len(self.targets) :].float().log_softmax(-1)

    def _all_places(self) -> tuple[Tensor, Tensor]:
        """Rows and offsets of the places that count, those of the KL terms last."""
        return torch.cat([self.said_rows, self.kl_rows]), torch.cat([self.said_offsets, self.kl_offsets])

    @property
    def is_recorded(self) -> bool:
        return self._replay is not None

    def select(self, facts: Sequence[int]) -> Part | None:
        """The same for the rows of these facts, None if there are none."""
        wanted = set(facts)
        stays = [i for i, row in enumerate(self.rows) if row.fact in wanted]
        if not stays:
            return None
        part = copy(self)
        part._replay = None
        part.suffix = self.suffix.select(torch.tensor(stays, device=self.every.device))
        kl_stays = [j for j, i in enumerate(self.kl_rows.tolist()) if self.rows[i].fact in wanted]
        part.kl_before = self.kl_before[kl_stays]
        part._lay_out([self.rows[i] for i in stays])
        return part

    def evaluate(self, d: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """What these rows add to each fact's loss.

        Args:
            d: (facts, d_model) float32.

        Returns:
            (facts, 3) float32: NLL, weighted KL, and the number of target tokens that are not the most
            probable (0 unless asked for); and the gradient of NLL + KL in d, if wanted.
        """
        if self._replay is not None:
            terms, slope = self._replay(d)
            return terms, slope
        if not gradient:
            return self._terms(d, gradient=False)[0], None
        terms, slope = self._terms(d, gradient=True)
        if self._recordable and self.suffix.ids.numel() <= GRAPH_TOKENS:
            dtype = next(self.lm.model.parameters()).dtype
            run = partial(self._terms, gradient=True)
            self._replay = recorded(run, d, (terms, slope), dtype)
            self._recordable = self._replay is not None
        return terms, slope

    def _terms(self, d: Tensor, *, gradient: bool) -> tuple[Tensor, ...]:
        """(terms, gradient) of :meth:`evaluate`, or (terms,)."""
        device = d.device
        terms = torch.zeros(self.count, 3, device=device)
        d = d.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            outputs = self._logits(d)
        # The gradients in the logits, in closed form and, in 32 bits, in their place.
        slopes = [
            _log_softmax_((x.detach() if self.in_place else x.detach().clone()).float()) for x in outputs
        ]
        count = len(self.targets)
        said, kl = (slopes[0][:count], slopes[0][count:]) if len(slopes) == 1 else slopes
        if self.counts_wrong:
            wrong = (said.argmax(-1) != self.targets.to(said.device)).float()
            terms[:, 2].index_add_(0, self.said_fact.to(device), wrong.to(device))
        nll = _nll_(said, self.said_every, self.targets.to(said.device), self.weights.to(said.device))
        terms[:, 0].index_add_(0, self.said_fact.to(device), nll.to(device))
        divergence = _kl_(kl, self.kl_before.to(kl.device), self.kl_factor)
        terms[:, 1].index_add_(0, self.kl_fact.to(device), divergence.to(device))
        if not gradient:
            return (terms,)
        given = [slope.to(logits.dtype) for slope, logits in zip(slopes, outputs, strict=True)]
        roots = [_root(logits) for logits in outputs]
        given = [slope.view_as(root) for slope, root in zip(given, roots, strict=True)]
        try:
            return terms, torch.autograd.grad(roots, d, given)[0]
        except RuntimeError as error:
            if not self.in_place or "inplace operation" not in str(error):
                raise
        self.in_place = False  # what comes last in this model needs its result for its gradient
        return self._terms(d, gradient=True)

    def _logits(self, d: Tensor) -> list[Tensor]:
        """With d added: logits at the places of targets and KL prompts in one tensor; in two where the NLL is
        read at an earlier block.
        """
        found: list[Tensor] = []

        def add_d(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = hidden_of(output)
            out = hidden.view(*self.suffix.ids.shape, -1).clone()
            where = self.suffix.places(self.every, self.subjects)
            at = self.every.to(out.device), where.to(out.device)
            added = d[self.row_fact.to(d.device)].to(out.device)
            out[at] = (out[at].float() + added).to(out.dtype)
            out = out.view_as(hidden)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[:] = [hidden_of(output)]

        hooks: list[tuple[nn.Module, Any]] = [(self.module, add_d)]
        if self.loss_block is not None:
            hooks.append((self.loss_block, keep_output))
        with self.lm.hooked_in_order(hooks):
            logits = self._model_logits()
        if self.loss_block is None:
            return [logits]
        where = self.suffix.places(self.said_rows, self.said_offsets)
        hidden = found[0]
        return [self.lm.unembed(hidden[self.said_rows.to(hidden.device), where.to(hidden.device)]), logits]

    def _model_logits(self) -> Tensor:
        early = self.loss_block is not None
        if self._expected is None:
            places = (self.kl_rows, self.kl_offsets) if early else self._all_places()
            return self.suffix.logits(*places)
        expected, self._expected = self._expected, None
        try:
            logits = self.suffix.checked_logits(*self._all_places(), expected)
        except CannotResume as reason:
            sequences, starts = [row.sequence for row in self.rows], [row.start for row in self.rows]
            self.suffix = whole_run(self.lm, sequences, starts, reason)
            logits = self.suffix.logits(*self._all_places())
            # Nothing has been added yet: what the KL term starts from, as these runs give it.
            self._start_kl_from(logits.detach())
        return logits[len(self.targets) :] if early else logits


def _root(logits: Tensor) -> Tensor:
    """What these are a view of, if it is the same numbers in the same order.

    For a view that has been overwritten autograd would copy the gradient.
    """
    base = logits._base
    if base is None or base.numel() != logits.numel():
        return logits
    return base if base.is_contiguous() and logits.is_contiguous() else logits


def _log_softmax_(logits: Tensor) -> Tensor:
    """In place; on a CPU a few rows at a time, since large temporaries cost more than their use there."""
    for part in logits.split(PLACES_AT_ONCE if logits.device.type == "cpu" else max(1, len(logits))):
        part.copy_(part.log_softmax(-1))
    return logits


def _nll_(log_p: Tensor, every: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(n,) weighted NLL of the targets; log_p (n, vocabulary) becomes its gradient in the logits."""
    every = every.to(log_p.device)
    nll = -log_p[every, targets] * weights
    log_p.exp_().mul_(weights.unsqueeze(1))
    log_p[every, targets] -= weights
    return nll


def _kl_(log_p: Tensor, before: Tensor, factor: float) -> Tensor:
    """(n,) factor * KL(p || before); log_p (n, vocabulary) becomes its gradient in the logits."""
    difference = log_p - before
    p = log_p.exp()
    divergence = (p * difference).sum(-1)
    log_p.copy_(difference.sub_(divergence.unsqueeze(1)).mul_(p).mul_(factor))
    return factor * divergence


def _search(
    parts: Sequence[Part], v0: Tensor, settings: SearchHyperParameters
) -> list[tuple[Tensor, dict[str, Any]]]:
    """d and what the search did, for each fact of these parts; v0 (facts, d_model) float32."""
    count = len(v0)
    active = list(range(count))
    d = torch.zeros_like(v0, requires_grad=True)
    optimiser = torch.optim.Adam([d], lr=settings.v_lr)
    v0_norm = v0.norm(dim=1)
    first_nll = torch.zeros(count)
    results: dict[int, tuple[Tensor, dict[str, Any]]] = {}
    for step in range(settings.v_num_grad_steps):
        last = step == settings.v_num_grad_steps - 1
        nll_kl_wrong = torch.zeros(count, 3, device=v0.device)
        gradient = torch.zeros_like(v0)
        for part in parts:
            terms, slope = part.evaluate(d, gradient=not last)
            nll_kl_wrong += terms
            if slope is not None:
                gradient += slope
        with torch.no_grad():
            norms = d.norm(dim=1)
            scale = settings.v_weight_decay / v0_norm**2
            unit = d / norms.clamp_min(torch.finfo(d.dtype).tiny).unsqueeze(1)
            gradient += unit * scale.unsqueeze(1)
        nll, kl, wrong = nll_kl_wrong.cpu().unbind(1)
        decay = (norms * scale).cpu()
        loss = nll + kl + decay
        if step == 0:
            first_nll = nll
        done = (loss < LOSS_FLOOR) | last
        if settings.mpes:
            done |= wrong == 0
        values = torch.stack([loss, nll, kl, decay], 1)
        for i in active:
            if done[i] and i not in results:
                trace = dict(zip(("loss", "nll", "kl", "decay"), values[i].tolist(), strict=True))
                results[i] = (d[i].detach().clone(), {"evaluations": step + 1, **trace})
        remaining = [i for i in active if i not in results]
        if not remaining:
            break
        d.grad = gradient
        optimiser.step()
        with torch.no_grad():
            limit = settings.clamp_norm_factor * v0_norm
            norms = d.norm(dim=1)
            d.mul_(torch.where(norms > limit, limit / norms, 1.0).unsqueeze(1))
        share = REMAINING_RECORDED if any(part.is_recorded for part in parts) else REMAINING
        if len(remaining) <= share * len(active):
            parts = [smaller for part in parts if (smaller := part.select(remaining)) is not None]
            active = remaining
    return [_finished(*results[i], v0[i], float(first_nll[i])) for i in range(count)]


def _finished(
    d: Tensor, trace: dict[str, Any], v0: Tensor, first_nll: float
) -> tuple[Tensor, dict[str, Any]]:
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
