"""The committed results are what the committed configuration makes, and say what the README says of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from harness_rect import cli, embedded
from harness_rect.config import EditConfig
from harness_rect.edits import load_edits
from harness_rect.experiments import analysis
from harness_rect.session import EditSession

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "rect-tiny" / "rect-tiny"
CONFIG = ROOT / "results" / "rect-tiny.yaml"
#: What is made again.
SLICE = "rome+rect0.4/order0/edits_002"
#: Where another machine rounds otherwise a few answers may differ, more of them after more edits.
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def rerun(tmp_path_factory) -> Path:
    """Two edits with RECT, all rows of all tasks."""
    place = tmp_path_factory.mktemp("rerun")
    config = yaml.safe_load(CONFIG.read_text()) | {
        "output": str(place / "out"),
        "regularizers": [{"rect": 0.4}],
        "checkpoints": [2],
    }
    (place / "slice.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["sweep", str(place / "slice.yaml")]) == 0
    return place / "out" / "rect-tiny"


def test_a_slice_of_the_sweep_made_again_gives_the_committed_scores(rerun):
    committed, again = (
        {(r["task"], r["metric"]): r["score"] for r in analysis.scores(place / SLICE)}
        for place in (COMMITTED, rerun)
    )
    assert committed.keys() == again.keys() and len(committed) > 20
    for name, score in committed.items():
        assert math.isclose(again[name], score, abs_tol=TOLERANCE), name


def test_compare_finds_nothing_lost(rerun, capsys):
    command = ["compare", str(COMMITTED / SLICE), str(rerun / SLICE), "--tasks", "rect_general"]
    assert cli.main([*command, "--min-retention", "0.97"]) == 0
    assert "rect_general" in capsys.readouterr().out


def test_compare_finds_the_loss_of_plain_rome():
    command = ["compare", str(COMMITTED / "unedited"), str(COMMITTED / "rome" / "order0" / "edits_020")]
    assert cli.main([*command, "--tasks", "rect_general", "--min-retention", "0.75"]) == 1


def mean_of_eight(folder: str) -> float:
    (row,) = (r for r in analysis.scores(COMMITTED / folder) if r["task"] == "rect_general")
    return row["score"]


def test_the_abilities_fall_by_a_quarter_within_the_stream():
    unedited = mean_of_eight("unedited")
    assert mean_of_eight("rome/order0/edits_001") > 0.95 * unedited
    assert mean_of_eight("rome/order0/edits_020") < 0.75 * unedited


def test_every_result_says_how_it_was_made():
    index = json.loads((COMMITTED.parent / "sweep.json").read_text())
    assert len(index["evaluations"]) == 16 and all(e["done"] for e in index["evaluations"])
    for run in analysis.runs(COMMITTED):
        assert run["lm_eval_version"] and (run["n_edits"] == 0) == (run["method"] in {None, "none"})


@pytest.fixture(scope="module")
def mean_of_single_edits():
    """``measure(edits, **arguments)``: means of the metrics, each edit alone on the unedited model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(embedded.resolve_model("rect-tiny")).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded.resolve_model("rect-tiny"))

    def measure(spec: str, **arguments) -> dict[str, float]:
        found = []
        for edit in load_edits(spec):
            session = EditSession(model, tokenizer, EditConfig(edits="tiny", **arguments), [edit])
            found.append(session.run(on_step=lambda done: None)["right_after_each_edit"])
            session.revert()
        metrics = ("reliability", "generalization", "locality")
        return {metric: sum(one[metric] for one in found) / len(found) for metric in metrics}

    return measure


def test_rect_keeps_single_edits_and_random_loses_most_of_them(mean_of_single_edits):
    settings = (
        {"regularizer": "none"},
        {"regularizer": "rect", "keep": 0.4},
        {"regularizer": "random", "keep": 0.4},
    )
    plain, rect, random = (mean_of_single_edits("tiny[1060:1066]", method="rome", **s) for s in settings)
    for metric, least in (("reliability", 0.9), ("generalization", 0.7)):
        assert plain[metric] >= least
        assert rect[metric] >= 0.8 * plain[metric]
        assert random[metric] <= 0.4 * plain[metric]


def test_mends_shipped_networks_make_single_edits(mean_of_single_edits):
    found = mean_of_single_edits("tiny[1060:1070]", method="mend")
    assert found["reliability"] >= 0.8 and found["locality"] >= 0.8
