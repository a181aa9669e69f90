"""A kept run put onto its base model again gives the same bits, and says where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_method import EDITS, HPARAMS, config_of, write_moments
from support.tiny_models import make_edit
from torch import Tensor

from harness_rect.config import make_regularizer
from harness_rect.errors import UserError
from harness_rect.methods import METHODS
from harness_rect.models import EditableLM
from harness_rect.regularizers import REGULARIZERS
from harness_rect.session import EditSession
from harness_rect.session.replay import Differs, put, weights_of
from harness_rect.session.runs import EditCache, KeptRun

FACTS = [*EDITS, make_edit("{} was painted by", "the Night Watch", "Klee", id="c", target_old="Rembrandt")]


@pytest.fixture(scope="module")
def moments(tmp_path_factory) -> Path:
    return write_moments(tmp_path_factory.mktemp("moments"))


@pytest.fixture
def make(make_model, tokenizer, moments, tmp_path) -> Callable[..., tuple[KeptRun, Any]]:
    """``make(method, regularizer, edits, dtype=)``: the kept run, and its weights after so many edits."""

    def make(method: str, regularizer: str, edits: Any = FACTS, dtype: Any = torch.float32) -> Any:
        model = make_model("gpt2", n_layer=3).to(dtype)
        session = EditSession(model, tokenizer, config_of(method, tmp_path, moments, regularizer), edits)
        weights: dict[int, dict[str, Tensor]] = {}

        def reached(report: dict[str, Any]) -> None:
            names = report["weights"]
            weights[report["n_edits"]] = {n: session.lm.weight(n).detach().clone() for n in names}

        size = session.config.edit_batch_size
        cache = EditCache(tmp_path / "runs")
        session.run(cache, checkpoints=[size, len(edits)], on_checkpoint=reached)
        return KeptRun.read(cache.path(session.report.run or "")), weights

    return make


@pytest.fixture
def fresh(make_model, tokenizer) -> Callable[..., Any]:
    """The run's weights in its base model, unedited."""

    def fresh(run: KeptRun) -> Any:
        model = make_model("gpt2", n_layer=3).to(getattr(torch, run.base["dtype"]))
        return weights_of(run, EditableLM(model, tokenizer))

    return fresh


def same(weights: Any, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(weights.lm.weight(name), value) for name, value in expected.items())


#: Every method and every regularizer, those that leave low-rank updates with low-rank ones too.
PAIRS = [*zip(HPARAMS, cycle(REGULARIZERS), strict=False), ("memit", "sphere"), ("alphaedit", "revive")]


@pytest.mark.parametrize(("method", "regularizer"), PAIRS)
def test_any_number_of_steps_comes_back_bit_for_bit(method: str, regularizer: str, make, fresh) -> None:
    run, expected = make(method, regularizer, dtype=torch.bfloat16 if method == "rome" else torch.float32)
    assert set(expected) == ({2, 3} if METHODS[method].batches else {1, 3})
    for edits, weights in expected.items():
        put(run, replayed := fresh(run), edits)
        assert same(replayed, weights), edits
    report = put(run, fresh(run), min(expected))
    assert (report.n_edits, report.replay_of, report.at_the_end) == (min(expected), run.key, {})
    assert [len(report.edits), len(report.steps)] == [min(expected), 1]


@pytest.mark.parametrize(("method", "n"), [("rome", 1), ("rome", 3), ("memit", 2)])
def test_another_regularizer_gives_what_the_method_would_have_made_with_it(
    method: str, n: int, make, fresh
) -> None:
    run, _ = make(method, "none", FACTS[:n])
    other, expected = make(method, "rect", FACTS[:n])
    first = min(expected)
    report = put(run, weights := fresh(run), first, make_regularizer("rect", {"keep": 0.4}))
    assert same(weights, expected[first])
    assert (report.regularizer, report.keep, report.n_edits) == ("rect", 0.4, first)
    assert report.run not in (run.key, other.key)


def test_another_regularizer_is_refused_beyond_the_first_step(make, fresh) -> None:
    run, expected = make("rome", "rect")
    before = fresh(run)
    for upto in (None, 2):
        with pytest.raises(UserError, match=r"depends on what was added in earlier ones.*--upto 1"):
            put(run, before, upto, make_regularizer("none", {}))
    put(run, before, None, make_regularizer("rect", {"keep": 0.4}))
    assert same(before, expected[3]), "its own regularizer is no other one"


def test_an_end_within_a_step_and_other_weights_are_refused(make, fresh, make_model, tokenizer) -> None:
    run, _ = make("memit", "none")
    for upto in (0, 1, 4):
        with pytest.raises(UserError, match=rf"--upto {upto}: expected a number of edits from 1 to 3 that"):
            put(run, fresh(run), upto)
    other = make_model("gpt2", n_layer=3, seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(Differs, match=r"2 of 2 edited weights.*cpu, 1 threads"):
        put(run, weights_of(run, EditableLM(other, tokenizer)))
    wider = make_model("gpt2", n_layer=3, n_inner=5)
    with pytest.raises(UserError, match=r"has the shape \(5, \d+\) in the model and \("):
        weights_of(run, EditableLM(wider, tokenizer))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_of_a_run_with_too_large_updates_the_end_is_kept(
    make, fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness_rect.session.history.LIMIT", 10_000)
    run, expected = make("ft", "rect")
    assert run.history.steps is None
    put(run, weights := fresh(run))
    assert same(weights, expected[3])
    for upto, regularizer in ((2, None), (None, make_regularizer("none", {}))):
        with pytest.raises(UserError, match=r"only its end is there|keeps no updates"):
            put(run, fresh(run), upto, regularizer)
