"""Rows for notebooks, from what a stock lm_eval wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness_rect.evaluation.catalogue import GROUPS, TASKS
from harness_rect.experiments import analysis
from harness_rect.experiments.results import load, newest


@pytest.fixture(scope="module")
def folder(evaluations: dict[str, Path]) -> Path:
    return evaluations["base"].parent


@pytest.mark.parametrize(
    "function", ["runs", "scores", "edit_metrics", "edits", "update_statistics", "weight_distances"]
)
def test_rows_are_flat_and_alike(function: str, folder: Path) -> None:
    rows = getattr(analysis, function)(folder)
    assert rows and len({tuple(row) for row in rows}) == 1
    assert all(
        value is None or isinstance(value, str | int | float) for row in rows for value in row.values()
    )


def test_runs_say_how_the_model_was_edited(folder: Path) -> None:
    base, rome = analysis.runs(folder)
    assert (base["method"], base["n_edits"]) == ("none", 0)
    expected = {"method": "rome", "regularizer": "rect", "keep": 0.4, "n_edits": 2, "edit_seed": 0}
    assert rome.items() >= (expected | {"model": "rect-tiny"}).items()


def test_scores_are_the_files(folder: Path) -> None:
    rows = analysis.scores(folder / "rome")
    results = load(newest(folder / "rome")[0]).file.results
    assert all(row["score"] == results[row["task"]][f"{row['metric']},none"] for row in rows)
    headlines = [row["metric"] for row in rows if row["headline"]]
    assert headlines == [
        *(
            TASKS[name].headline.name
            for group in GROUPS["rect_suite"].members
            for name in GROUPS[group].members
        ),
        "score",
    ]
    assert [row["task"] for row in rows if row["is_group"]] == ["rect_general"]


def test_editing_metrics_and_updates_are_the_reports(folder: Path) -> None:
    edit = load(newest(folder / "rome")[0]).edit
    assert edit is not None
    means = {(row["moment"], row["metric"]): row["value"] for row in analysis.edit_metrics(folder / "rome")}
    assert means["right after each edit", "reliability"] == edit.right_after_each_edit["reliability"]
    assert means["at the end", "locality"] == edit.at_the_end["locality"]
    single = [row for row in analysis.edits(folder) if row["metric"] == "reliability"]
    assert [row["position"] for row in single] == [1, 2]
    assert sum(row["end"] for row in single) / 2 == edit.at_the_end["reliability"]
    [weight] = edit.weights
    steps = analysis.update_statistics(folder)
    assert [(row["step"], row["edits"], row["weight"]) for row in steps] == [(1, 1, weight), (2, 2, weight)]
    assert steps[1]["kept"] == edit.steps[1].weights[weight].kept == pytest.approx(0.4, abs=1e-4)
    [distance] = analysis.weight_distances(folder)
    assert distance["manhattan_distance"] == edit.weights[weight].manhattan_distance


def test_comparisons_are_those_of_the_command(evaluations: dict[str, Path]) -> None:
    rows = analysis.comparisons(evaluations["base"], [evaluations["rome"]], tasks=["rect_nli"])
    assert [(row["task"], row["metric"], row["test"]) for row in rows] == [("rect_nli", "acc", "mcnemar")]


def test_pandas_takes_the_rows(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(analysis.scores(folder))
    wide = frame[frame.headline].pivot(index="method", columns="task", values="score")
    assert wide.shape == (2, 11) and not wide.isna().any().any()
