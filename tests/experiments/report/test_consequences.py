"""Tasks about the edits on the page, by protocol, and the means of two groups beside each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.lm_eval_files import content, mean_task, with_group, with_metrics, write
from support.report_files import EIGHT, edit

from harness_rect.evaluation.aggregations import weighted_f1
from harness_rect.evaluation.catalogue import EDITING_METRICS, GROUPS, title
from harness_rect.evaluation.catalogue import protocol as protocol_of
from harness_rect.experiments.report.drawing import FigureSpec
from harness_rect.experiments.report.page import render, sections
from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.report.study import Study

GLUE = GROUPS["rect_glue"].members
Tasks = dict[str, dict[str, Any]]
Save = Callable[..., None]


@pytest.fixture
def save(runs: Path) -> Save:
    """``save(tasks, edit=None, groups={})`` writes one evaluation with samples."""
    numbers = itertools.count()

    def save(
        tasks: Tasks, report: dict[str, Any] | None = None, groups: dict[str, float] | None = None
    ) -> None:
        made = content(tasks, config={"model_args": {"pretrained": "tiny"}, "edit": report})
        for task in made["configs"].values():
            task["metric_list"] = []
        for group, score in (groups or {}).items():
            made = with_group(made, group, GROUPS[group].members, score)
        write(runs / f"{next(numbers):03d}", made, tasks)

    return save


def about_edits(right: int, kl: float, perplexity: float) -> Tasks:
    """Tasks of all three protocols. Teacher forcing finds every edit, generation ``right`` of ten."""
    generated = [float(i < right) for i in range(10)]
    return {
        "rect_zsre": mean_task("reliability", [1.0] * 10),
        "rect_counterfact": mean_task("es", generated),
        "rect_autoregressive": mean_task("reliability", generated),
        "rect_portability": with_metrics(
            mean_task("portability", [1.0] * 10), portability_gen=generated, portability_rows=10.0
        ),
        "rect_fluency": mean_task("ngram_entropy", [6.0 - kl] * 10),
        "rect_drift": with_metrics(mean_task("perplexity", [perplexity] * 2), kl=kl),
    }


def generated_reliability(right: int) -> Tasks:
    return {"rect_autoregressive": about_edits(right, 0.3, 25)["rect_autoregressive"]}


def specs(study: Study) -> dict[str, FigureSpec]:
    return {spec.name: spec for section in sections(study) for spec in section.figures}


def axes_of(panel):
    axes = Figure().add_subplot()
    panel.draw_on(axes)
    return axes


def test_each_protocol_has_its_own_figure_and_every_axis_says_which(save: Save, runs: Path) -> None:
    save(about_edits(0, 0.0, 20))
    save(about_edits(4, 0.3, 25), edit(10, (1, 1)))
    study = read_study(runs)
    found = [p for name, p in specs(study).items() if name.startswith("consequences")]
    drawn: dict[str, set[str]] = {}
    for spec in found:
        labels = {axes_of(panel).get_xlabel() for panel in spec.panels}
        [protocol] = {label.split(", ")[1] for label in labels}
        assert f"({protocol})" in spec.title
        assert {row[-1] for row in spec.rows} == labels
        drawn[protocol] = {panel.title for panel in spec.panels}
    assert len(found) == len(drawn) == 3 and sum(map(len, drawn.values())) == 8
    for task, metric in study.measures:
        assert f"{title(task)}: {metric}" in drawn[protocol_of(task, metric)]
    assert {"zsRE: reliability", f"{title('rect_portability')}: portability"} <= drawn["teacher-forced"]
    assert f"{title('rect_autoregressive')}: reliability" in drawn["generated"]
    assert f"{title('rect_portability')}: portability_gen" in drawn["generated"]


def panel_of(study: Study, metric: str):
    panels = [panel for spec in specs(study).values() for panel in spec.panels]
    return next(panel for panel in panels if panel.title.endswith(f": {metric}"))


def test_values_that_are_no_shares_are_drawn_as_they_are_and_what_is_lower_better_says_so(
    save: Save, runs: Path
) -> None:
    save(about_edits(0, 0.0, 20))
    save(about_edits(4, 0.3, 25), edit(10, (1, 1)))
    study = read_study(runs)
    expected = {"perplexity": (25, 20), "kl": (0.3, 0.0), "ngram_entropy": (5.7, 6.0)}
    for metric, (value, unedited) in expected.items():
        axes = axes_of(panel_of(study, metric))
        points = [line.get_xdata() for line in axes.lines if len(line.get_xydata()) == 1]
        assert points == [pytest.approx([value])]
        dashed = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert dashed == [pytest.approx(unedited)]
        low, high = axes.get_xlim()
        assert low <= min(value, unedited) <= max(value, unedited) <= high
        assert high - low < 10, "no limits of [0, 1] and none far beyond the values"
        assert ("lower is better" in axes.get_xlabel()) == (metric != "ngram_entropy")
    low, high = axes_of(panel_of(study, "kl")).get_xlim()
    assert high < 0.5, "a small distance is not drawn on the axis of a share"


def test_the_unedited_model_is_shown_only_where_it_was_asked_about_the_same_edits(
    save: Save, runs: Path
) -> None:
    other = about_edits(0, 0.0, 20)
    other["rect_autoregressive"] = mean_task("reliability", [0.0] * 8)  # eight edits, not ten
    save(other)
    save(about_edits(4, 0.3, 25), edit(10, (1, 1)))
    study = read_study(runs)
    rows = {row[0]: row[3] for spec in specs(study).values() for row in spec.rows if len(row) == 5}
    assert rows[f"{title('rect_autoregressive')}: reliability"] == "-"
    assert rows[f"{title('rect_drift')}: perplexity"] == "20.000"


@pytest.mark.parametrize("first", ["rect_nli", "rect_autoregressive"])
def test_tasks_about_the_edits_that_were_evaluated_apart_are_of_one_run(
    save: Save, runs: Path, first: str
) -> None:
    tasks = {"rect_nli": mean_task("acc", [1, 0] * 5), **generated_reliability(4)}
    for name in sorted(tasks, key=lambda name: name != first):
        save({name: tasks[name]}, edit(10, (1, 1)))
    study = read_study(runs)
    [run] = study.runs
    assert list(run.scores) == ["rect_nli"] and study.mean_of == ["rect_nli"]
    assert run.measures["rect_autoregressive", "reliability"].value == 0.4


def test_a_metric_without_a_standard_error_gets_that_of_its_samples(save: Save, runs: Path) -> None:
    [task] = generated_reliability(4).values()
    save({"rect_autoregressive": task | {"stderr": None}}, edit(10, (1, 1)))
    [run] = read_study(runs).runs
    score = run.measures["rect_autoregressive", "reliability"]
    assert score.stderr == pytest.approx(np.std([1] * 4 + [0] * 6, ddof=1) / np.sqrt(10))


def test_what_the_session_generates_stands_beside_what_it_forces_and_not_among_it(
    save: Save, runs: Path
) -> None:
    generated = {f"{metric}_gen": 0.3 for metric in EDITING_METRICS}
    report = edit(10, (0.9, 0.8))
    for when in ("right_after_each_edit", "at_the_end"):
        report[when] |= generated
    save({"rect_nli": mean_task("acc", [1, 0] * 5)})
    save({"rect_nli": mean_task("acc", [1, 0] * 5)}, report)
    study = read_study(runs)
    forced, made = (specs(study)[name] for name in ("editing-0", "editing-generated-0"))
    assert "(teacher-forced)" in forced.title and "(generated)" in made.title
    assert [panel.title for panel in forced.panels] == list(EDITING_METRICS)
    assert [panel.title for panel in made.panels] == list(generated)
    assert [bar.get_width() for bar in axes_of(made.panels[0]).patches] == [0.3, 0.3]
    text = " ".join(re.sub(r"<.*?>", " ", render(study, sections(study))).split())
    header = "reliability ({}) right after each edit reliability ({}) at the end".format
    assert f"{header(*['teacher-forced'] * 2)} {header(*['generated'] * 2)}" in text
    assert "no regularizer 0.500 100% - 0.900 0.800 0.300 0.300" in text


# --------------------------------------------------------------------------------------------- two groups


def glue(right: int) -> tuple[Tasks, float]:
    """The six tasks of the suite with this many of ten answers right; and their mean."""
    values = [(i % 2, i % 2 if i < right else -1) for i in range(10)]
    value = weighted_f1(values)
    task = {"metric": "f1_weighted", "value": value, "stderr": None, "values": values}
    return {name: task | {"more": {"score,none": value}} for name in GLUE}, value


def eight(right: int) -> Tasks:
    return {name: mean_task("acc", [i < right for i in range(10)]) for name in EIGHT}


def test_the_glue_suite_has_a_mean_beside_that_of_the_eight_and_neither_is_in_the_other(
    save: Save, runs: Path
) -> None:
    for right, report in ((10, None), (4, edit(10, (1, 1)))):
        tasks, mean = glue(right)
        save(eight(right) | tasks, report, {"rect_general": right / 10, "rect_glue": mean})
    study = read_study(runs)
    [series] = study.series(study.settings[0])
    assert study.mean_label == "Mean of the eight" and study.mean_of == list(EIGHT)
    assert [point.value for _, point in study.curve(series, None)] == [1.0, 0.4]
    expected = weighted_f1([(i % 2, i % 2 if i < 4 else -1) for i in range(10)])
    suite = dict(study.curve(series, "rect_glue"))
    assert suite[0].value == 1.0 and suite[10].value == pytest.approx(expected)
    titles = [study.title(task) for task in study.shown]
    assert titles[0] == "Mean of the eight"
    assert titles[9:11] == ["Mean of the GLUE suite", "GLUE SST-2"] and len(titles) == 1 + 8 + 1 + 6
    labels = {axes_of(panel).get_ylabel() for panel in specs(study)["abilities-0"].panels[9:]}
    assert labels == {"score, generated", "f1_weighted, generated"}


def test_the_suite_alone_is_the_mean_of_the_page(save: Save, runs: Path) -> None:
    for right, report in ((10, None), (4, edit(10, (1, 1)))):
        tasks, mean = glue(right)
        save(tasks, report, {"rect_glue": mean})
    study = read_study(runs)
    assert study.mean_label == "Mean of the GLUE suite" and study.tasks == list(GLUE)
    assert "mean of the glue suite" in render(study, sections(study))


def test_parts_of_the_groups_are_not_averaged_together(save: Save, runs: Path) -> None:
    for right, report in ((10, None), (4, edit(10, (1, 1)))):
        tasks = {name: task for name, task in (eight(right) | glue(right)[0]).items() if name != "rect_ner"}
        del tasks["rect_glue_sst"]
        save(tasks, report)
    study = read_study(runs)
    assert study.mean_of == [name for name in EIGHT if name != "rect_ner"]
    assert study.mean_label == "Mean of 7 tasks"
