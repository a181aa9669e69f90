"""The likelihood of targets and its gradients (FT, MEND, UltraEdit)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness_rect.edits import Edit
from harness_rect.models import EditableLM
from harness_rect.models.lm import Batch, unflatten

Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Targets:
    """Prompts with their targets as one batch.

    rows, positions: (n,) int64 on the CPU, the positions whose logits predict the n target tokens. tokens:
    (n,) int64. weights: (n,) float32, 1 / length of the token's target. tokens and weights are on the input
    device.
    """

    batch: Batch
    rows: Tensor
    positions: Tensor
    tokens: Tensor
    weights: Tensor


def targets_of(lm: EditableLM, pairs: Sequence[Pair]) -> Targets:
    """``pairs``: ids of a prompt and of its target, as ``lm.encoder.continuation`` gives them.

    Raises UserError for a sequence longer than the model can read.
    """
    places = [
        (row, len(prompt) - 1 + i, token, 1 / len(target))
        for row, (prompt, target) in enumerate(pairs)
        for i, token in enumerate(target)
    ]
    rows, positions, tokens, weights = zip(*places, strict=True)
    device = lm.input_device
    return Targets(
        lm.batch([prompt + target[:-1] for prompt, target in pairs]),
        torch.tensor(rows),
        torch.tensor(positions),
        torch.tensor(tokens, device=device),
        torch.tensor(weights, device=device),
    )


def token_nll(lm: EditableLM, targets: Targets) -> Tensor:
    """(n,) float32 negative log-likelihood of every target token."""
    logits = lm.logits_at(targets.batch, targets.rows, targets.positions).to(targets.tokens.device)
    return nn.functional.cross_entropy(logits.float(), targets.tokens, reduction="none")


def fact_means(targets: Targets, nll: Tensor) -> Tensor:
    """(prompts,) mean over each prompt's target tokens of ``nll`` (n,), differentiable."""
    weighted = nll * targets.weights
    empty = torch.zeros(len(targets.batch.lengths), device=weighted.device)
    return empty.index_add(0, targets.rows.to(weighted.device), weighted)


def target_gradients(
    lm: EditableLM,
    edits: Sequence[Edit],
    weights: Sequence[str],
    reduced: Callable[[Targets, Tensor], Tensor],
) -> tuple[Targets, dict[str, tuple[Tensor, Tensor]], list[dict[str, Any]]]:
    """Inputs and output gradients of weights for the NLL of the facts' targets.

    Args:
        weights: names of parameters of linear modules.
        reduced: the loss (), from the targets and the NLL of each of their tokens, (n,).

    Returns:
        the targets; weight -> (x, g) as :func:`inputs_and_gradients` gives them; for each fact its mean NLL,
        as the details of a proposal.
    """
    targets = targets_of(lm, [lm.encoder.continuation(edit.text, edit.target) for edit in edits])
    nll: list[Tensor] = []

    def loss() -> Tensor:
        nll.append(token_nll(lm, targets))
        return reduced(targets, nll[0])

    found = inputs_and_gradients(lm, weights, targets.batch, loss)
    each = fact_means(targets, nll[0].detach())
    return targets, found, [{"nll": value} for value in each.tolist()]


def inputs_and_gradients(
    lm: EditableLM, weights: Sequence[str], batch: Batch, loss: Callable[[], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs of linear modules in the computation of ``loss``, and its gradients at their outputs.

    All parameters may be frozen: a zero tensor that requires gradients is added to each output.

    Args:
        weights: names of the modules' parameters. batch: the one on which ``loss`` runs the model once.

    Returns:
        weight -> (x (sequences, longest, inputs), g (sequences, longest, outputs)), detached, float32.
    """
    inputs: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs[name] = unflatten(args[0].detach(), batch).float()
        probes[name] = torch.zeros_like(output, requires_grad=True)
        return output + probes[name]

    modules = {lm.model.get_submodule(name.removesuffix(".weight")): name for name in weights}
    with torch.enable_grad(), lm.hooked({module: partial(hook, name) for module, name in modules.items()}):
        gradients = torch.autograd.grad(loss(), [probes[name] for name in weights])
    return {
        name: (inputs[name], unflatten(gradient, batch).float())
        for name, gradient in zip(weights, gradients, strict=True)
    }
