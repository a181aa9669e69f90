"""The judge: what is sent, what is read from the reply, what is kept, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.judge_server import judge_server, says_what_matches

from harness_rect.errors import UserError
from harness_rect.evaluation import judge as judging
from harness_rect.evaluation.judge import Judge, read_grade


def test_an_answer_is_sent_once_with_question_and_expected_answer(tmp_path: Path) -> None:
    with judge_server() as server:
        judge = Judge(server.url + "/", "grader", tmp_path)
        assert read_grade(judge.reply("Who wrote {it}?", "Ann", "It was Ann")) is True
        assert read_grade(judge.reply("Who wrote {it}?", "Ann", "It was Bob")) is False
        asked = len(server.requests)
        again = Judge(server.url, "grader", tmp_path)
        assert read_grade(again.reply("Who wrote {it}?", "Ann", "It was Ann")) is True
        assert len(server.requests) == asked == 3  # the trial, and two answers
        sent = server.requests[1]
        assert (sent["model"], sent["temperature"]) == ("grader", 0)
        for text in ("Question: Who wrote {it}?", "Expected answer: Ann", "Answer: It was Ann"):
            assert text in sent["messages"][0]["content"]
        # Another model has grades of its own.
        other = Judge(server.url, "other", tmp_path)
        assert read_grade(other.reply("Who wrote {it}?", "Ann", "It was Ann")) is True
        assert len(server.requests) == asked + 2


def test_the_key_is_sent_only_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with judge_server() as server:
        monkeypatch.delenv(judging.KEY, raising=False)
        Judge(server.url, "a", tmp_path)
        monkeypatch.setenv(judging.KEY, "secret")
        Judge(server.url, "b", tmp_path)
    assert "Authorization" not in server.headers[0]
    assert server.headers[1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("CORRECT", True),
        ("incorrect.", False),
        ("It is not CORRECT, so: INCORRECT", False),
        ("INCORRECT? No: **Correct**", True),
        ("uncorrectable", None),
        ("", None),
    ],
)
def test_the_last_grade_in_a_reply_counts(reply: str, grade: bool | None) -> None:
    assert read_grade(reply) is grade


def test_a_busy_endpoint_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging.Retry, "get_backoff_time", lambda self: 0.0)
    statuses = iter([503, 429])

    def reply(body: dict[str, Any]) -> tuple[int, str]:
        status = next(statuses, 200)
        return says_what_matches(body) if status == 200 else (status, "")

    with judge_server(reply) as server:
        Judge(server.url, "grader", tmp_path)
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((401, "{}"), "status 401"),
        ((307, "{}"), "status 307"),
        ((200, "[" * 10_000), "not a chat completion"),
        (
            (200, json.dumps({"choices": [{"message": {"content": "CORRECT \ud800"}}]})),
            "not a chat completion",
        ),
        ((200, " " * (2**20 + 1)), "larger than 1048576 bytes"),
        ((200, "not JSON"), "not a chat completion"),
        ((200, json.dumps({"choices": []})), "not a chat completion"),
        ((200, json.dumps({"choices": [{"message": {"content": "INCORRECT"}}]})), "does not grade"),
    ],
)
def test_an_endpoint_that_does_not_work_is_refused_at_once(
    tmp_path: Path, reply: tuple[int, str], problem: str
) -> None:
    with judge_server(lambda body: reply) as server, pytest.raises(UserError, match=f"judge=http.*{problem}"):
        Judge(server.url, "grader", tmp_path)


def test_an_address_where_nobody_listens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "RETRIES", 0)
    with judge_server() as server:
        pass
    with pytest.raises(UserError, match=r"judge=http://127.*cannot be reached"):
        Judge(server.url, "grader", tmp_path)


def test_a_reply_that_comes_byte_by_byte_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "ALL_SECONDS", 0.2)
    with judge_server() as server:
        server.pause = 0.02
        with pytest.raises(UserError, match=r"judge=http.*no whole reply within 0.2 seconds"):
            Judge(server.url, "grader", tmp_path)


def test_a_damaged_file_of_grades_is_set_aside_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "grades.sqlite"
    file.write_bytes(b"no database " * 100)
    with judge_server() as server:
        Judge(server.url, "grader", tmp_path)
        assert [record.getMessage().partition(" is damaged")[0] for record in caplog.records] == [
            f"a judge's file of grades {file}"
        ]
        assert (tmp_path / "grades.sqlite.damaged").read_bytes() == b"no database " * 100
        Judge(server.url, "grader", tmp_path)
        assert len(server.requests) == 1


def test_grades_that_cannot_be_kept_are_given_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "grades.sqlite"
    file.mkdir()  # as a full disk, an OperationalError of sqlite
    with judge_server() as server:
        judge = Judge(server.url, "grader", tmp_path)
        assert read_grade(judge.reply("Who?", "Ann", "Ann")) is True
    assert [record.getMessage() for record in caplog.records] == [
        f"judge={server.url}: grades are not kept in {file}: unable to open database file"
    ]
