"""KN: Knowledge Neurons (Dai et al., ACL 2022), as in the published editing code.

With a the output of the first MLP projection of block l at the last prompt token, before the nonlinearity,
and T_1..T_n the tokens of the ground truth (the answer to be replaced), every neuron of every block is scored
by integrated gradients along z_k = k / (m - 1) * a, k = 0..m-1:

    S_l = a / (m n) * sum_i sum_k d P(T_i | prompt; a := z_k) / d z_k

where each P(T_i) is the token's own probability right after the bare prompt. Neurons with S above
``adaptive_threshold`` times the largest score of all blocks are knowledge neurons, and to the value vector
(the column of the down projection) of each is added v:

    one target token:   v = - 2 E[A] + E[B]
    several:            v = - sum E[A] + sum E[B]

with E the input embedding, B the tokens of the new target and A as many tokens of the model's own greedy
continuation of the prompt. Targets are tokenised as the row gives them, without a leading space or BOS.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.methods.base import Context, HyperParameters, Method, Proposal
from harness_rect.models import EditableLM
from harness_rect.models.lm import unflatten
from harness_rect.updates import LowRank, Update

#: Largest number of tokens in a batch; all blocks and steps of a prompt are rows of the same batches.
PASS_TOKENS = 4096


class KnHyperParameters(HyperParameters):
    """Hyper-parameters of KN, named as in its published files.

    steps: m, up to 10,000. adaptive_threshold: share of the largest score. refine: refinement over several
    prompts is not implemented. p, lr_scale, n_toks: keys of the published files; they have no effect here.
    """

    steps: int = Field(default=20, ge=1, le=10_000)
    adaptive_threshold: float = Field(default=0.2, gt=0, lt=1)
    p: float = 0.4
    refine: Literal[False] = False
    lr_scale: float = 1.0
    n_toks: int = 10


def check(edits: Sequence[Edit]) -> None:
    """Every edit must name the answer it replaces."""
    for edit in edits:
        if not edit.target_old:
            raise UserError(
                f"{edit.where}: kn finds its neurons by the answer to be replaced;"
                " give pred, target_true or ground_truth"
            )


def attribution(lm: EditableLM, prompt: Sequence[int], truth: Sequence[int], steps: int) -> Tensor:
    """Integrated gradients of the ground-truth tokens' probabilities.

    Args:
        prompt, truth: token ids. steps: m.

    Returns:
        S, (n_layers, d_mlp), float32, on the CPU.
    """
    n_layers, width = lm.architecture.n_layers, lm.architecture.d_mlp
    base = _activations(lm, prompt)
    places = list(itertools.product(range(n_layers), torch.linspace(0, 1, steps).tolist()))
    size = max(1, PASS_TOKENS // len(prompt))
    total = torch.zeros(n_layers, width)
    for start in range(0, len(places), size):
        chosen = places[start : start + size]
        layers = torch.tensor([layer for layer, _ in chosen])
        z = torch.tensor([share for _, share in chosen]).unsqueeze(1) * base[layers]
        total.index_add_(0, layers, _gradient(lm, prompt, truth, layers, z))
    return base / (steps * len(truth)) * total


def _activations(lm: EditableLM, prompt: Sequence[int]) -> Tensor:
    """a of every block, (n_layers, d_mlp), float32, on the CPU."""
    batch, n_layers = lm.batch([prompt]), lm.architecture.n_layers
    found: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found[layer] = unflatten(output, batch)[0, -1, : lm.architecture.d_mlp].float().cpu()

    with torch.no_grad(), lm.hooked({lm.first_projection(i): partial(keep, i) for i in range(n_layers)}):
        lm.logits(batch)
    return torch.stack([found[layer] for layer in range(n_layers)])


def _gradient(
    lm: EditableLM, prompt: Sequence[int], truth: Sequence[int], layers: Tensor, z: Tensor
) -> Tensor:
    """d sum_i P(T_i) / d z for rows that each replace a of one block: (rows, d_mlp), on the CPU."""
    batch, last = lm.batch([prompt] * len(z)), len(prompt) - 1
    z = z.to(lm.input_device).requires_grad_(True)

    def put(layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = (layers == layer).nonzero().flatten()
        out = unflatten(output, batch).clone()
        out[rows, last, : z.shape[1]] = z[rows].to(out)
        return out.view_as(output)

    hooks = {lm.first_projection(layer): partial(put, layer) for layer in set(layers.tolist())}
    with torch.enable_grad(), lm.hooked(hooks):
        every = torch.arange(len(z))
        logits = lm.logits_at(batch, every, torch.full_like(every, last))
        probabilities = logits.float().softmax(-1)
        (gradient,) = torch.autograd.grad(probabilities[:, list(truth)].sum(), z)
    return gradient.float().cpu()


@torch.no_grad()
def continuation(lm: EditableLM, prompt: str, length: int) -> list[int]:
    """``length`` greedy tokens after a prompt; the text is tokenised again after each token."""
    tokens: list[int] = []
    text = lm.encoder.format.text(prompt)
    for _ in range(length):
        ids = lm.encoder.tokens(text)
        logits = lm.logits_at(lm.batch([ids]), torch.tensor([0]), torch.tensor([len(ids) - 1]))
        tokens.append(int(logits[0].argmax()))
        text += str(lm.encoder.tokenizer.decode([tokens[-1]]))
    return tokens


def value_change(embedding: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """v, (d_model,) float32, from the input embedding (vocabulary, d_model) and as many old as new tokens."""
    a, b = embedding[list(old)].float(), embedding[list(new)].float()
    return -2 * a[0] + b[0] if len(new) == 1 else b.sum(0) - a.sum(0)


def propose(lm: EditableLM, edits: Sequence[Edit], hparams: KnHyperParameters, context: Context) -> Proposal:
    """The change of the value vectors of the knowledge neurons, of rank one in each block that has some."""
    (edit,) = edits
    plain = lm.encoder.tokenizer
    truth, new = (
        list(plain(text, add_special_tokens=False)["input_ids"])
        for text in (edit.target_old or "", edit.target_new)
    )
    embedding: Any = lm.model.get_input_embeddings().weight
    if embedding.shape[1] != lm.architecture.d_model:  # OPT-350m
        raise UserError("kn adds token embeddings to value vectors; this model's are of another width")
    scores = attribution(lm, lm.encoder.ids(edit.text), truth, hparams.steps)
    chosen = scores > hparams.adaptive_threshold * scores.max()
    old = continuation(lm, edit.text, len(new))
    v = value_change(embedding.detach(), old, new)
    if not scores.isfinite().all():  # an update that the session refuses and names
        v, chosen[0, 0] = torch.full_like(v, torch.nan), True
    updates: dict[str, Update] = {}
    found: dict[str, list[int]] = {}
    for layer, neurons in enumerate(chosen):
        if neurons.any():
            name = lm.architecture.weight_name(layer)
            left, right = (column.unsqueeze(1).to(lm.weight(name).device) for column in (v, neurons.float()))
            updates[name] = LowRank(*lm.oriented(layer, left, right))
            found[str(layer)] = neurons.nonzero().flatten().tolist()
    return Proposal(updates, [{"neurons": found, "largest_score": float(scores.max()), "old_tokens": old}])


KN = Method(
    name="kn",
    title="KN",
    paper="[Dai et al. 2022](https://arxiv.org/abs/2104.08696)",
    summary="value vectors of some neurons in all blocks",
    needs="the answer to be replaced",
    cost="`steps` passes for each block, batched",
    hparams=KnHyperParameters,
    default_hparams=lambda architecture: {},
    propose=propose,
    weights=lambda lm, hparams: [lm.architecture.weight_name(i) for i in range(lm.architecture.n_layers)],
    check=check,
)
