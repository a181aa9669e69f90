"""The edit report's schema: what is written reads back, and so do older and partial reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness_rect.errors import UserError
from harness_rect.session.report import SCHEMA_VERSION, UNEDITED, EditReport

RESULTS = Path(__file__).resolve().parents[2] / "results"
NEW = {
    "schema_version": SCHEMA_VERSION,
    "method": "rome",
    "regularizer": "prune",
    "keep": None,
    "regularizer_settings": {"base": 1.5},
    "n_edits": 1,
    "at_the_end": {"reliability": 1.0},
    "edits": [{"id": "a", "before": {}, "after": {"reliability": 0.5}, "flags": ["no_gain"]}],
    "steps": [{"edits": ["a"], "applied": True, "weights": {"w": {"update_norm": 2.0, "finite": True}}}],
}


def committed() -> list[dict[str, Any]]:
    files = sorted(RESULTS.rglob("results.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["config"]["edit"] for path in files]


def test_reports_of_version_0_are_read_whole() -> None:
    reports = committed()
    assert {report["method"] for report in reports} == {"none", "rome"}
    for old in reports:
        report = EditReport.read(old)
        assert report.schema_version == 0
        assert report.to_dict() == old


def test_settings_of_version_0_are_those_it_named() -> None:
    found = {EditReport.read(old).regularizer: EditReport.read(old).settings for old in committed()}
    assert found == {
        "none": {},
        "rect": {"keep": 0.4, "rect_convention": "paper"},
        "random": {"keep": 0.4},
    }


def test_a_report_is_read_as_it_is_written() -> None:
    report = EditReport.read(NEW)
    assert report.to_dict() == json.loads(report.to_json()) == NEW
    assert report.settings == {"base": 1.5}
    assert report.averages("end") == {"reliability": 1.0}
    assert report.averages("before") == {}
    assert report.edits[0].metrics("after") == {"reliability": 0.5}


def test_an_unedited_model_has_a_report_of_one_field() -> None:
    assert UNEDITED.to_dict() == {"method": "none"}
    assert EditReport.read({"method": "none"}) == UNEDITED


def test_numbers_that_json_does_not_have_become_null() -> None:
    report = EditReport.read(
        NEW | {"at_the_end": {"x": float("nan")}, "edits": [{"id": "a", "search": {"loss": [float("inf")]}}]}
    )
    written = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert written["at_the_end"] == {"x": None}
    assert written["edits"][0]["search"] == {"loss": [None]}


def test_unknown_fields_are_ignored() -> None:
    assert EditReport.read(NEW | {"mood": "fine"}).to_dict() == NEW


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n_edits": "five"}, "n_edits"),
        ({"weights": ["w"]}, "weights"),
        ({"at_the_end": {"reliability": "high"}}, "at_the_end.reliability"),
        ({"edits": [{"subject": "x"}]}, "edits.0.id"),
        ({"steps": [{"edits": "a"}]}, "steps.0.edits"),
        ({"method": None}, "method"),
        ({"schema_version": SCHEMA_VERSION + 1}, "schema_version"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"f.json: config.edit: {field}") as error:
        EditReport.read(NEW | change, "f.json: config.edit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("partial", [{}, {"edit_seed": 0}, {"method": "rome"}])
def test_a_report_without_what_it_cannot_do_without_is_refused(partial: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"method|n_edits"):
        EditReport.read(partial)
