"""How far long work is, where no bar can be drawn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from harness_rect.io import progress


def test_without_a_terminal_lines_say_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "console", lambda **given: Console(file=text, width=80))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar() as bar:
        bar.get_time = lambda: now[0]
        task = bar.add_task("editing", total=40)
        for done in range(41):
            bar.update(task, completed=done)
            now[0] += 10
    lines = text.getvalue().splitlines()
    assert lines[0] == "editing: 3 of 40, about 0:06:10 left"
    assert len(lines) == 40 // 3 + 1 and "40/40" in lines[-1]
    assert max(map(len, lines)) <= 80
