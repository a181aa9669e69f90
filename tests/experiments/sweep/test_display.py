"""What a sweep shows: how long it will take, where its time went, and a table that stands still."""

from __future__ import annotations

import io
import logging
import re
import time
from typing import Any

import pytest
from rich.console import Console

from harness_rect.experiments.sweep.clock import Clock
from harness_rect.experiments.sweep.display import Display, Row, duration, seconds_left, timing_table


def rows() -> list[Row]:
    return [
        Row(
            "m/unedited", "", 0, 1, evaluations=1, evaluations_made=1, seconds={"editing": 0, "evaluating": 4}
        ),
        Row("m/rome", "rome", 10, 2, 10, 2, {"editing": 20, "evaluating": 12}, 10, 2),
        Row("m/rome+rect", "rome", 10, 2, 5, 1, {"editing": 10, "evaluating": 4}, 5, 1, "editing"),
        Row("m/memit", "memit", 10, 2),
    ]


def console_of(**settings: Any) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, **settings), written


def test_time_left_is_what_remains_at_the_mean_times() -> None:
    # Evaluations: 20 s / 4, 3 left. ROME: 2 s an edit, 5 left; MEMIT is not timed yet: 2 s, 10 left.
    assert seconds_left(rows()) == pytest.approx(5 * 3 + 2 * 5 + 2 * 10)
    timed = rows()
    timed[3] = Row("m/memit", "memit", 10, 2, 5, 0, {"editing": 1, "evaluating": 0}, 5, 0)
    assert seconds_left(timed) == pytest.approx(5 * 3 + 2 * 5 + 0.2 * 5)


def test_time_left_is_unknown_until_an_evaluation_was_timed() -> None:
    assert seconds_left([Row("m/rome", "rome", 10, 2)]) is None


def test_a_lower_bound_is_said_until_an_edit_was_timed(caplog: pytest.LogCaptureFixture) -> None:
    """A resumed sweep finds edits made, and evaluates them first."""
    evaluated = Row("a", "rome", 10, 1, 10, 1, {"editing": 0.1, "evaluating": 4}, 0, 1)
    display = Display([evaluated, Row("b", "rome", 10, 2)], console_of()[0])
    with caplog.at_level(logging.INFO):
        display.log("a")
        display.rows[1].__dict__ |= {"edits": 5, "edits_made": 5, "seconds": {"editing": 10, "evaluating": 0}}
        display.log("b")
    assert caplog.messages == [
        "a; 1 of 3 evaluations done, at least 8 s left",
        "b; 1 of 3 evaluations done, about 18 s left",
    ]


def test_what_was_found_done_is_not_taken_for_timed() -> None:
    found = [
        Row("a", "rome", 10, 2, 10, 2),
        Row("b", "rome", 10, 1, 10, 0, {"editing": 5, "evaluating": 0}, 5),
    ]
    assert seconds_left(found) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "01:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_work_inside_other_work_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(started=97.0)
    now[0] += 1
    with clock.running("editing"):
        now[0] += 10
        with pytest.raises(ValueError), clock.running("evaluating"):
            now[0] += 20
            raise ValueError
        now[0] += 5
        assert clock.read("editing") == 15
    now[0] += 2
    assert clock.total == 41
    assert dict(clock.seconds) == {"starting": 3, "other": 3, "editing": 15, "evaluating": 20}


def test_the_table_at_the_end_shows_editing_evaluating_and_everything_else() -> None:
    console, written = console_of(width=120)
    console.print(timing_table(rows(), {"loading": 1.5, "writing": 1.0, "checking": 0.001}))
    shown = written.getvalue()
    assert "m/memit" not in shown  # this run has not touched it
    assert "besides editing and evaluating: 2.5 (5.0% of them): loading 1.5, writing 1.0" in shown


def test_the_live_table_shows_the_current_row_and_log_lines() -> None:
    console, written = console_of(force_terminal=True, width=100, height=8)
    many = [*rows(), *(Row(f"m/later{i}", "rome", 10, 2) for i in range(50))]
    display = Display(many, console)
    root = logging.getLogger()
    handlers = list(root.handlers)
    with display.shown():
        logging.getLogger("somewhere").warning("a line from [somewhere]")
        console.print(display._render())
    assert root.handlers == handlers
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", written.getvalue())
    assert "a line from [somewhere]" in shown
    assert "m/rome+rect" in shown and "5/10" in shown and "4 of 107 evaluations done" in shown
    assert "m/later49" not in shown  # no more rows than the terminal has


def test_without_a_terminal_there_are_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    console, written = console_of()
    display = Display(rows(), console)
    with display.shown(), caplog.at_level(logging.INFO):
        display.log("m/rome, 5 edits: evaluated in 3 s")
    assert written.getvalue() == ""
    assert "m/rome, 5 edits: evaluated in 3 s; 4 of 7 evaluations done, about 45 s left" in caplog.text
