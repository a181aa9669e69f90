"""Tasks beyond teacher forcing side by side: directions, protocols, and metrics that one side lacks."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.lm_eval_files import content, mean_task, with_group, with_metrics, write

from harness_rect.errors import UserError
from harness_rect.evaluation.aggregations import weighted_f1
from harness_rect.experiments import analysis
from harness_rect.experiments.compare import Comparison, Gate, compare
from harness_rect.experiments.compare.rendering import print_tables, render
from harness_rect.experiments.results import Results, load

RIGHT = [1, 1, 1, 0, 1, 0, 1, 1, 0, 1]
FEWER = [0, 1, 0, 0, 1, 0, 1, 0, 0, 1]

Tasks = dict[str, dict[str, Any]]
Make = Callable[..., Results]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(tasks)``: a results file with samples, read; without what it says of directions."""
    count = itertools.count()

    def make(tasks: Tasks, groups: dict[str, float] | None = None) -> Results:
        made = content(tasks)
        made["higher_is_better"] = {}
        for task in made["configs"].values():  # the headline is the catalogue's
            task["metric_list"] = []
        for group, score in (groups or {}).items():
            members = [name for name in tasks if name.startswith("rect_glue") == (group == "rect_glue")]
            made = with_group(made, group, members, score)
        return load(write(tmp_path / str(next(count)), made, tasks))

    return make


def drift(kl: float | None, perplexity: float, changed: float) -> Tasks:
    """One text, as the metrics of a whole task: ``kl`` is absent where the unedited model is not there."""
    task = mean_task("perplexity", [perplexity] * 2)
    task["values"] = [(10 * math.log(perplexity), 10)] * 2  # NLL and number of tokens
    more = {"argmax_changed": changed} | ({} if kl is None else {"kl": kl})
    return {"rect_drift": with_metrics(task, **more)}


def rows_of(rows: list[Comparison]) -> dict[str, Comparison]:
    return {row.metric: row for row in rows}


def generated(values: list[Any], name: str = "rect_autoregressive") -> Tasks:
    return {name: mean_task("reliability", values)}


# ------------------------------------------------------------------------------------------- directions


def test_a_lower_perplexity_is_better_and_a_distance_from_the_unedited_model_has_no_retention(
    make: Make,
) -> None:
    sides = make(drift(0.0, 20, 0.0)), make(drift(0.3, 25, 0.1))
    table = compare(sides[0], [sides[1]], all_metrics=True)
    rows = rows_of(table.rows)
    assert list(rows) == ["kl", "perplexity", "argmax_changed"]
    assert not any(row.higher_is_better for row in rows.values())  # though the files do not say so
    changes = {name: (row.change, row.retention) for name, row in rows.items()}
    assert changes == {
        "kl": (pytest.approx(0.3), None),
        "perplexity": (5.0, pytest.approx(0.8)),
        "argmax_changed": (pytest.approx(0.1), None),
    }
    lines = [line for line in render(table, "markdown").splitlines() if "rect_drift" in line]
    assert [line.split(" | ")[1] for line in lines] == [f"{name} ↓" for name in rows]
    assert "| +5.0000 | 80.0% |" in lines[1] and "| +0.3000 | - |" in lines[0]


def test_of_two_edited_models_a_distance_has_no_retention_either(make: Make) -> None:
    [row] = compare(make(drift(0.4, 20, 0.1)), [make(drift(0.2, 20, 0.1))]).rows
    assert (row.metric, row.retention) == ("kl", None)


def test_an_entropy_is_no_share_and_keeps_its_numbers(make: Make) -> None:
    sides = [make({"rect_fluency": mean_task("ngram_entropy", [e, e + 1])}) for e in (5.5, 4.0)]
    [row] = compare(sides[0], sides[1:]).rows
    assert (row.score_base, row.change, row.higher_is_better) == (6.0, -1.5, True)
    assert row.retention == pytest.approx(4.5 / 6)


