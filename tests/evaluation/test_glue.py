"""How answers of the GLUE suite are read, and which rows are asked."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness_rect.errors import UserError
from harness_rect.evaluation import data, glue

SST, MMLU = data.SOURCES["rect_glue_sst"], data.SOURCES["rect_glue_mmlu"]


# ----------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (" Yes", 1),
        ("yes.", 1),
        (" NO\nSentence", 0),
        ("'no'", 0),
        (" I say no, not yes", 0),  # the first counts
        (" I do not know", -1),
        (" yesterday", -1),
        (" nothing", -1),
        (" no-one", -1),
        (" No's", -1),
        (" yes_", -1),
        ("", -1),
    ],
)
def test_yes_and_no_are_whole_words_in_any_case(output: str, found: int) -> None:
    assert glue.yes_class(output) == found


def test_entailment_has_the_class_of_glue() -> None:
    assert glue.entailment_class(" True") == 0  # GLUE's 0 is entailment
    assert glue.entailment_class(" False or True") == 1
    assert glue.entailment_class(" untrue") == -1
    doc = {"label": 0}
    assert glue.entailment(doc, [" True"])["acc"] == 1.0
    assert glue.entailment(doc, [" False"])["acc"] == 0.0


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (" A", 0),
        (" (B) gold", 1),
        (" The answer is C", 2),
        (" D.\nQuestion", 3),
        (" A. Paris", 0),
        (" A\ndog", 0),
        (" A dog", -1),
        (" a", -1),
        (" Apples", -1),
        (" U-B", -1),
        (" E", -1),
        (" A dog, so B", 1),
    ],
)
def test_a_choice_is_a_capital_that_stands_alone(output: str, found: int) -> None:
    assert glue.choice_class(output) == found


WORDS = {glue.sentiment_class: ("negative", "positive"), glue.yes_class: ("no", "yes")}


@given(st.sampled_from(sorted(WORDS, key=str)), st.integers(0, 1), st.text(max_size=12), st.text(max_size=12))
def test_a_word_is_read_wherever_it_stands_alone_and_nowhere_else(reader, which, before, after) -> None:
    assume(reader(before) == reader(after) == glue.UNREAD)
    word = WORDS[reader][which]
    for form in (word, word.upper(), word.capitalize()):
        assert reader(f"{before} {form}, {after}") == which
        assert reader(f"x{form}") == reader(f"{form}x") == glue.UNREAD


@given(st.integers(0, 3), st.integers(-1, 3))
def test_an_answer_that_cannot_be_read_is_wrong(gold: int, said: int) -> None:
    output = " ABCD"[said + 1]
    scores = glue.choice({"answer": gold}, [output])
    assert scores["f1_weighted"] == scores["score"] == (gold, said)
    assert scores["acc"] == float(gold == said)
    assert scores["valid_rate"] == float(said >= 0)


# -------------------------------------------------------------------------------------------------- rows


def write(folder: Path, source: data.Source, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / source.file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data.documents(source, str(folder))


def reviews(labels: list[int]) -> list[dict[str, Any]]:
    return [{"sentence": f"review {i}", "label": label} for i, label in enumerate(labels)]


def test_ten_rows_are_kept_for_shots_and_the_next_hundred_used(tmp_path: Path) -> None:
    rows = reviews([i % 2 for i in range(150)])
    assert write(tmp_path, SST, rows) == rows[10:110]


def test_classes_of_one_size_take_turns_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = reviews([1] * 10 + [0] * 10)
    found = [row["sentence"] for row in write(tmp_path, SST, rows)]
    assert found == [f"review {i}" for pair in zip(range(5, 10), range(15, 20), strict=True) for i in pair]


def test_of_other_rows_each_class_is_shuffled_and_the_surplus_left_out(tmp_path: Path) -> None:
    rows = reviews([int(i % 3 > 0) for i in range(240)])
    found = write(tmp_path, SST, rows)
    assert [row["label"] for row in found] == [0, 1] * 50  # a row of class 0 comes first
    # As the published script does it: one generator for all classes, in the order in which they occur.
    rng = random.Random(37)
    classes = [[row for row in rows if row["label"] == label] for label in (0, 1)]
    for of in classes:
        rng.shuffle(of)
    turns = [row for pair in zip(classes[0], classes[1][:80], strict=True) for row in pair]
    assert found == turns[10:110]
    assert write(tmp_path, SST, rows) == found


def test_four_classes_are_balanced_too(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"question": f"q{i}", "choices": list("wxyz"), "answer": rng.choice((0, 1, 1, 2, 3))}
        for i in range(300)
    ]
    found = write(tmp_path, MMLU, rows)
    assert Counter(row["answer"] for row in found) == dict.fromkeys(range(4), 25)
    letters = [{**row, "answer": "ABCD"[row["answer"]]} for row in rows]
    assert write(tmp_path, MMLU, letters) == found


def test_too_few_rows_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write(tmp_path, SST, reviews([0] * 50 + [1] * 5))
    assert str(caught.value) == (
        f"rect_glue_sst: {tmp_path / 'glue_sst.jsonl'}: 55 usable rows make 10 with the classes (label)"
        " balanced, of which 10 are kept for shots; give more rows of each class"
    )


def test_the_splits_on_the_hub_are_those_of_the_follow_ups() -> None:
    suite = {task: source.hub for task, source in data.SOURCES.items() if task.startswith("rect_glue_")}
    assert suite == {
        "rect_glue_sst": ("nyu-mll/glue", "sst2", "validation"),
        "rect_glue_mrpc": ("nyu-mll/glue", "mrpc", "validation"),
        "rect_glue_cola": ("nyu-mll/glue", "cola", "validation"),
        "rect_glue_rte": ("nyu-mll/glue", "rte", "validation"),
        "rect_glue_nli": ("nyu-mll/glue", "rte", "train"),
        "rect_glue_mmlu": ("cais/mmlu", "all", "validation"),
    }
