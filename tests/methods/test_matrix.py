"""Every method on every model family: finite updates of the right weights, and a revert to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_method import EDITS, HPARAMS, config_of, write_moments
from support.tiny_models import FAMILIES, VOCABULARY, depth, make_edit

from harness_rect.errors import UserError
from harness_rect.methods import METHODS, Proposal
from harness_rect.session import EditSession


def test_every_method_is_here():
    assert set(HPARAMS) | {"mend"} >= set(METHODS)


@pytest.fixture(scope="module")
def moments(tmp_path_factory) -> Path:
    return write_moments(tmp_path_factory.mktemp("moments"))


#: Methods that differ in how they meet a model; the others share their code, and are tried on two families.
ALL_FAMILIES = ("rome", "memit", "kn", "ft", "ultraedit")


@pytest.mark.parametrize(
    ("method", "family"),
    [(m, f) for m in HPARAMS for f in FAMILIES if m in ALL_FAMILIES or f in ("gpt2", "llama")],
)
def test_a_batch_or_a_sequence_is_edited_and_reverted(
    method, family, make_model, tokenizer, bos_tokenizer, moments, tmp_path
):
    # A third block: what is written at the subject in the last one reaches no target.
    model = make_model(family, **depth(family, 3))
    assert model.config.vocab_size == VOCABULARY
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = config_of(method, tmp_path, moments)
    session = EditSession(model, bos_tokenizer if FAMILIES[family].bos else tokenizer, config, EDITS)
    report = session.run()
    assert all(step["applied"] for step in report["steps"])
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    tied = {n for n in changed if n not in session.weight_names}
    assert changed and not tied
    for step in report["steps"]:
        for weight in step["weights"].values():
            assert 0 < weight["kept"] <= 0.4 + 1e-3
    session.revert()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", HPARAMS)
def test_a_subject_that_is_not_in_the_prompt_is_for_methods_that_need_none(
    method, make_model, tokenizer, moments, tmp_path
):
    edit = make_edit("Who plays it?", "LeBron James", target_old="a", source="facts.json, row 3")
    config = config_of(method, tmp_path, moments)
    model = make_model("gpt2", n_layer=3)
    if not METHODS[method].at_subject:
        report = EditSession(model, tokenizer, config, [edit]).run()
        assert report["flagged"] == {} and report["edits"][0]["subject"] == "LeBron James"
        return
    with pytest.raises(UserError) as caught:
        EditSession(model, tokenizer, config, [edit])
    for part in ("facts.json, row 3: ", "'LeBron James'", "'Who plays it?'", method, "kn, mend, "):
        assert part in str(caught.value)


def test_the_methods_that_edit_at_the_subject():
    named = {name for name in METHODS if METHODS[name].at_subject}
    assert {"rome", "r_rome", "memit", "emmet", "alphaedit"} <= named
    assert not {"kn", "mend", "ft", "ft_l", "locft_bf", "ultraedit"} & named


@pytest.mark.parametrize("method", HPARAMS)
def test_proposing_changes_nothing(method, make_model, tokenizer, moments, tmp_path, monkeypatch):
    model, tried = make_model("gpt2", n_layer=3), METHODS[method]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def propose(lm, edits, hparams, context) -> Proposal:
        proposal = tried.propose(lm, edits, hparams, context)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return proposal

    monkeypatch.setitem(METHODS, method, replace(tried, propose=propose))
    layers: dict[str, Any] = {"layers": [0, 1]} if "layers" in HPARAMS[method] else {}
    config = config_of(method, tmp_path, moments, **layers)
    EditSession(model, tokenizer, config, EDITS[: config.edit_batch_size]).run()
