"""MEMIT: the published result, the solve against a direct one, every family, and MEMIT in a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import D_MLP, FAMILIES, TWO_FACTS, make_edit
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness_rect.config import EditConfig
from harness_rect.errors import UserError
from harness_rect.hparams import resolve_hparams
from harness_rect.methods import METHODS, Context, Dense
from harness_rect.methods.fact_reader import FactReader
from harness_rect.methods.memit import EmmetHyperParameters, MemitHyperParameters
from harness_rect.methods.value_search import Request, search_values
from harness_rect.models import EditableLM
from harness_rect.moments import MomentProvider, SecondMoment, write_moment
from harness_rect.regularizers import rect
from harness_rect.session import EditSession

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
GROUPS = [["{}"], ["The city is large. {}", "Therefore I. {}"]]


def block_outputs(lm, edits, layer):
    return FactReader(lm, edits, [["{}"]]).bare_outputs(layer)


def fact_keys(lm, edits, layer, groups):
    return FactReader(lm, edits, groups).keys([layer])[layer]


def a_moment(width: int = D_MLP, seed: int = 3, scale: float = 1.0) -> SecondMoment:
    factor = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = factor @ factor.T / width + 0.1 * torch.eye(width, dtype=torch.float64)
    return SecondMoment(total * scale, 1, "test")


def hparams(**changes: Any) -> MemitHyperParameters:
    usual: dict[str, Any] = {"layers": [0], "v_num_grad_steps": 10, "v_lr": 0.5, "v_weight_decay": 0.01}
    usual |= {"clamp_norm_factor": 4, "mom2_update_weight": 0.01, "context_templates": GROUPS}
    return MemitHyperParameters(**usual | changes)


def propose(lm: EditableLM, h: MemitHyperParameters, moment: SecondMoment | None = None):
    chosen = a_moment() if moment is None else moment
    with lm.frozen():
        return METHODS["memit"].propose(lm, TWO_FACTS, h, Context(GROUPS, lambda layer: chosen))


def test_a_batch_is_the_published_one():
    case = GOLDENS / "llama_memit"
    folder = GOLDENS / "tiny_llama"
    lm = EditableLM(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    h = resolve_hparams(METHODS["memit"], str(case / "hparams.json"), lm).values
    assert isinstance(h, MemitHyperParameters)
    moments = MomentProvider(lm, str(case), "", "", h.mom2_dataset, h.mom2_dtype, h.mom2_n_samples)
    moments.load(h.layers)
    rows = json.loads((case / "requests.json").read_text())
    edits = [make_edit(r["prompt"], r["subject"], r["target_new"], id=str(i)) for i, r in enumerate(rows)]
    groups = json.loads((case / "context_templates.json").read_text())
    with lm.frozen():
        updates = METHODS["memit"].propose(lm, edits, h, Context(groups, moments.get)).updates
    golden = load_file(case / "golden.safetensors")
    assert len(updates) == 2
    for name, update in updates.items():
        wanted = golden[f"{name}.delta"]
        assert (update.dense() - wanted).abs().max() / wanted.abs().max() < 1e-5


#: A norm behind the MLP makes a block's output non-linear in the edited matrix: there z is not reached.
NORM_AFTER_MLP = {"gemma2", "gemma3_text", "olmo2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_moves_every_subject_to_its_value_on_every_family(family, make_lm):
    lm = make_lm(family)
    h = hparams(mom2_update_weight=1e-6, v_lr=0.2, context_templates=[["{}"]])
    moment = a_moment()
    before = block_outputs(lm, TWO_FACTS, 0)
    with lm.frozen():
        proposal = METHODS["memit"].propose(lm, TWO_FACTS, h, Context([["{}"]], lambda layer: moment))
    ((name, update),) = proposal.updates.items()
    with torch.no_grad():
        lm.weight(name).add_(update.dense().float())
    moved = (block_outputs(lm, TWO_FACTS, 0) - before).norm(dim=1)
    for detail, distance in zip(proposal.details, moved.tolist(), strict=True):
        assert detail["nll"] < detail["first_nll"]
        if family in NORM_AFTER_MLP:
            assert 0 < distance < float("inf")
        else:
            assert distance == pytest.approx(detail["d_norm"], rel=0.02)


def test_a_batch_of_more_facts_than_dimensions_is_solved_and_kept_in_full(make_lm):
    lm = make_lm("llama")
    places = ["Rome", "Paris", "Seattle", "Vienna", "Austria", "France", "English", "French", "native"]
    edits = [
        make_edit(f"The {{}} of {place} is", f"{thing} {i}", "large", id=f"{place} {thing}")
        for i, place in enumerate(places)
        for thing in ("city", "list", "mother", "sport", "station", "marine")
    ]
    h = hparams(v_num_grad_steps=3, mom2_update_weight=0.1, context_templates=[["{}"]])
    moment = a_moment()
    with lm.frozen():
        context = Context([["{}"]], lambda layer: moment)
        (update,) = METHODS["memit"].propose(lm, edits, h, context).updates.values()
        bare = block_outputs(lm, edits, 0)
        requests = [Request(edit, v0) for edit, v0 in zip(edits, bare, strict=True)]
        found = search_values(lm, requests, ["{}"], 0, h, at_block=True)
    assert len(edits) > D_MLP and isinstance(update, Dense) and update.matrix.dtype == torch.float32
    keys = fact_keys(lm, edits, 0, [["{}"]]).T.double()
    residual = torch.stack([d for d, _ in found]).T.double()
    inverse = torch.linalg.inv(h.mom2_update_weight * moment.mean + keys @ keys.T)
    wanted = residual @ keys.T @ inverse
    assert (update.dense() - wanted).abs().max() / wanted.abs().max() < 1e-4


def test_the_bare_prompt_weighs_one_half_in_a_key(make_lm):
    lm = make_lm("gpt2")
    bare, first, second = (fact_keys(lm, TWO_FACTS, 0, [[t]]) for group in GROUPS for t in group)
    torch.testing.assert_close(fact_keys(lm, TWO_FACTS, 0, GROUPS), bare / 2 + (first + second) / 4)


def test_an_earlier_loss_layer_is_read_through_norm_and_head(make_lm):
    lm = make_lm("llama", num_hidden_layers=3)
    early, last, default = (propose(lm, hparams(v_loss_layer=layer)) for layer in (1, 2, None))
    assert early.details[0]["first_nll"] != pytest.approx(last.details[0]["first_nll"])
    assert last.details == default.details


def test_a_session_batches_facts_and_trims_every_layer(tmp_path, make_model, tokenizer):
    model = make_model("gpt2", n_layer=3)
    lm = EditableLM(model, tokenizer)
    for layer in (0, 1):
        path = tmp_path / "stats" / f"{lm.architecture.down_projections[layer]}_float32_mom2_100000.npz"
        write_moment(path, a_moment(seed=layer).total.float(), 1, 1, "{}")
    file = tmp_path / "h.json"
    file.write_text(json.dumps(hparams(layers=[0, 1]).model_dump()))
    config = EditConfig.from_args(
        method="memit",
        edits="given",
        edit_batch_size=2,
        rect=0.4,
        hparams=str(file),
        stats=str(tmp_path / "stats"),
    )
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = MomentProvider(lm, str(tmp_path / "stats"), "", "")
    moments.load([0, 1])
    with lm.frozen():
        updates = (
            METHODS["memit"]
            .propose(lm, TWO_FACTS, hparams(layers=[0, 1]), Context(GROUPS, moments.get))
            .updates
        )
    session = EditSession(model, tokenizer, config, TWO_FACTS)
    report = session.run()
    assert [step["edits"] for step in report["steps"]] == [["a", "b"]]
    assert report["hparams"]["context_templates"] == GROUPS
    for name, update in updates.items():
        wanted = originals[name] + rect(update.dense().float(), originals[name], keep=0.4)
        assert torch.equal(dict(model.named_parameters())[name], wanted)
    session.revert()
    assert all(torch.equal(p, originals[name]) for name, p in model.named_parameters())


def test_templates_are_given_by_type(tmp_path, make_lm):
    file = tmp_path / "h.json"
    file.write_text(json.dumps({"layers": [0], "context_templates": ["{}", "So. {}"]}))
    with pytest.raises(UserError, match="context_templates"):
        resolve_hparams(METHODS["memit"], str(file), make_lm("gpt2"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gpt2-xl", [[13, 14, 15, 16, 17], 20, 0.5, 0.5, 0.75, 20000]),
        ("llama-7b", [[4, 5, 6, 7, 8], 25, 0.5, 0.001, 4, 15000]),
        ("llama-2-7b", [[4, 5, 6, 7, 8], 25, 0.5, 0.001, 4, 15000]),
        ("llama-3-8b", [[4, 5, 6, 7, 8], 25, 0.1, 0.5, 0.75, 15000]),
    ],
)
def test_presets_have_the_published_values(name, values, make_lm):
    wide = make_lm("gpt2", n_layer=48) if name == "gpt2-xl" else make_lm("llama", num_hidden_layers=32)
    h = resolve_hparams(METHODS["memit"], name, wide).values
    assert isinstance(h, MemitHyperParameters)
    found = [
        h.layers,
        h.v_num_grad_steps,
        h.v_lr,
        h.v_weight_decay,
        h.clamp_norm_factor,
        h.mom2_update_weight,
    ]
    assert found == values and h.kl_factor == 0.0625


@pytest.mark.parametrize("ridge", [0.1, 0.0])
def test_emmet_with_two_facts_of_one_subject_stays_finite_or_says_why_not(ridge, make_lm):
    lm = make_lm("llama")
    edits = [
        make_edit("{} plays", "LeBron James", "football", id="a"),
        make_edit("{} speaks", "LeBron James", "French", id="b"),
    ]
    h = EmmetHyperParameters(layers=[0], v_num_grad_steps=2, context_templates=[["{}"]], emmet_lambda=ridge)
    context = Context([["{}"]], lambda layer: a_moment())
    with lm.frozen():
        if ridge:
            (update,) = METHODS["emmet"].propose(lm, edits, h, context).updates.values()
            assert update.dense().norm() < 100
            return
        try:
            METHODS["emmet"].propose(lm, edits, h, context)
        except UserError as error:
            assert "emmet_lambda" in str(error)
