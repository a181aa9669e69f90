"""A model on devices of all kinds, its blocks on one or several, is run and edited as on the CPU."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from support.every_method import EDITS as FACTS
from support.every_method import HPARAMS, config_of, write_moments
from support.mend_training import trainer
from support.several_devices import SeveralDevices, over_devices
from support.tiny_models import FAMILIES, depth, make_edit

from harness_rect.config import EditConfig
from harness_rect.models import EditableLM
from harness_rect.models.architecture import locate
from harness_rect.moments.accumulate import accumulate
from harness_rect.regularizers import REGULARIZERS
from harness_rect.session import EditSession


@pytest.fixture(scope="module")
def moments(tmp_path_factory) -> Path:
    return write_moments(tmp_path_factory.mktemp("moments"))


#: More than one step even in batches of two.
EDITS = [*FACTS, make_edit("{} is in", "The Space Needle", "Paris", id="c", target_old="Rome")]


@pytest.fixture
def check(make_model, tokenizer, bos_tokenizer, moments, tmp_path, caplog):
    """``check(family, method, regularizer, count, kind)``: edits on such devices are those on the CPU."""

    def run(family, method, regularizer, count, kind, **more):
        config = config_of(method, tmp_path, moments, regularizer, **more)
        words = bos_tokenizer if FAMILIES[family].bos else tokenizer
        alone, elsewhere = (make_model(family, **depth(family, 3)) for _ in range(2))
        EditSession(alone, words, config, EDITS).run()
        over_devices(elsewhere, count, kind)
        with SeveralDevices():
            EditSession(elsewhere, words, config, EDITS).run()
        assert "value searches use full passes" not in caplog.text
        torch.testing.assert_close(elsewhere.state_dict(), alone.state_dict())

    return run


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(("rome", family) for family in FAMILIES),
        *((method, "llama") for method in HPARAMS if method != "rome"),
    ],
)
def test_three_devices_edit_as_one(method, family, check):
    check(family, method, "rect", 3, "xpu")


@pytest.mark.parametrize("more", [{"v_loss_layer": 1}, {"mpes": True, "v_num_grad_steps": 20}])
@pytest.mark.parametrize(("kind", "count"), [("xpu", 3), ("mps", 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_searches_of_all_kinds_may_be_spread(family, kind, count, more, check):
    check(family, "memit", "none", count, kind, layers=[0], **more)


@pytest.mark.parametrize(
    ("method", "regularizer", "kind"),
    [
        *(("rome", name, "xpu") for name in REGULARIZERS),  # with float64
        *((method, "rect", "mps") for method in HPARAMS),  # without
    ],
)
def test_one_device_edits_as_a_cpu(method, regularizer, kind, check):
    check("gpt2", method, regularizer, 1, kind)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["rome", "memit"])
def test_blocks_on_a_disk_need_not_be_in_memory(method, family, make_model, moments, tmp_path, request):
    config = config_of(method, tmp_path, moments, "none")
    words = request.getfixturevalue("bos_tokenizer" if FAMILIES[family].bos else "tokenizer")
    whole, partly = (make_model(family, **depth(family, 4)) for _ in range(2))
    blocks = locate(partly).blocks
    others = {name.rpartition(".")[0] for name in partly.state_dict() if not name.startswith(blocks)}
    places = dict.fromkeys([*others, *blocks], "cpu")
    accelerate.dispatch_model(
        partly, places | {blocks[3]: "disk"}, main_device="cpu", offload_dir=str(tmp_path / "disk")
    )
    for model in (whole, partly):
        EditSession(model, words, config, FACTS).run()
    assert any(parameter.device.type == "meta" for parameter in partly.parameters())
    found = {name: value for name, value in partly.state_dict().items() if value.device.type != "meta"}
    torch.testing.assert_close(
        found, {name: value for name, value in whole.state_dict().items() if name in found}
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_second_moments_are_those_of_one_device(family, make_lm, tmp_path):
    lm = make_lm(family, **depth(family, 3))
    sequences = [lm.encoder.ids(text) for text in ("The city is large.", "I went to Rome to see it, too.")]
    wanted, count = accumulate(lm, [0, 1, 2], sequences, tmp_path / "a", "x")
    over_devices(lm.model)
    with SeveralDevices():
        found, same = accumulate(lm, [0, 1, 2], sequences, tmp_path / "b", "x")
    assert count == same
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("kind", "count"), [("xpu", 3), ("mps", 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mend_trains_and_edits_as_on_a_cpu(family, kind, count, make_lm, tmp_path):
    weights = []
    for name in ("alone", "elsewhere"):
        lm = make_lm(family, **depth(family, 3))
        if name == "elsewhere":
            over_devices(lm.model, count, kind)
        with SeveralDevices():
            lm = EditableLM(lm.model, lm.encoder.tokenizer)
            trainer(lm, steps=4, layers=[0, 2]).run(tmp_path / name)
            config = EditConfig(method="mend", edits="two", hparams=str(tmp_path / name))
            EditSession(lm.model, lm.encoder.tokenizer, config, FACTS[:1]).run()
        weights.append(lm.model.state_dict())
    alone, elsewhere = weights
    torch.testing.assert_close(elsewhere, alone)