def test_a_gate_on_everything_passes_over_a_metric_without_retention_and_one_on_it_is_refused(
    make: Make,
) -> None:
    tasks = drift(0.0, 20, 0.0) | generated(RIGHT)
    worse = drift(0.3, 25, 0.1) | generated(RIGHT)
    sides = make(tasks), [make(worse)]
    assert [row.passed for row in compare(*sides, gates=[Gate(0.9)]).rows] == [None, True]
    for gate in (Gate(0.9, "rect_drift"), Gate(0.9, "rect_drift", "argmax_changed")):
        with pytest.raises(UserError, match=r"rect_drift (kl|argmax_changed) has no retention"):
            compare(*sides, gates=[gate])
    table = compare(*sides, gates=[Gate(0.9, "rect_drift", "perplexity")])
    assert [(row.task, row.metric) for row in table.failed] == [("rect_drift", "perplexity")]


# --------------------------------------------------------------------------------- what one side lacks


def test_a_headline_that_one_side_lacks_gives_way_to_the_next_metric_and_is_named(make: Make) -> None:
    edited, exported = make(drift(0.3, 25, 0.1)), make(drift(None, 25, 0.1))
    for base, other in ((edited, exported), (exported, edited)):
        table = compare(base, [other])
        assert [row.metric for row in table.rows] == ["perplexity"]
        assert table.left_out == [f"only in {edited.path}: rect_drift kl"]


def test_all_metrics_are_those_of_both_sides(make: Make) -> None:
    with_locality = {"rect_autoregressive": with_metrics(mean_task("reliability", RIGHT), locality=RIGHT)}
    sides = make(with_locality), make(generated(FEWER))
    table = compare(*sides[:1], [sides[1]], all_metrics=True)
    assert [row.metric for row in table.rows] == ["reliability"]
    assert table.left_out == [f"only in {sides[0].path}: rect_autoregressive locality"]
    with pytest.raises(UserError, match="has no locality, which"):
        compare(sides[0], [sides[1]], gates=[Gate(0.5, "rect_autoregressive", "locality")])


def test_a_gate_on_everything_does_not_pass_over_a_headline_that_is_missing(make: Make) -> None:
    base = make({"rect_autoregressive": with_metrics(mean_task("stopped", RIGHT), reliability=RIGHT)})
    other = make({"rect_autoregressive": mean_task("stopped", RIGHT)})
    with pytest.raises(UserError, match="rect_autoregressive has no reliability, which"):
        compare(base, [other], gates=[Gate(0.5)])
    with pytest.raises(UserError, match="no metric in common of rect_autoregressive"):
        compare(make(generated(RIGHT)), [other])


def test_a_score_over_other_edits_on_each_side_is_resampled_with_those_it_has(make: Make) -> None:
    """rect_ripple counts an edit only where the edited model has its fact."""
    sides = []
    for values in ([0.5, None, 1, 0, 1, 1, None, 0.5], [0.5, 0, None, 0, 0.5, None, 0, 0]):
        have = [v for v in values if v is not None]
        task = mean_task("logical_generalization", have) | {"values": values, "stderr": None}
        sides.append(make({"rect_ripple": task}))
    [row] = compare(sides[0], sides[1:]).rows
    assert row.test == "paired_bootstrap" and row.n == 8
    assert row.method == "paired bootstrap, n=8, 4 with this metric on one side only"
    assert row.low <= row.change <= row.high and 0 < row.p <= 1


def test_counts_of_rows_are_no_metrics(make: Make) -> None:
    task = with_metrics(mean_task("portability", RIGHT), portability_rows=8.0, reasoning=RIGHT)
    made = make({"rect_portability": task})
    rows = compare(made, [made], all_metrics=True).rows
    assert [row.metric for row in rows] == ["portability", "reasoning"]


# -------------------------------------------------------------------------------------------- protocols


def both_reliabilities(values: list[int]) -> Tasks:
    forced = {"rect_zsre": mean_task("reliability", [1.0] * 10)}
    return forced | generated(values) | {"mmlu": mean_task("acc", RIGHT)}


