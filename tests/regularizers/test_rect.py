"""RECT keeps an exact number of the elements that change most; Random keeps what chance says."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.regularizers import trimming

from harness_rect.regularizers import random_keep, rect, rect_alphaedit
from harness_rect.regularizers.rect import _Changes, count_th_largest, kept_count, relative_change

#: Few values, so that zeros and ties are common; and any float.
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5]),
    st.floats(-1e3, 1e3, width=32),
)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=7)
SHARES = st.one_of(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), st.floats(0, 1))


@st.composite
def updates(draw):
    """(dW, W), float32, of one shape."""
    shape = draw(SHAPES)
    arrays = [draw(hnp.arrays(np.float32, shape, elements=NUMBERS)) for _ in range(2)]
    return tuple(torch.from_numpy(array.copy()) for array in arrays)


def reference_mask(update: torch.Tensor, weight: torch.Tensor, keep: float) -> np.ndarray:
    """The elements kept, by a stable sort in numpy: largest relative change first, then position."""
    dw, w = update.numpy().ravel(), weight.numpy().ravel()
    with np.errstate(all="ignore"):
        delta = np.abs(dw / w)
    delta[dw == 0] = 0
    order = np.argsort(-delta, kind="stable")
    mask = np.zeros(dw.size, bool)
    mask[order[: dw.size - int(dw.size * (1 - keep))]] = True
    return mask.reshape(update.shape)


@given(updates(), SHARES)
@settings(deadline=None)
def test_the_kept_set_is_that_of_a_sort(pair, keep):
    update, weight = pair
    kept = rect(update, weight, keep=keep).numpy()
    mask = reference_mask(update, weight, keep)
    np.testing.assert_array_equal(kept, np.where(mask, update.numpy(), np.float32(0)))


@given(updates(), SHARES)
@settings(deadline=None)
def test_the_number_kept_is_exact_and_inputs_stay(pair, keep):
    update, weight = pair
    update = torch.where(update == 0, torch.ones(()), update)  # so that kept elements can be counted
    before = update.clone(), weight.clone()
    kept = rect(update, weight, keep=keep)
    n = update.numel()
    assert int(torch.count_nonzero(kept)) == n - int(n * (1 - keep)) == kept_count(n, keep)
    assert torch.equal(update, before[0]) and torch.equal(weight, before[1])
    kept.fill_(7)
    assert torch.equal(update, before[0]), "the result shares memory with the update"


@given(updates())
@settings(deadline=None)
def test_one_keeps_all_and_zero_nothing(pair):
    update, weight = pair
    assert torch.equal(rect(update, weight, keep=1.0), update)
    assert torch.equal(rect(update, weight, keep=0.0), torch.zeros_like(update))
    assert torch.equal(rect_alphaedit(update, weight, keep=1.0), update)


@pytest.mark.parametrize("percent, kept", [(20, 3277), (40, 6554), (60, 9831), (80, 13108)])
def test_the_papers_shares_of_a_published_weight(percent, kept):
    update = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    assert int(torch.count_nonzero(rect(update, weight, keep=percent / 100))) == kept


def test_ties_go_to_the_earlier_position():
    update, weight = torch.ones(2, 5), torch.full((2, 5), 2.0)
    assert rect(update, weight, keep=0.3).tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_a_change_of_zero_is_kept_first_and_no_change_of_zero_last():
    update = torch.tensor([1e-9, 5.0, 0.0, 3.0, 0.0])
    weight = torch.tensor([0.0, 1.0, 0.0, 1.0, 4.0])
    assert relative_change(update, weight).tolist() == [math.inf, 5, 0, 3, 0]
    assert rect(update, weight, keep=0.2).tolist() == [update[0].item(), 0, 0, 0, 0]
    assert rect(update, weight, keep=0.4).tolist() == [update[0].item(), 5, 0, 0, 0]
    assert rect(update, weight, keep=0.6).tolist() == [update[0].item(), 5, 0, 3, 0]


@pytest.mark.parametrize("function", [rect, rect_alphaedit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_shape_and_sign_are_kept(function, dtype):
    update = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = function(update, torch.full_like(update, 0.5), keep=0.4)
    assert kept.dtype == dtype and kept.shape == update.shape and kept.device == update.device
    assert set(kept[kept != 0].tolist()) <= set(update.flatten().tolist())


def test_a_transposed_view_is_trimmed_like_its_copy():
    update = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).T
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).T
    assert torch.equal(
        rect(update, weight, keep=0.4), rect(update.contiguous(), weight.contiguous(), keep=0.4)
    )


# -- the second convention ----------------------------------------------------------------------------


@given(updates(), SHARES)
@settings(deadline=None)
def test_alphaedit_keeps_what_reaches_the_threshold(pair, keep):
    """Its definition: |dW / (W + 1e-8)| >= the int(N (1 - k))-th smallest of these values."""
    update, weight = pair
    kept = rect_alphaedit(update, weight, keep=keep).numpy()
    with np.errstate(all="ignore"):
        delta = np.abs(update.numpy() / (weight.numpy() + np.float32(1e-8)))
    rank = int(update.numel() * (1 - keep))
    if rank == 0:
        np.testing.assert_array_equal(kept, update.numpy())
        return
    threshold = np.sort(delta.ravel())[rank - 1]
    np.testing.assert_array_equal(kept, np.where(delta >= threshold, update.numpy(), np.float32(0)))


def test_alphaedit_keeps_one_element_more():
    update = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    for keep in (0.2, 0.4, 0.8):
        ours, theirs = rect(update, weight, keep=keep), rect_alphaedit(update, weight, keep=keep)
        assert int(torch.count_nonzero(theirs)) == int(torch.count_nonzero(ours)) + 1
        assert ((ours != 0) <= (theirs != 0)).all()


# -- random -------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.8])
def test_random_keeps_its_share_in_the_mean(keep):
    update = torch.ones(200, 500)
    kept = random_keep(update, keep=keep, generator=generator())
    share = float(kept.mean())
    assert abs(share - keep) < 4 * math.sqrt(keep * (1 - keep) / update.numel())
    assert share != keep  # each element on its own: the number is not fixed


def test_random_keeps_all_or_nothing_at_the_ends():
    update = torch.randn(50, 50, generator=generator())
    assert torch.equal(random_keep(update, keep=1.0, generator=generator()), update)
    assert not random_keep(update, keep=0.0, generator=generator()).any()


def test_random_depends_on_its_generator_only():
    update = torch.randn(40, 50, generator=generator(5))
    first = random_keep(update, keep=0.5, generator=generator(1))
    torch.manual_seed(9)
    assert torch.equal(random_keep(update * 3, keep=0.5, generator=generator(1)), first * 3)
    assert not torch.equal(random_keep(update, keep=0.5, generator=generator(2)), first)
    one = generator(1)
    random_keep(update, keep=0.5, generator=one)
    assert not torch.equal(random_keep(update, keep=0.5, generator=one), first)
    other = random_keep(torch.ones(40, 50), keep=0.5, generator=generator(1))
    assert torch.equal(other != 0, first != 0)


def test_random_is_not_stratified_by_size():
    update = torch.arange(1.0, 20001.0).view(100, 200)
    kept = random_keep(update, keep=0.5, generator=generator()) != 0
    assert abs(float(kept[:50].float().mean()) - float(kept[50:].float().mean())) < 0.03


# -- by name ------------------------------------------------------------------------------------------


def test_names_give_their_functions():
    update = torch.randn(20, 30, generator=generator(0))
    weight = torch.randn(20, 30, generator=generator(1))

    def run(name, **settings):
        return trimming(name, generator(4), **settings)(update, weight, weight)

    assert run("none") is update
    assert torch.equal(run("rect", keep=0.4), rect(update, weight, keep=0.4))
    alphaedit = run("rect", keep=0.4, rect_convention="alphaedit")
    assert torch.equal(alphaedit, rect_alphaedit(update, weight, keep=0.4))
    assert torch.equal(run("random", keep=0.4), random_keep(update, keep=0.4, generator=generator(4)))


# -- the threshold of large weights --------------------------------------------------------------------


def changes(values: torch.Tensor) -> _Changes:
    return _Changes(values, torch.ones_like(values), relative_change)


@pytest.mark.parametrize("count", [1, 2, 400, 200_000, 399_999, 499_999, 500_000])
@pytest.mark.parametrize("kind", ["spread", "ties", "equal", "sorted", "wave", "infinite"])
def test_the_threshold_is_the_sorted_one_whatever_the_values_look_like(kind, count):
    n = 500_000
    values = torch.rand(n, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        values = (values * 7).floor()
    elif kind == "equal":
        values = torch.ones(n)
    elif kind == "sorted":
        values = values.sort().values
    elif kind == "wave":  # what a stride sees is not what is there
        values = (torch.arange(n) % 4 == 0).float() + values * 1e-3
    elif kind == "infinite":
        values[::3] = torch.inf
    wanted = values.sort(descending=True).values[count - 1]
    cut = count_th_largest(changes(values), count)
    assert cut.threshold == wanted
    assert (cut.above, cut.equal) == (int((values > wanted).sum()), int((values == wanted).sum()))


def test_the_sample_spares_the_search_through_everything(monkeypatch):
    values = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    searched: list[int] = []
    partition = np.partition
    monkeypatch.setattr(np, "partition", lambda v, k: searched.append(v.size) or partition(v, k))
    count_th_largest(changes(values), 400_000)
    assert len(searched) == 1 and searched[0] < 50_000


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768), (400, 1600)])
def test_the_sample_sees_all_columns_of_a_low_rank_update(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 1, generator=generator) for size in shape)
    weight = torch.randn(shape, generator=generator)
    searched: list[int] = []
    partition = np.partition
    monkeypatch.setattr(np, "partition", lambda v, k: searched.append(v.size) or partition(v, k))
    rect(left @ right.T, weight, keep=0.4)
    assert len(searched) == 1 and searched[0] < weight.numel() / 20


@pytest.mark.parametrize("keep", [0.4, 0.95])
def test_zeros_over_zeros_in_a_large_weight_count_as_no_change(keep):
    """The threshold lies above 0 for the first share, and is 0 for the second."""
    generator = torch.Generator().manual_seed(0)
    update, weight = (torch.randn(700, 1000, generator=generator) for _ in range(2))
    nothing = torch.rand(700, 1000, generator=generator) < 0.3
    update[nothing], weight[nothing] = 0, 0
    delta = torch.where(nothing, torch.zeros(()), (update / weight).abs()).flatten()
    best = delta.argsort(descending=True, stable=True)[: kept_count(delta.numel(), keep)]
    wanted = torch.zeros_like(delta)
    wanted[best] = update.flatten()[best]
    assert torch.equal(rect(update, weight, keep=keep), wanted.view_as(update))


def test_ties_are_kept_in_order_over_all_chunks(monkeypatch):
    monkeypatch.setattr(sys.modules[_Changes.__module__], "_CHUNK", 8)
    update = torch.ones(5, 10)
    kept = rect(update, torch.ones(5, 10), keep=0.5)
    assert kept.flatten().tolist() == [1.0] * 25 + [0.0] * 25
