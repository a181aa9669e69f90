"""What is shown is what the files say, grouped as experiments are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.lm_eval_files import content, mean_task, write
from support.report_files import EIGHT, edit

from harness_rect.errors import UserError
from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.report.series import Regularization
from harness_rect.experiments.report.study import TIMES, Estimate, estimate
from harness_rect.experiments.results import Score

RECT: dict[str, Any] = {"regularizer": "rect", "keep": 0.4, "rect_convention": "paper"}


def test_curves_begin_at_the_unedited_model_and_go_by_number_of_edits(add, runs: Path) -> None:
    add(9)
    for n, right in ((20, 2), (5, 7)):
        add(right, edit(n, (0.8, 0.1)))
        add(right + 1, edit(n, (0.7, 0.2), **RECT))
    study = read_study(runs)
    [setting] = study.settings
    assert setting.label == "tiny: ROME"
    plain, rect = study.series(setting)
    assert (plain.label, rect.label) == ("no regularizer", "RECT 40%")
    for task in (None, *EIGHT):
        assert [(n, p.value) for n, p in study.curve(plain, task)] == [
            (0, pytest.approx(0.9)),
            (5, pytest.approx(0.7)),
            (20, pytest.approx(0.2)),
        ]
    assert study.last(setting) == {plain: 20, rect: 20}
    assert study.retained(rect, 20) == pytest.approx(0.3 / 0.9)
    assert study.editing(rect, 20, "end", "reliability").value == 0.2
    assert study.editing(rect, 20, "after", "locality").value == pytest.approx(0.3)
    assert study.mean_label == "Mean of the eight" and study.notes == []


def test_one_stream_has_the_interval_of_its_standard_error(add, runs: Path) -> None:
    add(9)
    add(6, edit(5, (1, 0.5)))
    study = read_study(runs)
    [series] = study.series(study.settings[0])
    assert study.flips == []  # without samples
    point = dict(study.curve(series, "rect_nli"))[5]
    stderr = np.std([1] * 6 + [0] * 4, ddof=1) / math.sqrt(10)
    assert point.spread == "documents"
    assert (point.low, point.high) == pytest.approx((0.6 - 1.959964 * stderr, 0.6 + 1.959964 * stderr))
    mean = dict(study.curve(series, None))[5]
    assert mean.high - mean.value == pytest.approx(1.959964 * stderr / math.sqrt(8))


def test_the_spread_of_an_editing_metric_is_that_of_the_single_edits_at_that_moment(add, runs: Path) -> None:
    report = edit(4, (0.5, 0.25))
    for one, first, last in zip(report["edits"], (0, 1, 0, 1), (0, 1, 0, 0), strict=True):
        one |= {"after": {"reliability": first}, "end": {"reliability": last}}
    add(5, report)
    study = read_study(runs)
    [series] = study.series(study.settings[0])
    after, end = (study.editing(series, 4, when, "reliability") for when in TIMES)
    assert after.spread == end.spread == "edits"
    assert after.low == max(0, 0.5 - 1.959964 * np.std((0, 1, 0, 1), ddof=1) / 2)
    assert end.high == pytest.approx(0.25 + 1.959964 * np.std((0, 1, 0, 0), ddof=1) / 2)


def test_several_streams_have_the_t_interval_over_them(add, runs: Path) -> None:
    values = (3, 5, 4)
    for stream, right in enumerate(values):
        add(right, edit(5, (right / 10, 0), stream))
    study = read_study(runs)
    [series] = study.series(study.settings[0])
    found = study.ability(series, 5)
    expected = stats.t.interval(0.95, 2, 0.4, stats.sem([v / 10 for v in values]))
    assert (found.spread, found.n, found.value) == ("streams", 3, pytest.approx(0.4))
    assert (found.low, found.high) == pytest.approx(expected)
    assert study.editing(series, 5, "after", "reliability").n == 3


def test_two_streams_span_their_range_and_no_spread_is_made_up() -> None:
    assert estimate([Score(0.2, 0.1), Score(0.6, 0.1)]) == Estimate(0.4, 0.2, 0.6, "range", 2)
    assert estimate([Score(0.2, None)]) == Estimate(0.2, None, None, "none", 1)
    assert estimate([Score(1.0, 0.0)]) == Estimate(1.0, None, None, "none", 1)  # ten right of ten
    assert estimate([]) is None
    assert estimate([Score(0.9, 0.2)], bounded=True).high == 1.0


def test_batches_and_hyper_parameters_make_other_settings_and_series(add, runs: Path) -> None:
    memit: dict[str, Any] = {"method": "memit", "edit_batch_size": 10}
    add(5, edit(10, (1, 1), **memit))
    add(4, edit(20, (1, 1), **memit))
    add(3, edit(50, (1, 1), method="memit", edit_batch_size=50))
    add(3, edit(5, (1, 1)))
    add(2, edit(5, (1, 1), hparams={"layers": [4]}, hparams_origin="/some/where/other.yaml"))
    study = read_study(runs)
    assert [s.method_label for s in study.settings] == ["ROME", "MEMIT, batches of 10", "MEMIT, one batch"]
    rome, batches, _ = study.settings
    assert {s.label for s in study.series(rome)} == {
        "no regularizer [preset tiny]",
        "no regularizer [other.yaml]",
    }
    [series] = study.series(batches)
    assert study.numbers(series) == [10, 20]


def test_templates_sampled_with_another_seed_are_another_stream_of_the_same_series(add, runs: Path) -> None:
    for seed in (0, 1):
        hparams = {"layers": [3], "context_templates": [f"{seed} {{}}"]}
        add(5, edit(5, (1, 1), hparams=hparams, edit_seed=seed))
    study = read_study(runs)
    [series] = study.series(study.settings[0])
    assert len(study.at(series, 5)) == 2 and study.notes == []


def test_the_newer_of_two_evaluations_of_the_same_is_taken_and_the_other_named(add, runs: Path) -> None:
    add(5, edit(5, (1, 1)), date=2.0)
    add(1, edit(5, (1, 1)), date=1.0)
    study = read_study(runs)
    [run] = study.runs
    assert run.mean.value == 0.5
    assert len(study.notes) == 1 and study.notes[0].startswith("001/") and "left out" in study.notes[0]


def test_evaluations_of_other_tasks_of_the_same_model_are_taken_together(add, runs: Path) -> None:
    add(5, edit(5, (1, 1)), tasks=EIGHT[:4], date=1.0)
    add(1, edit(5, (1, 1)), tasks=EIGHT[4:], date=2.0)
    [run] = read_study(runs).runs
    assert list(run.scores) == list(EIGHT) and run.mean.value == pytest.approx(0.3)


def test_runs_on_other_documents_are_named(add, runs: Path) -> None:
    add(9)
    add(5, edit(5, (1, 1), edit_seed=7), config={"limit": 10})
    [note] = read_study(runs).notes
    assert "limit none and 10" in note and "edit_seed" not in note


def test_tasks_of_others_have_a_mean_too_and_one_that_lacks_in_a_run_is_no_part_of_it(
    add, runs: Path
) -> None:
    add({"arc": 8, "piqa": 6}, tasks=("arc", "piqa"))
    add({"arc": 4, "piqa": 2}, edit(5, (1, 1)), tasks=("arc", "piqa"))
    add({"arc": 2}, edit(10, (1, 1)), tasks=("arc",))
    study = read_study(runs)
    [series] = study.series(study.settings[0])
    assert study.tasks == ["arc", "piqa"] and study.mean_of == ["arc"]
    assert study.mean_label == "Mean of 1 task"
    assert [p.value for _, p in study.curve(series, None)] == pytest.approx([0.8, 0.4, 0.2])


def test_a_distance_from_the_unedited_model_is_no_ability(runs: Path) -> None:
    """``hf`` reports the perplexity of rect_drift alone, which is not taken for its headline."""
    for name, metric, report in (("0", "perplexity", None), ("1", "kl", edit(5, (1, 1)))):
        made = {"rect_drift": mean_task(metric, [3.0, 4.0], higher_is_better=False)}
        config = {"model_args": {"pretrained": "tiny"}, "edit": report}
        write(runs / name, content(made, config=config), made, samples=False)
    base, edited = read_study(runs).runs
    assert base.scores == edited.scores == {}
    assert base.measures.keys() == {("rect_drift", "perplexity")}
    assert edited.measures["rect_drift", "kl"].value == 3.5


def test_files_of_hf_alone_make_a_study_without_series(add, runs: Path) -> None:
    add(9, model="org/one")
    add(8, model="org/two")
    study = read_study(runs)
    assert [run.model for run in study.runs] == ["org/one", "org/two"] and study.settings == []


def test_answers_that_flipped_are_those_of_the_samples(add, runs: Path) -> None:
    docs = [{"question": f"q{i}"} for i in range(10)]
    add({"rect_nli": 8}, tasks=("rect_nli",), samples=True, docs=docs)
    add({"rect_nli": 3}, edit(5, (1, 1)), tasks=("rect_nli",), samples=True, docs=docs)
    [flips] = read_study(runs).flips
    assert flips.counts == {"rect_nli": (10, 5, 0)}
    assert [(e.doc_id, e.kind) for e in flips.examples] == [(3, "lost"), (4, "lost")]
    assert flips.examples[0].after == "a\u2028b"


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_read(add, runs: Path) -> None:
    broken = add(8, edit(5, (1, 1)) | {"n_edits": "many"})
    with pytest.raises(UserError, match=rf"no results file can be read: {broken}: config.edit: n_edits"):
        read_study(runs)
    add(9)
    study = read_study(runs)
    assert len(study.runs) == 1
    assert f"{broken}: config.edit: n_edits" in study.notes[0]


def test_reports_of_both_versions_are_one_series(add, runs: Path) -> None:
    add(9)
    add(5, edit(5, (1, 1), **RECT))
    settings = {"keep": 0.4, "rect_convention": "paper"}
    add(4, edit(10, (1, 1), **RECT, schema_version=1, regularizer_settings=settings))
    study = read_study(runs)
    [series] = study.series(study.settings[0])
    assert study.numbers(series) == [5, 10]


def regularizer(name: str, **settings: object) -> Regularization:
    return Regularization.of(name, settings)


def test_regularizers_are_in_the_order_of_the_registry_and_the_largest_share_is_first() -> None:
    kept = [("rect", 0.8), ("rect", 0.2), ("random", 0.4), ("pca", 0.4)]
    ordered = [
        regularizer("none"),
        *(regularizer(name, keep=keep) for name, keep in kept),
        regularizer("prune"),
        regularizer("new"),
    ]
    assert sorted(reversed(ordered), key=lambda one: one.order) == ordered


def test_labels_have_the_settings_that_are_not_defaults() -> None:
    assert regularizer("rect", keep=0.4, rect_convention="paper") == regularizer("rect", keep=0.4)
    assert regularizer("rect", keep=0.4).label == "RECT 40%"
    assert regularizer("rect", keep=0.4, rect_convention="alphaedit").label == "RECT 40% (alphaedit)"
    assert regularizer("norm_matched", keep=0.2, rect_convention="paper").label == "Norm-matched 20%"
    assert regularizer("revive", keep=0.5, revive_spectrum="values").label == "REVIVE"
    assert regularizer("revive", keep=0.3, revive_spectrum="squares").label == "REVIVE 30% (squares)"
    assert regularizer("new", keep="most", x=2.5, y=[1]).label == "new (most, x 2.5, [1])"


def test_runs_of_a_stock_lm_eval(evaluations: dict[str, Path]) -> None:
    """Real files: numbers as they stand there, F1 with a standard error from its samples."""
    study = read_study(evaluations["base"].parent)
    [series] = study.series(study.settings[0])
    [path] = evaluations["rome"].rglob("results_*.json")
    file = json.loads(path.read_text())
    curve = dict(study.curve(series, "rect_ner"))
    assert curve[2].value == file["results"]["rect_ner"]["f1,none"]
    assert study.ability(series, 2).value == file["results"]["rect_general"]["score,none"]
    report = file["config"]["edit"]
    found = study.editing(series, 2, "end", "reliability")
    assert found.value == report["at_the_end"]["reliability"]
    [run] = study.at(series, 2)
    [(weight, moved)] = report["weights"].items()
    assert run.edit.weights[weight].manhattan_distance == moved["manhattan_distance"]
    [flips] = study.flips
    for task, (documents, lost, gained) in flips.counts.items():
        rights = []
        for side in ("base", "rome"):
            [samples] = evaluations[side].rglob(f"samples_{task}_2*.jsonl")
            rows = [json.loads(line) for line in samples.open(newline="\n")]
            rights.append([row["score"] for row in sorted(rows, key=lambda row: row["doc_id"])])
        assert (documents, lost, gained) == (
            10,
            sum(a > b for a, b in zip(*rights, strict=True)),
            sum(a < b for a, b in zip(*rights, strict=True)),
        )
    for example in flips.examples:
        assert example.prompt and example.before != example.after


def test_the_standard_error_of_f1_is_that_of_leaving_out_one_sentence(evaluations: dict[str, Path]) -> None:
    study = read_study(evaluations["base"].parent)
    run = next(run for run in study.runs if run.series)
    [samples] = evaluations["rome"].rglob("samples_rect_ner_2*.jsonl")
    sentences: dict[str, np.ndarray] = {}
    for row in map(json.loads, samples.open(newline="\n")):
        text = row["doc"]["text"]
        sentences[text] = sentences.get(text, np.zeros(3)) + np.array(row["f1"], dtype=float)
    all_of = np.array(list(sentences.values()))
    total, n = all_of.sum(0), len(all_of)

    def f1(counts: np.ndarray) -> float:
        correct, found, gold = counts
        return 2 * correct / (found + gold) if found + gold else 0.0

    without = np.array([f1(total - one) for one in all_of])
    expected = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    assert run.scores["rect_ner"].value == pytest.approx(f1(total))
    assert run.scores["rect_ner"].stderr == pytest.approx(expected)
