"""``harness-rect demo`` and ``doctor``: what a newcomer meets first, small enough for one screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness_rect import cli
from harness_rect.cli import demo, doctor

COMMITTED = Path(__file__).parents[2] / "results" / "rect-tiny" / "rect-tiny"


def test_the_demo_prints_a_table_and_writes_the_report(tmp_path, monkeypatch, capfd):
    """Of one edit and two rows; the sweep that comes with the package is otherwise as it is."""
    small = {"edits": "tiny[1060]", "checkpoints": [0, 1], "tasks": ["rect_nli", "rect_zsre"], "limit": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(yaml.safe_load(demo.SWEEP.read_text()) | small))
    monkeypatch.setattr(demo, "SWEEP", tmp_path / "small.yaml")
    monkeypatch.setattr(demo.webbrowser, "open", lambda page: pytest.fail("nobody looks at a test"))
    assert cli.main(["demo", "--output", str(tmp_path / "out")]) == 0
    lines = capfd.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("rect-tiny after 1 edit by"))
    assert lines[start + 2].split() == ["+", "rect", "+", "random", "+", "scale"]
    assert lines[start + 3].split() == ["score", "unedited", "ROME", "0.4", "0.4", "0.8"]
    (row,) = (line for line in lines if line.strip().startswith("Reliability of the edits*"))
    assert row.split()[-5:] == ["-", "1.000", "1.000", "0.000", "1.000"]
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert (tmp_path / "out" / "report.html").is_file() and lines[-1].endswith("report.html")


@pytest.mark.parametrize(("command", "bars"), [("demo", 0), ("sweep", 0), ("stats", 1)])
def test_bars_of_other_packages_do_not_stand_beside_the_progress_of_a_demo_or_sweep(command, bars):
    """In a process of its own, as tqdm reads its settings once; of the command only the import of tqdm."""
    code = f"""
import types
from harness_rect import cli
def module_of(name):
    from tqdm import tqdm
    return types.SimpleNamespace(add_options=lambda parser: None, run=lambda given: list(tqdm([1])) and 0)
cli.module_of = module_of
cli.main([{command!r}])
"""
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.count("1/1") == bars


@pytest.mark.parametrize("screen", [True, False])
def test_the_report_is_opened_only_where_somebody_looks(screen, monkeypatch):
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(demo.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if screen:
        monkeypatch.setenv("DISPLAY", ":0")
    assert demo._has_screen() is screen
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: False)
    assert not demo._has_screen()


def runs(status: int, stderr: str = ""):
    """A stand-in for the smallest run: the results of another one, or a failure."""

    def run(command, **given):
        assert command[1:3] == ["-m", "lm_eval"] and "edited_hf" in command
        if not status:
            results = (COMMITTED / "rome" / "order0" / "edits_001" / "results.json").read_text()
            (Path(command[-1]) / "results_1.json").write_text(results)
        return subprocess.CompletedProcess(command, status, "", stderr)

    return run


@pytest.mark.parametrize(
    ("run", "variables", "status", "said"),
    [
        (runs(0), {}, 0, "finds edited_hf and the tasks; edited and evaluated in"),
        (
            runs(1, "...\nValueError: no model edited_hf"),
            {},
            1,
            "ended with 1: ValueError: no model edited_hf",
        ),
        (runs(0), {"HARNESS_RECT_AUTOLOAD": "0"}, 1, "HARNESS_RECT_AUTOLOAD=0 keeps it from finding"),
        (runs(0), {"HARNESS_RECT_CACHE": os.devnull}, 1, "that can be written to; set HARNESS_RECT_CACHE"),
    ],
)
def test_the_doctor_says_what_is_found_on_one_screen(run, variables, status, said, monkeypatch, capsys):
    before_it = []

    def watched(command, **given):
        before_it.append(capsys.readouterr().out)
        return run(command, **given)

    monkeypatch.setattr(doctor.subprocess, "run", watched)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor"]) == status
    assert all("one edit and one evaluation" in text.splitlines()[-1] for text in before_it)
    text = "".join([*before_it, capsys.readouterr().out])
    assert said in " ".join(text.split())
    assert ("FAILED" in text) == bool(status)
    assert "packages  lm_eval 0." in text and "HF_HUB_OFFLINE" in text
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 80
