"""Fine-tuning baselines: Adam on the down projections of a few blocks, the rest of the model frozen.

* ``ft``: mean NLL per target token at the edit prompts (Zhu et al. 2020, as the baseline of Meng et al.
  2022). With ``norm_constraint`` = epsilon it is FT-L: after every step each element is clamped to
  |W - W_before| <= epsilon.
* ``locft_bf``: localized breadth-first fine-tuning ("Fine-tuning Done Right in Model Editing", arXiv
  2509.22072): mini-batches, epoch after epoch over the whole batch of facts instead of one fact to its end,
  and an end-of-text token after every target. It is meant for a large ``edit_batch_size``; with 1 it
  differs from ``ft`` by that token only.

W_before is the weight just before the edit. The FT of the ROME repository reads the probabilities of all
target tokens at one position; here each token is scored at its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import nn

from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.methods.base import Context, HyperParameters, Method, Proposal, Steps, down_projections
from harness_rect.methods.gradients import Pair, fact_means, targets_of, token_nll
from harness_rect.models import EditableLM
from harness_rect.updates import Dense

#: Training stops when the mean loss of an epoch is below this (the published code of both).
LOSS_FLOOR = 1e-2


class FtHyperParameters(HyperParameters):
    """Hyper-parameters of fine-tuning, named as in the published files.

    num_steps: epochs over the facts of an edit, up to 100,000. batch_size: facts per gradient step.
    norm_constraint: epsilon, the largest change of an element; None or false for no limit.
    kl_factor, wd_power_law: keys of published files; only the values that switch them off are accepted.
    """

    layers: list[int] = Field(min_length=1)
    num_steps: Steps = 25
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=32, ge=1)
    norm_constraint: float | None = Field(default=None, gt=0)
    kl_factor: float = Field(default=0.0, ge=0, le=0)
    wd_power_law: None = None

    @field_validator("norm_constraint", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value


class FtLHyperParameters(FtHyperParameters):
    """As :class:`FtHyperParameters`, always with a limit on the change."""

    norm_constraint: float | None = Field(default=5e-4, gt=0)

    @field_validator("norm_constraint")
    @classmethod
    def _required(cls, epsilon: float | None) -> float | None:
        if epsilon is None:
            raise ValueError("ft_l limits the change of each element; without a limit use method=ft")
        return epsilon


def propose(
    lm: EditableLM,
    edits: Sequence[Edit],
    hparams: FtHyperParameters,
    context: Context,
    *,
    end_of_text: bool,
) -> Proposal:
    """The change of the weights by training on these facts; the model's own weights are restored."""
    pairs = [_pair(lm, edit, end_of_text) for edit in edits]
    names = down_projections(lm, hparams)
    parameters = [lm.weight(name) for name in names]
    before = [parameter.detach().float().clone() for parameter in parameters]
    masters = [weight.clone() for weight in before]  # float32, rounded into the model at every step
    optimiser = torch.optim.Adam(masters, lr=hparams.lr, weight_decay=hparams.weight_decay)
    order = list(range(len(pairs)))
    # Seeded by the facts, so that the order does not depend on earlier steps.
    shuffle = random.Random("\n".join(edit.id for edit in edits)).shuffle
    losses = [0.0] * len(pairs)
    first: list[float] = []
    with lm.weights_restored(names), _trainable(parameters):
        for _ in range(hparams.num_steps):
            shuffle(order)
            for start in range(0, len(order), hparams.batch_size):
                chosen = order[start : start + hparams.batch_size]
                targets = targets_of(lm, [pairs[i] for i in chosen])
                each = fact_means(targets, token_nll(lm, targets))
                for i, value in zip(chosen, each.tolist(), strict=True):
                    losses[i] = value
                loss = each.mean()
                if loss.item() < LOSS_FLOOR:
                    continue
                gradients = torch.autograd.grad(loss, parameters)
                for master, gradient in zip(masters, gradients, strict=True):
                    master.grad = gradient.float()
                optimiser.step()
                for parameter, master, weight in zip(parameters, masters, before, strict=True):
                    if hparams.norm_constraint is not None:
                        epsilon = hparams.norm_constraint
                        master.clamp_(min=weight - epsilon, max=weight + epsilon)
                    parameter.data.copy_(master)
            first = first or list(losses)
            if sum(losses) / len(losses) < LOSS_FLOOR:
                break
    updates = {n: Dense(m.detach() - b) for n, m, b in zip(names, masters, before, strict=True)}
    details = [{"first_nll": a, "nll": b} for a, b in zip(first, losses, strict=True)]
    return Proposal(dict(updates), details)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Enable gradients of these parameters of a frozen model within the block."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _pair(lm: EditableLM, edit: Edit, end_of_text: bool) -> Pair:
    prompt, target = lm.encoder.continuation(edit.text, edit.target)
    if not end_of_text:
        return prompt, target
    end = lm.encoder.end_of_answer
    if end is None:
        raise UserError("locft_bf needs an end-of-text token, and this tokenizer has no eos_token")
    return prompt, [*target, end]


FT = Method(
    name="ft",
    title="FT",
    paper="baseline of [Meng et al. 2022](https://arxiv.org/abs/2202.05262)",
    summary="down projections of its layers, dense",
    cost="up to `num_steps` forward and backward passes",
    hparams=FtHyperParameters,
    default_hparams=lambda architecture: {"layers": [2 * architecture.n_layers // 3]},
    propose=partial(propose, end_of_text=False),
    batches=True,
)
FT_L = replace(
    FT,
    name="ft_l",
    hparams=FtLHyperParameters,
    title="FT-L",
    paper="[Zhu et al. 2020](https://arxiv.org/abs/2012.00363)",
    summary="as `ft`, each element changed by at most `norm_constraint`",
    cost="as `ft`",
)
LOCFT_BF = replace(
    FT,
    name="locft_bf",
    propose=partial(propose, end_of_text=True),
    title="LocFT-BF",
    paper="[Fine-tuning Done Right in Model Editing](https://arxiv.org/abs/2509.22072)",
    summary="as `ft`, epochs over all facts, with the end of text",
    needs="nothing; made for large batches",
    cost="as `ft`",
)
