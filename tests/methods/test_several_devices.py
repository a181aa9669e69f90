"""A model whose blocks lie on several devices is run and edited as the same model on one."""

from __future__ import annotations

import json

import pytest
import torch
from methods import test_matrix
from several_devices import SeveralDevices, spread
from tiny_models import FAMILIES, depth

from harness_rect.config import EditConfig
from harness_rect.methods import METHODS
from harness_rect.models import EditableLM
from harness_rect.models.architecture import locate
from harness_rect.models.suffix import suffix_run, to_compare
from harness_rect.session import EditSession
from harness_rect.statistics.collect import collect

moments = test_matrix.moments


def over_three_devices(model):
    """As device maps do: norm and head with the last block, a tied head with the embeddings."""
    parts = locate(model)
    last = [parts.norm] if model.config.tie_word_embeddings else [parts.norm, parts.head]
    spread(model, [model.get_submodule(b) for b in parts.blocks], [model.get_submodule(p) for p in last], 3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", test_matrix.HPARAMS)
def test_edits_are_those_of_one_device(
    method, family, make_model, tokenizer, bos_tokenizer, moments, tmp_path, caplog
):
    hparams = tmp_path / "hparams.json"
    hparams.write_text(json.dumps(test_matrix.HPARAMS[method]))
    config = EditConfig(
        method=method,
        edits="two",
        edit_batch_size=2 if METHODS[method].batches else 1,
        hparams=str(hparams),
        stats=str(moments),
        regularizer="rect",
        keep=0.4,
    )
    words = bos_tokenizer if FAMILIES[family].bos else tokenizer
    alone, spread_out = (make_model(family, **depth(family, 3)) for _ in range(2))
    EditSession(alone, words, config, test_matrix.EDITS).run()
    over_three_devices(spread_out)
    with SeveralDevices():
        EditSession(spread_out, words, config, test_matrix.EDITS).run()
    assert "searches run it in full" not in caplog.text
    found = spread_out.state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_some_of_a_batch_runs_from_the_middle(family, make_lm):
    lm = make_lm(family, **depth(family, 3))
    over_three_devices(lm.model)
    sequences, starts = [[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14]], [2, 0, 1]
    with SeveralDevices():
        lm = EditableLM(lm.model, lm.encoder.tokenizer)
        rows, offsets = torch.tensor([[0, 1, 2], [1, 0, 2]], device=lm.input_device)
        changed = torch.zeros(3, dtype=torch.long, device=lm.input_device)
        run, whole = suffix_run(lm, sequences, starts, 1, rows, offsets, changed)
        with torch.no_grad():
            run.checked_logits(rows, offsets, to_compare(whole))
            some = run.select(torch.tensor([2, 1], device=lm.input_device))
            found = some.logits(rows[:2], offsets[1:].flip(0))
    torch.testing.assert_close(found, whole[1:].flip(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_second_moments_are_those_of_one_device(family, make_lm, tmp_path):
    lm = make_lm(family, **depth(family, 3))
    sequences = [lm.encoder.ids(text) for text in ("The city is large.", "I went to Rome to see it, too.")]
    wanted, count = collect(lm, [0, 1, 2], sequences, tmp_path / "a", "x")
    over_three_devices(lm.model)
    with SeveralDevices():
        found, same = collect(lm, [0, 1, 2], sequences, tmp_path / "b", "x")
    assert count == same
    for layer, total in wanted.items():
        torch.testing.assert_close(found[layer], total)
