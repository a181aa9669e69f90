"""NAS: the norm measured on the unedited model, the values that get it, and the facts that are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import D_MLP, make_edit
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness_rect import embedded
from harness_rect.config import EditConfig
from harness_rect.errors import UserError
from harness_rect.io.cache import cache_folder
from harness_rect.methods import METHODS, Context
from harness_rect.moments import SecondMoment, write_moment
from harness_rect.session import EditSession

ROWS = [
    {"case_id": f"{i}", "prompt": prompt, "subject": subject, "target_new": target}
    for i, (prompt, subject, target) in enumerate(
        [
            ("{} was painted in", "The Lamp of Ilse", "Norway"),
            ("The captain of {} is", "the Ostrava ferry", "Mina Okafor"),
            ("{} grows best in", "Plum tree 9", "wet sand"),
            ("To visit the {} you must go to", "Vatican Library", "Seattle"),
            ("{} plays the sport of", "LeBron James", "football"),
        ]
    )
]
EDITS = [make_edit(row["prompt"], row["subject"], row["target_new"], id=row["case_id"]) for row in ROWS]
SEARCH = {"layers": [0], "v_num_grad_steps": 4, "v_lr": 0.5, "clamp_norm_factor": 4}
TEMPLATES: dict[str, list[Any]] = {
    "rome": ["{}", "The city is large. {}"],
    "memit": [["{}"], ["The city is large. {}"]],
    "alphaedit": [["{}"], ["The city is large. {}"]],
}
MORE = {
    "rome": {},
    "memit": {"mom2_update_weight": 0.1},
    "alphaedit": {"nullspace_threshold": 2.0, "L2": 0.1},
}
LIMIT = {"rome": 5, "memit": 2, "alphaedit": 2}
WEIGHT = "transformer.h.0.mlp.c_proj.weight"


def hparams(method: str, **changes):
    templates = {"context_templates": TEMPLATES[method]}
    return METHODS[method].hparams(**SEARCH | MORE[method] | templates | {"nas": True} | changes)


def a_moment() -> SecondMoment:
    return SecondMoment(torch.eye(D_MLP, dtype=torch.float64), 1, "test")


def propose(lm, method: str, edits, h):
    with lm.frozen():
        return METHODS[method].propose(lm, edits, h, Context(TEMPLATES[method], lambda layer: a_moment()))


def value_norms(lm, method: str, edits) -> list[float]:
    """|v*| of each fact, from a search of its own without NAS, as an edit's record gives it."""
    norms = []
    for edit in edits:
        (detail,) = propose(lm, method, [edit], hparams(method, nas_norm=1e6)).details
        norms.append((detail["layers"]["0"] if method == "rome" else detail)["value_norm"])
    return norms


@pytest.fixture
def session(tmp_path: Path, make_model, tokenizer, monkeypatch):
    """``session(method, rows, batch, **hparams)``: on a small GPT-2, with NAS and ROWS as reference facts."""
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path / "cache"))
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps(ROWS))
    total = a_moment().total.float()
    write_moment(tmp_path / f"{WEIGHT[:-7]}_float32_mom2_100000.npz", total, 1, 1, "test")

    def start(method: str = "rome", rows=ROWS[:1], batch: int = 1, **changes) -> EditSession:
        settings = SEARCH | MORE[method] | {"context_templates": TEMPLATES[method], "nas": True}
        settings |= {"nas_facts": str(reference)}
        (tmp_path / "hparams.json").write_text(json.dumps(settings | changes))
        (tmp_path / "edits.json").write_text(json.dumps(rows))
        config = EditConfig(
            method=method,
            edits=str(tmp_path / "edits.json"),
            edit_batch_size=batch,
            hparams=str(tmp_path / "hparams.json"),
            stats=None if method == "rome" else str(tmp_path),
        )
        return EditSession(make_model("gpt2"), tokenizer, config)

    return start


@pytest.mark.parametrize("method", LIMIT)
def test_mu_is_the_mean_norm_of_values_on_the_unedited_model(method, session, make_lm):
    norms = np.array(value_norms(make_lm("gpt2"), method, EDITS))
    wanted = norms[norms <= np.percentile(norms, 95)].mean()
    report = session(method, ROWS[2:]).run()  # three edits: only the first searches in the unedited model
    mu = report["hparams"]["nas_norm"]
    assert mu == pytest.approx([wanted], rel=1e-4)


def test_a_value_gets_the_norm_mu_and_keeps_its_direction(make_lm):
    lm = make_lm("gpt2")
    edit, mu = EDITS[0], 7.0
    free = propose(lm, "rome", [edit], hparams("rome", nas=False))
    scaled = propose(lm, "rome", [edit], hparams("rome", nas_norm=mu))
    batch = lm.batch(
        [lm.encoder.ids(edit.text)[: lm.encoder.token_at(edit.text, edit.subject_span[1] - 1) + 1]]
    )
    with torch.no_grad():
        key, output = lm.down_projection_io([0], batch, batch.last)[0]

    def value(proposal) -> torch.Tensor:
        update = proposal.updates[WEIGHT].dense().double()  # (inputs, outputs) in GPT-2
        return (output.double() + key.double() @ update)[0]

    assert float(value(scaled).norm()) == pytest.approx(mu, rel=1e-5)
    assert float(value(free).norm()) != pytest.approx(mu, rel=1e-2)
    assert torch.cosine_similarity(value(free), value(scaled), dim=0) == pytest.approx(1.0, abs=1e-6)


