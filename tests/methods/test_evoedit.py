"""EvoEdit against its formulas in float64, with P as a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mass_editing import (
    BATCHES,
    GROUPS,
    SEARCH,
    agree,
    apply,
    keys_of,
    proposed,
    random_moment,
    wanted_updates,
)
from support.tiny_models import depth

from harness_rect.methods import METHODS, Context
from harness_rect.methods.alphaedit import AlphaEditHyperParameters

EVOEDIT = METHODS["evoedit"]
THRESHOLD = 1.0


def hparams(**changes: Any) -> AlphaEditHyperParameters:
    return AlphaEditHyperParameters(**SEARCH | {"nullspace_threshold": THRESHOLD, "L2": 0.5} | changes)


def null_space(layer: int) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(random_moment(layer).mean)
    kept = vectors[:, values < THRESHOLD]
    assert 10 < kept.shape[1] < len(kept) - 10
    return kept @ kept.T


def removed_from(projector: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    left, s, _ = torch.linalg.svd(projector @ keys, full_matrices=False)
    q = left[:, s > max(keys.shape) * torch.finfo(s.dtype).eps * s[0]]
    assert q.shape[1] == keys.shape[1]
    return projector - q @ q.T


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_are_those_of_the_formulas(family, make_lm):
    lm, h = make_lm(family, **depth(family, 3)), hparams()
    context = Context(GROUPS, random_moment)
    projectors = {layer: null_space(layer) for layer in h.layers}

    def solve(layer: int, keys: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        projected = projectors[layer] @ keys
        system = keys.T @ projected + h.L2 * torch.eye(keys.shape[1], dtype=torch.float64)
        return residual @ torch.linalg.inv(system) @ projected.T

    with lm.frozen():
        for batch in BATCHES:
            found = proposed(lm, EVOEDIT.propose(lm, batch, h, context))
            assert agree(found, wanted_updates(lm, batch, h, solve))
            apply(lm, found, 0.7)
            EVOEDIT.after_step(lm, batch, h, context)
            for layer in h.layers:
                projectors[layer] = removed_from(projectors[layer], keys_of(lm, batch, layer))


def test_the_first_batch_is_alphaedits(make_lm):
    lm, h = make_lm("llama", num_hidden_layers=3), hparams()
    with lm.frozen():
        found, wanted = (
            METHODS[name].propose(lm, BATCHES[1], h, Context(GROUPS, random_moment)).updates
            for name in ("evoedit", "alphaedit")
        )
    assert all(torch.equal(found[name].dense(), wanted[name].dense()) for name in wanted)


def test_later_batches_do_not_touch_the_keys_of_earlier_ones(make_lm):
    lm, h = make_lm("gpt2"), hparams(layers=[0])
    context = Context(GROUPS, random_moment)
    with lm.frozen():
        for number, batch in enumerate(BATCHES):
            (update,) = proposed(lm, EVOEDIT.propose(lm, batch, h, context)).values()
            for earlier in BATCHES[:number]:
                assert (update @ keys_of(lm, earlier, 0)).norm() < 1e-6 * update.norm()
            EVOEDIT.after_step(lm, batch, h, context)


def test_keys_that_come_again_are_removed_once(make_lm):
    lm, h = make_lm("gpt2"), hparams(layers=[0])
    context = Context(GROUPS, random_moment)
    with lm.frozen():
        EVOEDIT.after_step(lm, BATCHES[1], h, context)
        removed = context.state["0.removed"]
        assert removed.shape[1] == 2 and removed.is_contiguous()  # as it comes back from a file
        EVOEDIT.after_step(lm, BATCHES[1] + BATCHES[0], h, context)
        removed = context.state["0.removed"]
        assert removed.shape[1] == 3
        torch.testing.assert_close(removed.T @ removed, torch.eye(3, dtype=torch.float64))
        (update,) = EVOEDIT.propose(lm, BATCHES[1], h, context).updates.values()
        assert update.dense().norm() < 1e-9


def test_a_whole_null_space_can_be_removed(make_lm):
    lm, h = make_lm("llama", intermediate_size=4), hparams(layers=[0], nullspace_threshold=100)
    context = Context(GROUPS, lambda layer: random_moment(layer, 4))
    with lm.frozen():
        for batch in BATCHES:
            EVOEDIT.after_step(lm, batch, h, context)
        assert context.state["0.removed"].shape == (4, 4)
        (update,) = EVOEDIT.propose(lm, BATCHES[0], h, context).updates.values()
    assert update.dense().norm() < 1e-9
