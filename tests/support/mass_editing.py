"""MEMIT's loop over layers in float64 with any solve: the reference for methods that are derived from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.tiny_models import D_MLP, make_edit
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods import Proposal
from harness_rect.methods.fact_reader import FactReader
from harness_rect.methods.value_search import Request, search_values
from harness_rect.models import EditableLM
from harness_rect.moments import SecondMoment

GROUPS = [["{}"], ["The city is large. {}", "Therefore I. {}"]]
#: For two layers of a model of three.
SEARCH: dict[str, Any] = {"layers": [0, 1], "v_num_grad_steps": 6, "v_lr": 0.5, "v_weight_decay": 0.01}
SEARCH |= {"clamp_norm_factor": 4, "context_templates": GROUPS}
#: Batches of different sizes, of facts that differ in their subject.
BATCHES = [
    [make_edit("{} plays the sport of", "LeBron James", "football", id="a")],
    [
        make_edit("To visit the {} you must go to", "Vatican Library", "Seattle", id="b"),
        make_edit("The mother tongue of {} is", "Danielle Darrieux", "English", id="c"),
    ],
    [make_edit("{} stands in", "The Space Needle", "Paris", id="d")],
    [
        make_edit("{} is a", "Giulia Rossi", "speaker", id="e"),
        make_edit("{} is in", "Toodyay Fire Station", "Rome", id="f"),
        make_edit("{} stands in", "The capital", "Austria", id="g"),
    ],
]


def random_moment(layer: int, width: int = D_MLP) -> SecondMoment:
    """A C of full rank for a layer, with eigenvalues from 0.1 to about 4."""
    generator = torch.Generator().manual_seed(layer)
    factor = torch.randn(width, width, dtype=torch.float64, generator=generator)
    return SecondMoment(factor @ factor.T / width + 0.1 * torch.eye(width, dtype=torch.float64), 1, "test")


def matrix_of(lm: EditableLM, layer: int) -> Tensor:
    """The down projection as it is now, (d_model, d_mlp) float64."""
    return _turned(lm, layer, lm.weight(lm.architecture.weight_name(layer)).detach().double()).clone()


def keys_of(lm: EditableLM, edits: Sequence[Edit], layer: int) -> Tensor:
    """K (d_mlp, B) float64 of these facts in the model as it is."""
    return FactReader(lm, edits, GROUPS).keys([layer])[layer].T.double()


def wanted_updates(
    lm: EditableLM, edits: Sequence[Edit], hparams: Any, solve: Callable[[int, Tensor, Tensor], Tensor]
) -> dict[int, Tensor]:
    """Layer -> dW (d_model, d_mlp), for ``solve(layer, K, R)`` in float64; leaves the model as it was."""

    def outputs() -> Tensor:
        return FactReader(lm, edits, [["{}"]]).bare_outputs(layers[-1])

    layers = hparams.layers
    bare, templates = outputs(), [template for group in GROUPS for template in group]
    requests = [Request(edit, v0) for edit, v0 in zip(edits, bare, strict=True)]
    found = search_values(lm, requests, templates, layers[-1], hparams, at_block=True)
    values = bare + torch.stack([d for d, _ in found])
    updates = {}
    with lm.weights_restored([lm.architecture.weight_name(layer) for layer in layers]):
        for index, layer in enumerate(layers):
            residual = ((values - outputs()) / (len(layers) - index)).T.double()
            updates[layer] = solve(layer, keys_of(lm, edits, layer), residual)
            _add(lm, layer, updates[layer])
    return updates


def proposed(lm: EditableLM, proposal: Proposal) -> dict[int, Tensor]:
    """The same of a proposal."""
    layers = {lm.architecture.weight_name(layer): layer for layer in range(lm.architecture.n_layers)}
    found = {layers[name]: update.dense().double() for name, update in proposal.updates.items()}
    return {layer: _turned(lm, layer, update) for layer, update in found.items()}


def apply(lm: EditableLM, updates: dict[int, Tensor], share: float) -> None:
    """Add a share of each update, as a regularizer might."""
    for layer, update in updates.items():
        _add(lm, layer, share * update)


def agree(found: dict[int, Tensor], wanted: dict[int, Tensor], tolerance: float = 1e-4) -> bool:
    """Whether no element is off by more than ``tolerance`` of the largest."""
    off = [(found[layer] - wanted[layer]).abs().max() / wanted[layer].abs().max() for layer in wanted]
    return found.keys() == wanted.keys() and all(bool(each < tolerance) for each in off)


def _add(lm: EditableLM, layer: int, update: Tensor) -> None:
    lm.weight(lm.architecture.weight_name(layer)).data += _turned(lm, layer, update).float()


def _turned(lm: EditableLM, layer: int, matrix: Tensor) -> Tensor:
    return matrix.T if lm.is_transposed(lm.architecture.weight_name(layer)) else matrix
