"""What an evaluation checks of itself, and that each check fails where it should."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from harness_rect import cli
from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.results import load
from harness_rect.model_wrappers import edited_hf
from harness_rect.session import self_checks
from harness_rect.session.report import EditReport

CHECKS = ["weights", "revert", "rect_counts", "reliability"]


@pytest.fixture(scope="module")
def edited() -> edited_hf.EditedHF:
    return edited_hf.EditedHF(edits="tiny[0:2]", rect=0.4, edit_cache="off", device="cpu")


def scored(reliability: float, documents: int = 2, **metadata: Any) -> dict[str, Any]:
    """Results of lm-eval with rect_zsre in them."""
    return {
        "results": {"rect_suite::rect_zsre": {"reliability,none": reliability}},
        "n-samples": {"rect_suite::rect_zsre": {"original": 2, "effective": documents}},
        "configs": {"rect_suite::rect_zsre": {"metadata": metadata}},
    }


def made(model: Any, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any] | None = None) -> list[Any]:
    found = results or scored(model.edit_report.at_the_end["reliability"])
    monkeypatch.setattr(edited_hf, "results_of_evaluation", lambda: found)
    checks = model.get_model_info()["self_checks"]
    assert list(checks) == CHECKS
    return [check["passed"] for check in checks.values()]


def test_checks_pass_where_nothing_is_wrong(edited, monkeypatch, caplog) -> None:
    assert made(edited, monkeypatch) == [True, True, True, True]
    assert "SELF-CHECK" not in caplog.text


def test_weights_that_changed_after_editing_are_said_aloud(edited, monkeypatch, caplog) -> None:
    weight = edited.model.get_parameter(next(iter(edited.edit_report.weights))).data
    before = weight[3, 5].clone()
    weight[3, 5] = torch.nextafter(before, torch.tensor(9.0))
    try:
        assert made(edited, monkeypatch) == [False, True, True, True]
    finally:
        weight[3, 5] = before
    assert "SELF-CHECK FAILED, do not trust these results: weights: 1 of 1 weights" in caplog.text


def test_anything_else_of_the_model_that_changed_is_said_too(edited, monkeypatch) -> None:
    norm = edited.model.transformer.ln_f
    norm.weight.data[0] *= 2
    assert made(edited, monkeypatch) == [False, True, True, True]
    norm.weight.data[0] /= 2
    monkeypatch.setattr(norm, "eps", 1.0)
    assert made(edited, monkeypatch) == [False, True, True, True]
    monkeypatch.undo()
    handle = edited.model.transformer.h[0].register_forward_hook(lambda module, given, output: output)
    try:
        assert made(edited, monkeypatch) == [False, True, True, True]
    finally:
        handle.remove()
    assert made(edited, monkeypatch) == [True, True, True, True]


def test_originals_that_changed_are_no_revert(edited, monkeypatch) -> None:
    (name,) = edited.edit_report.weights
    changed = edited.originals[name].clone()
    changed[0, 0] += 1
    monkeypatch.setattr(edited, "_originals", {name: changed})
    assert made(edited, monkeypatch) == [True, False, True, True]


def test_an_element_too_many_is_a_wrong_count(edited, monkeypatch) -> None:
    report = edited.edit_report.model_copy(deep=True)
    (update,) = report.steps[1].weights.values()
    assert update.kept_elements == update.expected_elements
    update.kept_elements += 1
    monkeypatch.setattr(edited, "_edit_report", report)
    assert made(edited, monkeypatch) == [True, True, False, True]


@pytest.mark.parametrize(
    ("results", "passed"),
    [
        (scored(0.6), False),
        (scored(0.5 + 1e-9, edits="tiny[0:2]"), True),
        (scored(0.6, documents=1), None),  # --limit
        (scored(0.6, edits="other.json"), None),
        ({}, None),
    ],
)
def test_reliability_is_compared_where_it_is_of_the_same_edits(results, passed) -> None:
    report = EditReport(method="rome", n_edits=2, edits_spec="tiny[0:2]", at_the_end={"reliability": 0.5})
    assert self_checks.of_reliability(report, results, same_arithmetic=True).passed is passed


def test_a_failed_check_of_a_file_is_read(tmp_path) -> None:
    text = '{"results": {"t": {"acc,none": 1.0}}, "config": {"self_checks": %s}}'
    for checks, lines in (
        ('{"revert": {"passed": false, "about": "w"}, "x": {"passed": true}, "y": 3}', ["revert failed: w"]),
        ("[1]", []),
        ('{"revert": {"passed": null, "about": "w"}}', []),
    ):
        (tmp_path / "results.json").write_text(text % checks)
        assert load(tmp_path / "results.json").failed_checks == [f"self-check {line}" for line in lines]


def test_compare_and_report_warn_of_a_failed_check(tmp_path, caplog, capsys) -> None:
    checks = {"revert": {"passed": False, "about": "w"}}
    for name, found in (("a", checks), ("b", {})):
        (tmp_path / name).mkdir()
        content = {
            "results": {"rect_nli": {"acc,none": 1.0}},
            "config": {"model": name, "self_checks": found},
        }
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    assert cli.main(["compare", *(str(tmp_path / name) for name in "ab")]) == 0
    assert caplog.text.count("results.json: self-check revert failed: w") == 1
    (note,) = [note for note in read_study(tmp_path).notes if "self-check" in note]
    assert note == "a/results.json: self-check revert failed: w: do not trust its scores."
