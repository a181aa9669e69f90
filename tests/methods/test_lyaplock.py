"""LyapLock against its formulas in float64, with all sums as matrices."""

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
    matrix_of,
    proposed,
    random_moment,
    wanted_updates,
)
from support.tiny_models import D_MLP, depth
from torch import Tensor

from harness_rect.methods import METHODS, Context
from harness_rect.methods.lyaplock import LyapLockHyperParameters
from harness_rect.methods.memit import MemitHyperParameters
from harness_rect.models import EditableLM
from harness_rect.updates import LowRank

LYAPLOCK = METHODS["lyaplock"]


def hparams(**changes: Any) -> LyapLockHyperParameters:
    return LyapLockHyperParameters(**SEARCH | {"mom2_update_weight": 0.1} | changes)


def start(lm: EditableLM, width: int = D_MLP) -> Context:
    originals = {name: value.detach().clone() for name, value in lm.model.named_parameters()}
    return Context(GROUPS, lambda layer: random_moment(layer, width), original=originals.__getitem__)


class Reference:
    """One layer: V_0 K_0^T, K_p K_p^T, V_p K_p^T, Z and D_base as the formulas have them."""

    def __init__(self, original: Tensor, moment: Tensor, h: LyapLockHyperParameters) -> None:
        self.c, self.h, self.v0k0, self.v0v0 = moment, h, original @ moment, original @ moment @ original.T
        self.kpkp, self.vpkp = torch.zeros_like(moment), torch.zeros_like(original)
        self.base: float | None = None
        self.z = 0.0

    def solve(self, weight: Tensor, keys: Tensor, residual: Tensor) -> Tensor:
        lam, v = self.h.mom2_update_weight, self.h.V
        az = 1.0 if self.base is None else self.z / (self.h.alpha * self.base) ** 0.5
        a = v * (keys @ keys.T + self.kpkp) + az * lam * self.c
        left = v * residual @ keys.T + az * lam * (self.v0k0 - weight @ self.c)
        left += v * (self.vpkp - weight @ self.kpkp)
        return left @ torch.linalg.inv(a)

    def after(self, weight: Tensor, keys: Tensor) -> None:
        d = (self.c @ weight.T @ weight).trace() - 2 * (self.v0k0 @ weight.T).trace() + self.v0v0.trace()
        if self.base is None:
            self.base = float(d)
            self.z = (self.h.alpha * self.base) ** 0.5
        allowed = self.h.alpha * self.base
        a = 1 / allowed**0.5
        self.z = max(self.z + a * (float(d) - allowed) + self.h.b, allowed**0.5)
        self.kpkp += keys @ keys.T
        self.vpkp += weight @ keys @ keys.T


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("width", [D_MLP, 3])  # more facts than dimensions before the last batch
@pytest.mark.parametrize("bound", [{}, {"alpha": 0.4, "V": 2.0, "b": 0.5}])
def test_batches_are_those_of_the_formulas(family, width, bound, make_lm):
    h = hparams(**bound)
    widths = {"n_inner" if family == "gpt2" else "intermediate_size": width}
    lm = make_lm(family, **depth(family, 3), **widths)
    context = start(lm, width)
    layers = {i: Reference(matrix_of(lm, i), context.second_moment(i).mean, h) for i in h.layers}

    def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        return layers[layer].solve(matrix_of(lm, layer), keys, residual)

    with lm.frozen():
        for batch in BATCHES:
            found = proposed(lm, LYAPLOCK.propose(lm, batch, h, context))
            assert agree(found, wanted_updates(lm, batch, h, solve))
            apply(lm, found, 0.7)
            LYAPLOCK.after_step(lm, batch, h, context)
            for layer, reference in layers.items():
                reference.after(matrix_of(lm, layer), keys_of(lm, batch, layer))
                z, floor = context.state[f"{layer}.queue"].tolist()
                assert z == pytest.approx(reference.z, rel=1e-5)
                assert z > floor * 1.01 if bound else z == floor
    assert all(part.is_contiguous() for part in context.state.values())  # as they come back from a file
    assert context.state["0.keys"].shape == (width, min(width, 7))


def test_the_first_batch_is_memits(make_lm):
    lm = make_lm("gpt2", n_layer=3)
    with lm.frozen():
        found = LYAPLOCK.propose(lm, BATCHES[1], hparams(), start(lm)).updates
        h = MemitHyperParameters(**SEARCH | {"mom2_update_weight": 0.1})
        wanted = METHODS["memit"].propose(lm, BATCHES[1], h, start(lm)).updates
    for name, update in found.items():
        assert isinstance(update, LowRank)
        torch.testing.assert_close(update.dense(), wanted[name].dense())


def test_a_first_batch_that_changes_nothing_leaves_the_next_one_first(make_lm):
    lm, h = make_lm("llama", num_hidden_layers=3), hparams()
    context = start(lm)
    with lm.frozen():
        LYAPLOCK.after_step(lm, BATCHES[0], h, context)
        assert not any(name.endswith("queue") for name in context.state)
        apply(lm, proposed(lm, LYAPLOCK.propose(lm, BATCHES[1], h, context)), 1)
        LYAPLOCK.after_step(lm, BATCHES[1], h, context)
    assert context.state["1.queue"].min() > 0
