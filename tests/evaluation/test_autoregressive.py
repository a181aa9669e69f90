"""``rect_autoregressive`` on answers made by hand, and what it asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.judge_server import judge_server, says_what_matches
from support.ranks import run_ranks
from support.table_lm import ComparingTableLM, TableLM, evaluate, metrics

from harness_rect.answers import Answer
from harness_rect.errors import UserError
from harness_rect.evaluation import judge

TASK = "rect_autoregressive"
ROWS: list[dict[str, Any]] = [
    {
        "prompt": "{} is moored in",
        "subject": "The brig Anka",
        "target_new": "The Hague",
        "paraphrase_prompts": ["See The brig Anka in", "The brig Anka lies in"],
        "neighborhood_prompts": ["The brig Olga is moored in", "The brig Ada is moored in"],
        "target_true": "Rome",
    },
    {"prompt": "{} plays the", "subject": "Uncle Osk", "target_new": "flute"},
    {
        "prompt": "{} plays the",
        "subject": "Aunt Ines",
        "target_new": "drum",
        "locality_prompt": "The capital of France is",  # without a reference answer
    },
]
ENDED = {True: "by a stop", False: "at the limit"}
TABLE: dict[str, Any] = {
    "The brig Anka is moored in": Answer(" Hague", True),
    "See The brig Anka in": Answer(" the hague!", True),
    "The brig Anka lies in": Answer(" The Hague, the Hague, the Hague", False),
    "The brig Olga is moored in": (Answer(" Rome", True), Answer(" Rome", True)),
    "The brig Ada is moored in": (Answer(" Rome", False), Answer(" rome", True)),
    "Uncle Osk plays the": Answer("", True),
    "Aunt Ines plays the": Answer(" drum", True),
    "The capital of France is": (Answer(" Paris", True), Answer(" Paris", True)),
}
EXPECTED = {
    "reliability": 2 / 3,
    "generalization": 1 / 2,
    "generalization_rows": 1,
    "locality": (1 / 2 + 1) / 2,
    "locality_rows": 2,
    "stopped": (3 / 5 + 1 + 1) / 3,
}


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    (tmp_path / "edits.json").write_text(json.dumps(ROWS))
    return tmp_path / "edits.json"


def test_scores_are_those_of_the_answers(edits: Path, caplog: pytest.LogCaptureFixture) -> None:
    results = evaluate(ComparingTableLM(TABLE), TASK, edits)
    assert metrics(results, TASK) == pytest.approx(EXPECTED)
    assert results["higher_is_better"][TASK]["locality"] is True
    assert f"{TASK}: locality: 1 of 3 edits lack locality_prompts and are left out" in caplog.text


def test_a_model_class_that_does_not_know_the_unedited_model_has_no_locality(edits: Path, caplog) -> None:
    table = {prompt: str(answer) for prompt, answer in TABLE.items() if isinstance(answer, str)}
    results = evaluate(TableLM(table), TASK, edits)
    found = metrics(results, TASK)
    without = {name: value for name, value in EXPECTED.items() if "locality" not in name}
    assert found == pytest.approx(without | {"stopped": 1.0})
    assert "locality need the unedited model, which this model class does not have" in caplog.text
    assert "locality: " not in caplog.text


def test_a_text_of_as_many_tokens_as_may_be_generated_has_not_ended(edits: Path) -> None:
    table = {prompt: " guitar" * 49 for prompt in TABLE} | {"Uncle Osk plays the": " guitar" * 50}
    assert metrics(evaluate(TableLM(table), TASK, edits), TASK)["stopped"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("context", "asked"),
    [(None, "Uncle Osk plays the"), ("qa", "Please answer the question:\n\nQ: Uncle Osk plays the\nA:")],
)
def test_what_is_asked(edits: Path, context: str | None, asked: str) -> None:
    model = ComparingTableLM({asked: "x"})
    given = {} if context is None else {"prompt_context": context}
    evaluate(model, TASK, Path(f"{edits}[1:2]"), **given)
    assert model.asked == [(asked, {"do_sample": False, "until": [".", "\n"], "max_gen_toks": 50})]


def test_an_unknown_context_is_refused(edits: Path) -> None:
    with pytest.raises(UserError, match="prompt_context=q: "):
        evaluate(TableLM({}), TASK, edits, prompt_context="q")


@pytest.mark.parametrize("kind", ["ComparingTableLM", "TableLM"])
def test_two_processes_find_what_one_does(edits: Path, tmp_path: Path, kind: str) -> None:
    """The first has no edit with locality prompts among its own if there are three."""
    plain = {p: [*map(str, a)] if isinstance(a, tuple) else str(a) for p, a in TABLE.items()}
    rows = [ROWS[1], ROWS[0], ROWS[1] | {"case_id": 9}]
    (tmp_path / "three.json").write_text(json.dumps(rows))
    (tmp_path / "table.json").write_text(json.dumps(plain))
    words = [f"{tmp_path}/table.json", TASK, f"{tmp_path}/three.json", f"{tmp_path}/found.json"]
    ended = run_ranks([["-m", "tests.support.table_lm", kind, *words]] * 2)
    assert [of.status for of in ended] == [0, 0], ended[0].err + ended[1].err
    alone = {"ComparingTableLM": ComparingTableLM, "TableLM": TableLM}[kind]
    expected = metrics(evaluate(alone(plain), TASK, tmp_path / "three.json"), TASK)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == pytest.approx(expected)
    assert ("locality" in found) == (kind == "ComparingTableLM")


def test_a_judge_grades_the_same_answers(
    edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path / "cache"))
    with judge_server() as server:
        given = {"judge": server.url, "judge_model": "grader"}
        results = evaluate(ComparingTableLM(TABLE), TASK, edits, **given)
        asked = [body["messages"][0]["content"] for body in server.requests[1:]]
    # The server finds an answer correct that contains the target: of Anka's two rephrased prompts one.
    expected = {"judge_reliability": 1 / 3, "judge_generalization": 1 / 2, "judge_generalization_rows": 1}
    assert metrics(results, TASK) == pytest.approx(EXPECTED | expected)
    assert len(asked) == len(set(asked)) == 5
    assert results is not None
    [anka] = [one for one in results["samples"][TASK] if one["doc_id"] == 0]
    judged = ["judge: INCORRECT"], ["judge: INCORRECT"], ["judge: CORRECT"]
    assert [of[1:] for of in anka["resps"]] == [*judged, [], []]
    assert "Expected answer: flute\nAnswer: \n" in asked[3]


def test_a_judge_that_falls_silent_leaves_its_metrics_out(
    edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judge, "RETRIES", 0)
    replies = iter([says_what_matches])

    def reply(body: dict[str, Any]) -> tuple[int, str]:
        return next(replies, lambda body: (500, ""))(body)

    with judge_server(reply) as server:
        given = {"judge": server.url, "judge_model": "grader"}
        results = evaluate(ComparingTableLM(TABLE), TASK, edits, **given)
        assert len(server.requests) == 1 + 5  # the trial, and each answer once
    assert metrics(results, TASK) == pytest.approx(EXPECTED)
    assert "no grade for 'Uncle Osk plays the': answered with status 500" in caplog.text
    assert "judge_reliability: 3 of 3 edits lack a grade and are left out" in caplog.text


@pytest.mark.parametrize("given", [{"judge": "http://localhost:1/v1"}, {"judge_model": "grader"}])
def test_a_judge_has_an_address_and_a_model(edits: Path, given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="is given without"):
        evaluate(ComparingTableLM(TABLE), TASK, edits, **given)