def test_memits_residual_leads_to_an_mlp_output_of_the_norm_mu(make_lm):
    lm = make_lm("gpt2")
    h = {"mom2_update_weight": 1e-9, "context_templates": [["{}"]]}
    proposal = METHODS["memit"].propose(
        lm, EDITS[:2], hparams("memit", nas_norm=9.0, **h), Context([["{}"]], lambda layer: a_moment())
    )
    with torch.no_grad():
        lm.weight(WEIGHT).add_(proposal.updates[WEIGHT].dense().float())
        for edit in EDITS[:2]:
            last = lm.encoder.token_at(edit.text, edit.subject_span[1] - 1)
            batch = lm.batch([lm.encoder.ids(edit.text)[: last + 1]])
            _, output = lm.down_projection_io([0], batch, batch.last)[0]
            assert float(output.norm()) == pytest.approx(9.0, rel=1e-3)


@pytest.mark.parametrize("method", LIMIT)
@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_a_fact_is_skipped_from_the_limit_on(method, factor, session, make_lm):
    (norm,) = value_norms(make_lm("gpt2"), method, EDITS[:1])
    run = session(method, nas_norm=norm / LIMIT[method] * factor)
    before = run.lm.weight(WEIGHT).detach().clone()
    report = run.run()
    skipped = factor < 1
    assert report["flagged"] == ({"skipped": ["0"]} if skipped else report["flagged"])
    assert torch.equal(run.lm.weight(WEIGHT), before) == skipped
    assert [step["applied"] for step in report["steps"]] == [not skipped]
    assert report["edits"][0]["search"], "what the search did is there in either case"


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_a_batch_goes_on_without_the_facts_that_are_skipped(method, session, make_lm):
    norms = value_norms(make_lm("gpt2"), method, EDITS)
    low, middle, *_, high = (ROWS[i] for i in np.argsort(norms))
    mu = 0.999 * max(norms) / LIMIT[method]
    batched = session(method, [high, middle, low], batch=2, nas_norm=mu)
    assert batched.run()["flagged"]["skipped"] == [high["case_id"]]
    # A batch of one, and one fact left in a second batch, with the keys of the first remembered or not.
    alone = session(method, [middle, low], batch=1, nas_norm=mu)
    alone.run()
    assert torch.allclose(batched.lm.weight(WEIGHT), alone.lm.weight(WEIGHT), atol=2e-6)


def test_mu_is_measured_once_and_kept(session):
    first = session().run()
    (file,) = cache_folder("nas").glob("*.json")
    assert json.loads(file.read_text()) == first["hparams"]["nas_norm"]
    file.write_text("[3.25]")
    assert session().run()["hparams"]["nas_norm"] == [3.25]
    file.write_text("[3.2")  # damaged: measured again
    assert session().run()["hparams"]["nas_norm"] == first["hparams"]["nas_norm"]
    # Whatever decides mu is in its key.
    others = [
        session(v_lr=0.3).run()["hparams"]["nas_norm"],
        session(nas_samples=2).run()["hparams"]["nas_norm"],
        session(context_templates=["{}"]).run()["hparams"]["nas_norm"],
    ]
    assert len({tuple(norm) for norm in [first["hparams"]["nas_norm"], *others]}) == 4
    assert len(list(cache_folder("nas").glob("*.json"))) == 4


def test_what_decides_a_run_is_known_before_it(session):
    run = session()
    before = run.identity(1)
    run.run()
    assert run.identity(1) == before
    assert before["hparams"]["nas_norm"]


def test_every_layer_of_rome_has_its_own_norm(session):
    report = session(layers=[0, 1]).run()
    first, second = report["hparams"]["nas_norm"]
    assert first != second
    again = session(layers=[0, 1], nas_norm=[first, second]).run()
    assert again["edits"] == report["edits"]


def test_settings_that_do_not_fit_are_one_line(session):
    with pytest.raises(UserError, match="nas_norm: expected nas: true beside it"):
        session(nas=False, nas_norm=2.0)
    with pytest.raises(UserError, match=r"nas_norm: expected one number, or 1, one for each layer"):
        session(nas_norm=[2.0, 3.0]).run()
    with pytest.raises(UserError, match=r"missing\.json"):
        session(nas_facts="missing.json").run()


def test_embedded_models_have_reference_facts_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path))
    (tmp_path / "h.json").write_text(json.dumps(SEARCH | {"nas": True, "nas_samples": 3}))
    config = EditConfig(edits="tiny[0:1]", hparams=str(tmp_path / "h.json"))
    folder = embedded.resolve_model("rect-tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    session = EditSession(model, tokenizer, config, model_name="rect-tiny")
    assert session.run()["hparams"]["nas_norm"]
