"""What is left of single updates, against numpy and against the session that applies them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import TWO_FACTS, make_edit

from harness_rect.config import EditConfig, make_regularizer
from harness_rect.experiments import masks
from harness_rect.experiments.masks import what_is_left
from harness_rect.regularizers import magnitude, rect
from harness_rect.session import EditSession

shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), keep=st.sampled_from([0.2, 0.5, 0.8]))
def test_a_mask_is_described_as_numpy_would(shape, seed, keep):
    update, weight = matrix(shape, seed), matrix(shape, seed + 1)
    trimmed = magnitude(update, keep=keep)
    dw, left, w = update.numpy(), trimmed.numpy(), np.abs(weight.numpy())
    u, _, vt = np.linalg.svd(dw)
    s = np.linalg.svd(left, compute_uv=False)
    norm = np.linalg.norm(left)
    lower_median = np.sort(w.ravel())[(w.size - 1) // 2]
    assert what_is_left(update, trimmed, weight) == pytest.approx(
        {
            "norm_kept": norm / np.linalg.norm(dw),
            "kept": np.count_nonzero(left) / left.size,
            "kept_small_weight": np.mean((w < lower_median)[left != 0]),
            "overlap": abs(u[:, 0] @ left @ vt[0]) / norm,
            "rank_one_residual": np.sqrt((s[1:] ** 2).sum()) / norm,
        },
        abs=1e-9,
    )


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), factor=st.floats(0.05, 1))
def test_a_scale_changes_the_norm_alone(shape, seed, factor):
    update, weight = matrix(shape, seed), matrix(shape, seed + 1)
    whole, scaled = (what_is_left(update, each, weight) for each in (update, factor * update))
    assert scaled.pop("norm_kept") == pytest.approx(factor)
    assert whole.pop("norm_kept") == 1
    assert scaled == pytest.approx(whole)


def test_of_a_rank_one_update_a_scale_keeps_the_rank_and_a_mask_does_not():
    update = torch.outer(matrix((30, 1), 0)[:, 0], matrix((40, 1), 1)[:, 0])
    weight = matrix((30, 40), 2)
    scaled, masked = (
        what_is_left(update, each, weight) for each in (0.4 * update, rect(update, weight, keep=0.4))
    )
    assert scaled["overlap"] == pytest.approx(1)
    assert scaled["rank_one_residual"] == pytest.approx(0, abs=1e-9)
    assert masked["overlap"] == pytest.approx(masked["norm_kept"]) and masked["rank_one_residual"] > 0.2
    assert masked["kept_small_weight"] > 0.7  # relative changes are large where weights are small


def test_what_is_not_defined_is_none():
    update, nothing = matrix((3, 4), 0), torch.zeros(3, 4)
    undefined = dict.fromkeys(("kept_small_weight", "overlap", "rank_one_residual"))
    assert what_is_left(update, nothing, update) == {"norm_kept": 0, "kept": 0} | undefined
    assert what_is_left(nothing, nothing, update) == {"norm_kept": None, "kept": 0} | undefined


EDITS = [*TWO_FACTS, make_edit("{} is a", "Giulia Rossi", "speaker", id="c")]


@pytest.mark.parametrize(("method", "batch"), [("rome", 1), ("ft", 2)])
def test_the_rows_are_what_a_session_applies_to_the_unedited_model(method, batch, make_model, tokenizer):
    def session(**more) -> EditSession:
        config = EditConfig(method=method, edits="given", edit_batch_size=batch, **more)
        return EditSession(make_model("gpt2", n_layer=3), tokenizer, config, EDITS)

    tried = session()
    before = {name: value.clone() for name, value in tried.lm.model.state_dict().items()}
    names: list[tuple[str, dict]] = [("none", {}), ("rect", {"keep": 0.3}), ("random", {"keep": 0.3})]
    regularizers = [make_regularizer(*named) for named in names]
    rows = masks.rows(tried, regularizers)
    assert all(torch.equal(value, before[name]) for name, value in tried.lm.model.state_dict().items())
    batches = [("a",), ("b",), ("c",)] if batch == 1 else [("a", "b"), ("c",)]
    assert [row["edits"] for row in rows] == [",".join(ids) for ids in batches for _ in regularizers]
    assert [row["regularizer"] for row in rows[:2]] == ["none", "rect"] and rows[1]["keep"] == 0.3
    assert all(row["norm_kept"] == row["kept"] == 1 for row in rows[::3])
    [of_random] = session(regularizer="random", keep=0.3).run()["steps"][0]["weights"].values()
    assert rows[2]["kept"] == of_random["kept"]
    assert rows[2]["norm_kept"] == pytest.approx(of_random["applied_norm"] / of_random["update_norm"])
    assert len({row["kept"] for row in rows[2::3]}) == len(batches)  # another mask for each batch
    report = session(regularizer="rect", keep=0.3).run()
    [(weight, applied)] = report["steps"][0]["weights"].items()
    after = [edit["after"] for edit in report["edits"][:batch]]
    for metric in ("reliability", "target_probability"):
        assert rows[1][metric] == pytest.approx(sum(each[metric] for each in after) / batch)
    assert rows[0]["target_probability"] != rows[1]["target_probability"]
    assert rows[1]["weight"] == weight
    assert rows[1]["update_norm"] == pytest.approx(applied["update_norm"])
    assert rows[1]["norm_kept"] == pytest.approx(applied["applied_norm"] / applied["update_norm"])
    assert rows[1]["kept"] == applied["kept"]
