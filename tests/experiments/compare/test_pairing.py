"""The documents of two evaluations, paired; and what cannot be paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.lm_eval_files import content, mean_task, with_group, write

from harness_rect.evaluation.aggregations import entity_f1, weighted_f1
from harness_rect.experiments.compare.pairing import Unpairable, pair, pair_group
from harness_rect.experiments.results import Key, Results, load


def two(tmp_path: Path, first: dict, second: dict, name: str = "task") -> tuple[Results, Results]:
    paths = [
        write(tmp_path / side, content({name: task}), {name: task})
        for side, task in (("base", first), ("other", second))
    ]
    base, other = (load(path) for path in paths)
    return base, other


def test_right_and_wrong_answers_are_counted_by_how_they_changed(tmp_path: Path) -> None:
    sides = two(tmp_path, mean_task("acc", [1, 1, 1, 0, 0]), mean_task("acc", [0, 1, 0, 1, 0]))
    found = pair(*sides, "task", Key("acc", "none"))
    assert (found.outcomes, found.documents) == ((2, 1), 5)


def test_other_numbers_are_kept_document_by_document(tmp_path: Path) -> None:
    sides = two(tmp_path, mean_task("rouge", [0.5, 1, 0]), mean_task("rouge", [0.25, 1, 0]))
    found = pair(*sides, "task", Key("rouge", "none"))
    assert found.outcomes is None
    assert found.stratum.base[:, 0].tolist() == [0.5, 1, 0]
    assert found.stratum.other[:, 0].tolist() == [0.25, 1, 0]


def test_the_documents_of_a_sentence_are_one_unit(tmp_path: Path) -> None:
    values = [(1, 1, 1), (0, 1, 1), (2, 2, 3), (0, 0, 0)]
    docs = [{"text": text} for text in ("A b.", "A b.", "C d.", "A b.")]
    task = {"metric": "f1", "value": entity_f1(values), "stderr": None, "values": values, "docs": docs}
    found = pair(*two(tmp_path, task, task, "rect_ner"), "rect_ner", Key("f1", "none"))
    assert (found.documents, found.unit) == (4, "sentences")
    assert found.stratum.base.tolist() == [[1, 2, 2], [2, 2, 3]]


def test_rows_that_lack_a_metric_are_left_out_as_the_task_does(tmp_path: Path) -> None:
    first = mean_task("gen", [1, 0, 1]) | {"values": [1, None, 0, 1]}
    second = mean_task("gen", [0, 0, 1]) | {"values": [0, None, 0, 1]}
    assert pair(*two(tmp_path, first, second), "task", Key("gen", "none")).documents == 3


def test_documents_with_a_metric_on_one_side_only_count_on_that_side(tmp_path: Path) -> None:
    """As where an edit counts only if the edited model knows it: each score has edits of its own."""
    first = mean_task("gen", [1, 0.5]) | {"values": [1, None, 0.5, None]}
    second = mean_task("gen", [0, 1, 1]) | {"values": [0, 1, None, 1]}
    found = pair(*two(tmp_path, first, second), "task", Key("gen", "none"))
    assert (found.documents, found.one_sided, found.outcomes) == (4, 3, None)
    assert found.stratum.base.tolist() == [[1, 1], [0, 0], [0.5, 1], [0, 0]]
    assert found.stratum.other.tolist() == [[0, 1], [1, 1], [0, 0], [1, 1]]
    assert found.stratum.change(*(side.sum(0) for side in (found.stratum.base, found.stratum.other))) == (
        pytest.approx(2 / 3 - 0.75)
    )


def test_columns_stand_for_the_same_classes_on_both_sides(tmp_path: Path) -> None:
    """Also where the first answers of the two sides have different gold classes."""
    gold = [0, 1, 1, 0]
    answers = [[0, None, 1, 1], [None, 0, 1, 0]]
    tasks: list[dict] = []
    for said in answers:
        values = [None if s is None else (g, s) for g, s in zip(gold, said, strict=True)]
        value = weighted_f1([v for v in values if v is not None])
        tasks.append({"metric": "f1_weighted", "value": value, "stderr": None, "values": values})
    sides = two(tmp_path, tasks[0], tasks[1], "rect_glue_sst")
    found = pair(*sides, "rect_glue_sst", Key("f1_weighted", "none"))
    scores = [float(found.stratum.score(side.sum(0))) for side in (found.stratum.base, found.stratum.other)]
    assert scores == pytest.approx([task["value"] for task in tasks])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": 0.9}, "do not average to the reported"),  # say, a perplexity: no mean of its documents
        ({"values": ["a", "b", "c"]}, "no numbers"),
        ({"values": [1, 0, None]}, "do not average to the reported"),
        ({"values": [None] * 3}, "lack this metric"),
        ({"values": [1, 0, 1, 1]}, "documents differ"),
    ],
)
def test_samples_that_do_not_explain_the_score_are_not_used(tmp_path: Path, change, reason) -> None:
    sides = two(tmp_path, mean_task("acc", [1, 0, 1]), mean_task("acc", [1, 0, 1]) | change)
    with pytest.raises(Unpairable, match=reason):
        pair(*sides, "task", Key("acc", "none"))


@pytest.mark.parametrize("by_size", [False, True])
def test_a_group_is_weighted_as_its_score_says(tmp_path: Path, by_size: bool) -> None:
    tasks = {"a": mean_task("score", [1, 0]), "b": mean_task("score", [1, 1, 1, 1, 1, 0])}
    score = 6 / 8 if by_size else np.mean([1 / 2, 5 / 6])
    path = write(tmp_path, with_group(content(tasks), "both", ["a", "b"], score), tasks)
    parts = pair_group(load(path), load(path), "both", Key("score", "none"))
    weights = [part.stratum.weight for part in parts]
    assert weights == pytest.approx([2 / 8, 6 / 8] if by_size else [1 / 2, 1 / 2])


def test_a_group_score_that_is_no_mean_of_its_tasks_is_not_paired(tmp_path: Path) -> None:
    tasks = {"a": mean_task("score", [1, 0]), "b": mean_task("score", [1, 1, 0])}
    path = write(tmp_path, with_group(content(tasks), "both", ["a", "b"], 0.9), tasks)
    with pytest.raises(Unpairable, match="no mean of its tasks"):
        pair_group(load(path), load(path), "both", Key("score", "none"))
