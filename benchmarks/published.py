"""Straightforward implementations of the published loops of ROME and MEMIT, for benchmarks/editing.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.contexts import fill
from harness_rect.methods.memit import MemitHyperParameters
from harness_rect.methods.rome import RomeHyperParameters
from harness_rect.methods.value_search import subject_position
from harness_rect.models import EditableLM
from harness_rect.models.lm import hidden_of
from harness_rect.moments import SecondMoment


def published_search(
    lm: EditableLM, edit: Edit, templates: list[str], layer: int, h: Any, at_block: bool
) -> Tensor:
    """v0 + d: full passes over all prompts, logits at every position, as the released code does it."""
    rows = [(t, *lm.encoder.continuation(fill(t, edit.text), edit.target)) for t in templates]
    kl_text = edit.subject + " is a"
    sequences = [prompt + target[:-1] for _, prompt, target in rows] + [lm.encoder.ids(kl_text)]
    batch = lm.batch(sequences)
    where = [subject_position(lm, edit, t) for t, *_ in rows]
    where.append(lm.encoder.token_at(kl_text, len(edit.subject) - 1))
    labels = torch.full_like(batch.ids, -100)
    for i, (_, prompt, target) in enumerate(rows):
        start = len(prompt) - 1
        labels[i, start : start + len(target)] = torch.tensor(target)
    device = batch.ids.device
    d = torch.zeros(lm.architecture.d_model, requires_grad=True, device=device)
    optimiser = torch.optim.Adam([d], lr=h.v_lr)
    module = lm.block(layer) if at_block else lm.down_projection(layer)
    v0: list[Tensor] = []
    kl_before: Tensor | None = None
    every = torch.arange(len(sequences))

    def add(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not v0:
            v0.append(hidden[0, where[0]].detach().float().clone())
        hidden = hidden.clone()
        hidden[every, where] = (hidden[every, where].float() + d).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with lm.hooked({module: add}):
        for step in range(h.v_num_grad_steps):
            optimiser.zero_grad()
            with torch.enable_grad():
                logits = lm.logits(batch)
                kl_now = logits[-1, where[-1]].float().log_softmax(-1)
                kl_before = kl_now.detach().clone() if kl_before is None else kl_before
                log_probs = logits.float().log_softmax(-1)
                mask = (labels != -100).float()
                taken = log_probs.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
                nll = -(taken * mask).sum(1)[:-1] / mask.sum(1)[:-1]
                kl = h.kl_factor * (kl_now.exp() * (kl_now - kl_before)).sum()
                loss = nll.mean() + kl + h.v_weight_decay * d.norm() / v0[0].norm() ** 2
            if loss < 5e-2 or step == h.v_num_grad_steps - 1:
                break
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                limit = h.clamp_norm_factor * v0[0].norm()
                if d.norm() > limit:
                    d.mul_(limit / d.norm())
    return v0[0] + d.detach()


@torch.no_grad()
def published_reading(
    lm: EditableLM, module: Any, prompts: list[tuple[Edit, str]], at_once: int = 128
) -> tuple[Tensor, Tensor]:
    """(inputs, outputs) of a module at the subjects, from full passes over whole prompts in batches."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        at = torch.tensor([subject_position(lm, edit, t) for edit, t in some])

        def keep(module: Any, args: Any, output: Any, at: Tensor = at) -> None:
            inputs, outputs = (x[torch.arange(len(at)), at].float() for x in (args[0], hidden_of(output)))
            found.append((inputs, outputs))

        with lm.hooked({module: keep}):
            lm.logits(lm.batch([lm.encoder.ids(fill(t, edit.text)) for edit, t in some]))
    inputs, outputs = zip(*found, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


def published_rome(
    lm: EditableLM, edit: Edit, templates: list[str], h: RomeHyperParameters, c: SecondMoment
) -> tuple[Tensor, Tensor]:
    """(v, u). C comes factored, because the released code also inverts it only once."""
    (layer,) = h.layers
    u = published_reading(lm, lm.down_projection(layer), [(edit, t) for t in templates])[0].mean(0)
    if h.mom2_adjustment:
        u = c.solve(u)
    u = u / u.norm()
    target = published_search(lm, edit, templates, layer, h, at_block=False)
    key, output = published_reading(lm, lm.down_projection(layer), [(edit, "{}")])
    return (target - output[0]) / (key[0] @ u), u


def published_solve(c: Tensor, keys: Tensor, weight: float, history: Tensor | None) -> Tensor:
    """The dense d_mlp x d_mlp system of every batch and layer, in float64."""
    system = weight * c.double() + keys @ keys.T
    if history is not None:
        system = system + history
    return torch.linalg.solve(system, keys)


def published_memit(
    lm: EditableLM,
    edits: list[Edit],
    groups: list[list[str]],
    h: MemitHyperParameters,
    moments: dict[int, Tensor],
) -> dict[str, Tensor]:
    """The dense update of each layer: one search per fact, keys and outputs from full passes."""
    flat = [t for group in groups for t in group]
    last = h.layers[-1]
    z = torch.stack([published_search(lm, e, flat, last, h, at_block=True) for e in edits])
    updates: dict[str, Tensor] = {}
    names = [lm.architecture.weight_name(layer) for layer in h.layers]
    with lm.weights_restored(names):
        for index, (layer, name) in enumerate(zip(h.layers, names, strict=True)):
            prompts = [(edit, t) for edit in edits for t in flat]
            each = published_reading(lm, lm.down_projection(layer), prompts)[0].view(
                len(edits), len(flat), -1
            )
            means = [part.mean(1) for part in each.split([len(group) for group in groups], 1)]
            k = torch.stack(means).mean(0).T.double()
            _, outputs = published_reading(lm, lm.block(last), [(edit, "{}") for edit in edits])
            residual = (z - outputs).T.double() / (len(h.layers) - index)
            adjusted = published_solve(moments[layer], k, h.mom2_update_weight, None)
            update = residual @ adjusted.T
            updates[name] = update.T if lm.is_transposed(name) else update
            lm.weight(name).data += updates[name].to(lm.weight(name))
    return updates