def test_every_form_names_the_protocol_and_no_table_holds_two(make: Make) -> None:
    table = compare(make(both_reliabilities(RIGHT)), [make(both_reliabilities(FEWER))])
    expected = {"rect_zsre": "teacher-forced", "rect_autoregressive": "generated", "mmlu": None}
    assert {row.task: row.protocol for row in table.rows} == expected
    assert {row["task"]: row["protocol"] for row in json.loads(render(table, "json"))["rows"]} == expected
    rows = csv.DictReader(io.StringIO(render(table, "csv")))
    assert {row["task"]: row["protocol"] or None for row in rows} == expected
    for form in ("table", "markdown"):
        parts = render(table, form).split("base: ")[1:]
        assert len(parts) == 3
        for part, (task, protocol) in zip(parts, expected.items(), strict=True):
            [line] = [line for line in part.splitlines() if any(name in line for name in expected)]
            assert task in line and (protocol or "-") in (line if form == "markdown" else part)
            assert [other for other in expected.values() if other and other in part] == (
                [protocol] if protocol else []
            )


@pytest.mark.parametrize("width", [40, 80, 120])
def test_tables_fit_by_folding_and_cut_no_number_off(make: Make, width: int) -> None:
    table = compare(make(both_reliabilities(RIGHT)), [make(both_reliabilities(FEWER))])
    text = io.StringIO()
    print_tables(table, Console(file=text, width=width))
    assert "…" not in text.getvalue() and max(map(len, text.getvalue().splitlines())) <= width
    if width == 120:
        assert text.getvalue() == render(table, "table")  # without a terminal
        for row in table.rows:
            [line] = [line for line in text.getvalue().splitlines() if row.task in line]
            assert f"{row.low:+.4f} to {row.high:+.4f}" in line


def test_the_metrics_of_one_task_may_have_two_protocols(make: Make, tmp_path: Path) -> None:
    task = with_metrics(mean_task("portability", RIGHT), portability_gen=FEWER)
    made = make({"rect_portability": task})
    rows = compare(made, [made], all_metrics=True).rows
    assert {row.metric: row.protocol for row in rows} == {
        "portability": "teacher-forced",
        "portability_gen": "generated",
    }
    found = {row["metric"]: row["protocol"] for row in analysis.scores(made.path)}
    assert found == {"portability": "teacher-forced", "portability_gen": "generated"}


# ------------------------------------------------------------------------------------------- the two means


def glue(answers: list[list[int]]) -> tuple[Tasks, float]:
    """SST-2 and MRPC of the suite with these answers to ten rows, and their mean."""
    gold = [0, 1] * 5
    tasks: Tasks = {}
    for name, said in zip(("rect_glue_sst", "rect_glue_mrpc"), answers, strict=True):
        values = list(zip(gold, said, strict=True))
        value = weighted_f1(values)
        more = {"score,none": value}
        task = {"metric": "f1_weighted", "value": value, "stderr": None, "values": values, "more": more}
        tasks[name] = task
    return tasks, float(np.mean([task["value"] for task in tasks.values()]))


def test_the_glue_suite_has_its_mean_beside_that_of_the_general_tasks(make: Make) -> None:
    sides = []
    for answers, right in (([[0, 1] * 5] * 2, RIGHT), ([[0] * 10, [0, -1] * 5], FEWER)):
        tasks, mean = glue(answers)
        general = {"rect_nli": mean_task("acc", right, more={"score,none": float(np.mean(right))})}
        groups = {"rect_general": float(np.mean(right)), "rect_glue": mean}
        sides.append(make(general | tasks, groups))
    rows = {row.task: row for row in compare(sides[0], sides[1:]).rows}
    assert rows["rect_general"].change == pytest.approx(rows["rect_nli"].change)
    suite = rows["rect_glue"]
    assert suite.score_base == 1 and suite.score_other == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert suite.method == "paired bootstrap within tasks, n=20 documents of 2 tasks"
    assert suite.low < suite.change < suite.high < 0 and suite.protocol == "generated"
    assert rows["rect_glue_mrpc"].test == "paired_bootstrap"
