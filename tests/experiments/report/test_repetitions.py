"""Which of several evaluations of one model is shown, and what an edited one is held against."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.report.study import Study
from harness_rect.experiments.report.writing import write_report

COMMITTED = Path(__file__).parents[3] / "results" / "rect-tiny" / "rect-tiny"
UNEDITED, ROME = (
    json.loads((COMMITTED / folder / "results.json").read_text("utf-8"))
    for folder in ("unedited", "rome/order0/edits_002")
)
GENERAL = [task for task in UNEDITED["configs"] if task not in ("rect_zsre", "rect_counterfact")]

Study_ = Callable[..., Study]


@pytest.fixture
def study(tmp_path: Path) -> Study_:
    """``study(name=results, ...)``: committed results, changed, read as a report reads them."""

    def read(**files: dict[str, Any]) -> Study:
        for name, content in files.items():
            (tmp_path / f"results_{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return read_study(tmp_path)

    return read


def changed(
    results: dict[str, Any],
    newer: int = 0,
    config: dict[str, Any] | None = None,
    args: dict[str, Any] | None = None,
    tasks: list[str] | None = None,
    shots: int | None = None,
    right: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """tasks: the only ones. shots: of all. right: the score of rect_nli."""
    found = copy.deepcopy(results) | more
    found["date"] += newer
    found["config"] |= config or {}
    found["config"]["model_args"] |= args or {}
    if tasks is not None:
        found |= {"results": {task: found["results"][task] for task in tasks}, "groups": {}}
        found["group_subtasks"] = {}
    if shots is not None:
        found["n-shot"] = dict.fromkeys(found["n-shot"], shots)
    if right is not None:
        found["results"]["rect_nli"]["acc,none"] = right
    return found


OTHER_WEIGHTS = {"config": {"provenance": {"model_fingerprint": "b" * 64}}, "sweep": {}}


@pytest.mark.parametrize(
    ("change", "label"),
    [
        *(
            ({"args": {name: value}}, f"rect-tiny ({name}={value})")
            for name, value in (
                *(("delta", "D"), ("load_in_8bit", True), ("load_in_4bit", "True"), ("add_bos_token", True)),
                *(("subfolder", "s"), ("tokenizer", "t"), ("gguf_file", "g"), ("revision", "r")),
            )
        ),
        (OTHER_WEIGHTS, "rect-tiny (weights bbbbbbbb)"),
    ],
)
def test_a_newer_unedited_run_of_another_model_is_no_base(study: Study_, change, label) -> None:
    found = study(a=UNEDITED, b=ROME, c=changed(UNEDITED, 9, right=0.1, **change))
    [setting] = found.settings
    assert found.base(setting.model).file == "results_a.json" and found.notes == []
    assert {run.model for run in found.runs} == {setting.model, label}


def test_a_model_that_was_edited_before_it_was_loaded_is_not_called_unedited(study: Study_, tmp_path) -> None:
    said = {"peft": {"method": "memit", "n_edits": 5}}
    found = study(a=UNEDITED, c=changed(UNEDITED, 9, args={"peft": "P"}, config={"provenance": said}))
    assert [run.loaded for run in found.runs] == [None, "loaded with 5 edits by memit"]
    write_report(tmp_path, tmp_path / "r.html")
    cells = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert cells.count("loaded with 5 edits by memit") >= 2


def test_what_is_given_as_it_is_by_default_is_the_same_model(study: Study_) -> None:
    args = {"load_in_8bit": False, "revision": "main", "subfolder": "", "peft": None}
    found = study(a=changed(UNEDITED, args=args), b=ROME)
    assert {run.model for run in found.runs} == {"rect-tiny"}


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"shots": 5}, "num_fewshot of"),
    ({"chat_template_sha": "abc"}, "chat template"),
    ({"system_instruction_sha": "abc"}, "system instruction"),
    ({"config": {"gen_kwargs": {"do_sample": True, "temperature": 3.0}}}, "gen_kwargs of"),
    ({"config": {"limit": 10.0}}, "limit"),
    ({"args": {"max_length": 9}}, "max_length"),
]


@pytest.mark.parametrize(("change", "what"), SETTINGS)
def test_the_base_is_an_unedited_run_that_does_not_differ(study: Study_, change, what) -> None:
    other = changed(UNEDITED, 9, **change)
    found = study(a=UNEDITED, b=ROME, c=other)
    assert found.base(found.settings[0].model).file == "results_a.json"
    [note] = found.notes
    assert note.startswith("results_c.json is left out: ") and "newer" not in note
    assert what in note or "more documents of the same" in note
    # The same settings again are a repetition.
    again = study(a=UNEDITED, b=ROME, c=other, d=changed(UNEDITED, 20)).notes
    assert "results_a.json is left out: results_d.json is newer and evaluates the same." in again


def test_another_run_of_the_same_edits_is_not_called_the_same(study: Study_) -> None:
    other = changed(ROME, 9, right=0.5)
    other["config"]["edit"]["run"] = "0" * 64
    [note] = study(a=UNEDITED, b=ROME, c=other).notes
    assert note == (
        "results_b.json is left out: results_c.json is a newer run of the same edits, with other versions,"
        " threads or processors."
    )


@pytest.mark.parametrize(("change", "what"), SETTINGS)
def test_edited_runs_of_different_settings_are_each_held_against_their_base(
    study: Study_, change, what
) -> None:
    edited = changed(ROME, **change)
    edited["config"]["edit"] |= {"edits_sha256": "other", "n_edits": 5}
    found = study(a=UNEDITED, b=ROME, c=changed(UNEDITED, **change), d=edited)
    assert len(found.settings) == 2
    for setting in found.settings:
        [series] = found.series(setting)
        pair = found.base(setting.model).file, found.at(series, *found.numbers(series))[0].file
        assert pair in (("results_a.json", "results_b.json"), ("results_c.json", "results_d.json"))
    [note] = found.notes
    assert "both unedited, differ" in note and what in note


def test_runs_of_other_settings_are_not_put_together_in_one_mean(study: Study_) -> None:
    one, *others = GENERAL[:3]
    few = changed(ROME, tasks=[one], shots=5, config={"limit": 2})
    more = changed(ROME, tasks=others, config={"limit": 8})
    found = study(a=changed(UNEDITED, tasks=GENERAL[:3]), b=few, c=more)
    assert set(found.mean_of) == set(others)
    [series] = found.series(found.settings[0])
    assert found.ability(series, 2) is not None and one not in found.at(series, 2)[0].scores
    said = "\n".join(found.notes)
    assert (
        "results_b.json is left out: it and results_c.json, of the same edits, differ: limit 8.0 and 2.0"
        in said
    )
    assert "results_c.json and results_a.json differ, so their scores should not be compared: limit" in said


def test_what_differs_is_said_of_all_files_that_are_taken_together(study: Study_) -> None:
    first = changed(ROME, tasks=GENERAL[:1], shots=5)
    found = study(a=changed(UNEDITED, tasks=GENERAL[:3]), b=first, c=changed(ROME, 9, tasks=GENERAL[1:3]))
    together, differ = found.notes
    assert "taken together" in together
    assert f"differ, so their scores should not be compared: num_fewshot of {GENERAL[0]}: 0 and 5" in differ
    assert len(found.mean_of) == 3


def test_what_predict_only_writes_is_no_score(study: Study_) -> None:
    found = changed(ROME, tasks=GENERAL[:2])
    for entries in found["results"].values():
        for name in [name for name in entries if name.endswith(",none")]:
            del entries[name]
        entries |= {"bypass,none": 999, "bypass_stderr,none": 0.0}
    [note] = study(a=UNEDITED, b=found).notes
    assert note.endswith("results_b.json: holds no scores")
