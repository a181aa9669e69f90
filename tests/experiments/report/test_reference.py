"""Published numbers beside ours: which are of the same setting, and what is said of the difference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.lm_eval_files import content, mean_task, write
from support.report_files import EIGHT, edit, weight

from harness_rect import cli
from harness_rect.config import EditConfig
from harness_rect.evaluation.catalogue import EDITING_METRICS, TASKS
from harness_rect.experiments.report.page import render, sections
from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.report.reference import Row, compared, read_reference, specs

PAPER = read_reference("paper")
XL = "openai-community/gpt2-xl"


def of_paper(n_edits: int, **more: Any) -> dict[str, Any]:
    usual = {"edits_spec": f"zsre[0:{n_edits}]", "hparams_origin": "preset gpt2-xl", "model": "gpt2-xl"}
    return edit(n_edits, (0.9, 0.5), **usual | more)


def found(runs: Path) -> list[Row]:
    return compared(read_study(runs), PAPER)


def measured(rows: list[Row]) -> set[tuple[str, str]]:
    return {(row.task, row.metric) for row in rows}


def test_the_data_names_tasks_metrics_methods_and_regularizers_that_exist() -> None:
    assert PAPER.values
    for published in PAPER.values:
        assert published.model in PAPER.models and 0 <= published.error <= 0.01
        args = {"regularizer": published.regularizer, **published.settings}
        assert EditConfig.from_args(method=published.method, edits="tiny", **args)
        for task, metrics in published.scores.items():
            assert all(TASKS[task].metric(metric) for metric in metrics)
        assert published.editing.keys() <= set(EDITING_METRICS)
        numbers = [v for of in (*published.scores.values(), published.editing) for v in of.values()]
        assert all(0 <= value <= 1 for value in numbers)
        assert bool(published.scores) + bool(published.editing) + bool(published.weights) == 1


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gpt2-xl", "gpt2-xl"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("/models/GPT2-XL/", "gpt2-xl"),
        ("openai-community/gpt2-xl (bfloat16)", "gpt2-xl"),
        ("huggyllama/llama-7b", "llama-7b"),
        ("C:\\models\\llama-7b-hf", "llama-7b"),
        ("gpt2", None),
        ("meta-llama/Llama-2-7b-hf", None),
        ("someone/gpt2-xl-tuned", None),
    ],
)
def test_a_model_is_recognised_by_the_last_part_of_its_name(name: str, known: str | None) -> None:
    assert PAPER.model(name) == known


def test_scores_of_the_same_setting_stand_side_by_side(add, runs: Path) -> None:
    add(5, model=XL)
    add({task: 2 for task in EIGHT}, of_paper(20), model=XL)
    add({task: 3 for task in EIGHT}, of_paper(20, regularizer="rect", keep=0.4), model=XL)
    add({task: 4 for task in EIGHT}, of_paper(7), model=XL)  # no published number
    rows = found(runs)
    by = {(r.published.figure, r.published.regularizer, r.task): r for r in rows}
    nli = by["sequential editing", "none", "rect_nli"]
    assert (nli.ours.value, nli.theirs, nli.differs) == (0.2, 0.40, "")
    assert nli.cells[4:] == ["0.200 [0.000, 0.461]", "0.400", "-0.200", "0.01", "-"]
    assert by["RECT, abilities", "rect", "rect_open_domain_qa"].theirs == 0.181
    assert by["unedited", "none", "rect_reasoning"].theirs == 0.328
    assert {r.published.edits for r in rows} == {0, 20}
    # The hand-made files have no recall_macro, which is what the scripts report of NER.
    assert "rect_ner" not in {r.task for r in rows}
    drawn = specs(read_study(runs), rows)
    assert [spec.title for spec in drawn] == [f"{XL}: ROME"] and len(drawn[0].panels) == 7


def test_a_metric_that_is_no_headline_is_read_from_the_file(runs: Path) -> None:
    made = {
        "rect_ner": mean_task(
            "f1", [1, 0], more={"recall_macro,none": 0.5, "recall_macro_stderr,none": "N/A"}
        )
    }
    write(runs, content(made, config={"model_args": {"pretrained": XL}}), made, samples=False)
    [ner] = found(runs)
    assert (ner.metric, ner.ours.value, ner.theirs, ner.cells[6]) == ("recall_macro", 0.5, 0.433, "+0.067")


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "r_rome"},
        {"regularizer": "random", "keep": 0.2},
        {"regularizer": "rect", "keep": 0.4, "rect_convention": "alphaedit"},
        {"edit_batch_size": 20},
        {"n_edits": 19},
    ],
)
def test_another_setting_is_not_compared(add, runs: Path, changed: dict[str, Any]) -> None:
    n = changed.pop("n_edits", 20)
    add(5, of_paper(n, **changed), model=XL)
    assert found(runs) == []


def test_editing_and_weights_are_compared_where_they_were_published(add, runs: Path) -> None:
    for stream in range(3):
        one = of_paper(1, stream=stream, regularizer="random", keep=0.4, edits_sha256=f"s{stream}")
        add(5, one, model=XL)
    add(5, of_paper(15, weights={"h.17": weight(60000.0, (0.7, 0.5))}), model=XL)
    rows = found(runs)
    assert measured(rows) == {
        *(("", metric) for metric in (*EDITING_METRICS, "manhattan_distance", "0.077", "0.171"))
    }
    protocols = {"manhattan_distance": None, "0.077": None, "0.171": None}
    expected = dict.fromkeys(EDITING_METRICS, "teacher-forced") | protocols
    assert {r.metric: r.protocol for r in rows} == expected
    reliability = next(r for r in rows if r.metric == "reliability")
    assert (reliability.ours.value, reliability.ours.n, reliability.theirs) == (0.9, 3, 0.34)
    assert reliability.cells[3] == f"reliability of {3 * reliability.published.edits} facts"
    distance = next(r for r in rows if r.metric == "manhattan_distance")
    assert distance.cells[3:8] == ["Manhattan distance", "60,000", "63,248", "-3,248", "printed"]


@pytest.mark.parametrize("origin", ["mine.yaml", "preset gpt2-xl-original", "preset rect-tiny"])
def test_what_else_differs_is_said(origin: str, add, runs: Path) -> None:
    report = of_paper(20, edits_spec="counterfact[0:20]", hparams_origin=origin)
    add(5, report, model=XL, config={"limit": 50})
    assert {row.differs for row in found(runs)} == {
        f"facts of counterfact; limit 50; hyper-parameters of {origin}"
    }


def test_the_page_has_the_section_only_when_asked(add, runs: Path, tmp_path: Path, capsys) -> None:
    add(5, model=XL)
    add(2, of_paper(20), model=XL)
    page = tmp_path / "page.html"
    assert cli.main(["report", str(runs), "-o", str(page)]) == 0
    assert "Beside the numbers" not in page.read_text(encoding="utf-8")
    assert cli.main(["report", str(runs), "-o", str(page), "--reference", "paper"]) == 0
    text = re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))
    assert "Beside the numbers of Gu et al. 2024" in text
    assert "Ours and the published (generated)" in text  # of tasks; no editing metric stands among them
    for about in ("1037 rows", "r_rome", "RTE", "rouge-score"):  # what is known to differ
        assert about in text
    capsys.readouterr()
    assert cli.main(["report", str(runs), "-o", str(page), "--reference", "papers"]) == 2
    assert capsys.readouterr().err == "error: --reference papers: no such numbers: did you mean 'paper'?\n"


def test_without_a_run_of_a_published_setting_the_section_says_what_it_needs(add, runs: Path) -> None:
    add(5)
    add(2, edit(20, (1, 1)))
    study = read_study(runs)
    text = render(study, sections(study, PAPER))
    assert "<dd>runs of a published setting, one fact an edit: kn on gpt2-xl, memit on gpt2-xl" in text
