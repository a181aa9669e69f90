"""The tables of docs/controls.md come from the sweeps, whichever of them are finished."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from support.report_files import edit, writer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the tools are not installed
from tools import controls  # noqa: E402

sys.path.pop(0)

NAMES = ("rect-tiny-llama-rome", "rect-tiny-rome")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Two sweeps were decided; their files go here."""
    for name in NAMES:
        (tmp_path / f"{name}.yaml").touch()
    monkeypatch.setattr(controls, "FOLDER", tmp_path)
    return tmp_path


def a_sweep(folder: Path, done: bool, model: str = "") -> None:
    """RECT 40% in two orders, the second of which may not be done."""
    add, entries = writer(folder), []
    for order in (None, 0, 1):
        n = 0 if order is None else 10
        path = add(9 if order is None else 5 + order, edit(n, (0.8, 0.3), regularizer="rect", keep=0.4))
        more = {} if order is None else {"regularizer": "rect", "keep": 0.4, "order": order}
        results = path.relative_to(folder).as_posix()
        entries.append({"n_edits": n, "results": results, "done": done or order != 1} | more)
    for entry in entries:
        entry["model"] = model or controls.Sweep(folder.name).model
    (folder / "sweep.json").write_text(json.dumps({"evaluations": entries}))


def test_finished_sweeps_are_collected_and_the_others_named(folder: Path):
    a_sweep(folder / "sweeps" / NAMES[0], done=False)
    a_sweep(folder / "sweeps" / NAMES[1], done=True)
    notes = controls.collect(folder / "sweeps")
    assert notes == ["rect-tiny-llama-rome: 2 of 3 evaluations are done"]
    [sweep] = controls.read(folder)
    assert (sweep.name, sweep.unedited) == ("rect-tiny-rome", 0.9)
    first, second = sweep.values["rect", 0.4, 10].values()
    assert first == {
        "ability": 0.5,
        "reliability right after": 0.8,
        "reliability at the end": 0.3,
        "generalization at the end": 0.3,
        "locality at the end": 0.7,
    }
    assert second["ability"] == 0.6
    a_sweep(folder / "sweeps" / NAMES[0], done=True, model="gpt2-xl")
    assert controls.collect(folder / "sweeps") == ["rect-tiny-llama-rome: of another model: gpt2-xl"]
    (folder / "sweeps" / NAMES[0] / "sweep.json").unlink()
    assert controls.collect(folder / "sweeps")[0].startswith("rect-tiny-llama-rome: no ")


def scores(ability: float, reliability: float) -> dict[str, float]:
    return dict.fromkeys(controls.MEASURES, reliability) | {"ability": ability}


def a_file(folder: Path, name: str) -> None:
    """RECT is better than the norm-matched control by .05 to .07, and than scale at half of the edits."""
    rows = [{"regularizer": "", "edits": 0, "ability": 0.9}]
    for order in range(3):
        where = {"order": order, "edits": 20}
        rows.append({"regularizer": "none", "keep": None} | where | scores(0.2, 0.8))
        for k in controls.STRENGTHS:
            cells = {
                "rect": scores(0.5 + order / 100, 0.8),
                "norm_matched": scores(0.45, 0.8),
                "magnitude": scores(0.5 + order / 100, 0.8),
                "scale": scores(0.2 + (1 - k) / 2, 0.8 * k),
            }
            rows += [{"regularizer": r, "keep": k} | where | of for r, of in cells.items()]
    controls.write_rows(folder / f"{name}.csv", rows)


def cells(page: str, start: str) -> list[str]:
    [line] = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_are_within_orders_and_corrected_for_the_tests_that_are_there(folder: Path):
    a_file(folder, NAMES[1])
    page = controls.page(controls.read(folder), {})
    assert "Finished: 1 of the eight sweeps. Missing: rect-tiny-llama-rome." in page
    assert "counts the 4 tests that are there, not 64" in page
    first, second, third = re.findall(r"^### \d.*?(?=^###|\Z)", page, flags=re.DOTALL | re.MULTILINE)
    half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5
    p = 2 * stats.t.sf(0.06 / 0.01 * 3**0.5, 2)
    ability, corrected, reliability, same, *_ = cells(first, "rect-tiny-rome | 20 | 0.8")[3:]
    assert ability == f"**+0.060 ± {half:.3f}**"
    assert corrected == f"{4 * p:.3f}"
    assert (reliability, same) == ("+0.000 ± 0.000", "1.000")
    assert cells(first, "rect-tiny | ability")[2:] == ["4", "4 (4)", "0 (0)", "0"]
    assert cells(first, "rect-tiny | reliability right after")[2:] == ["4", "0 (0)", "0 (0)", "4"]
    assert cells(second, "rect-tiny-rome | 20 | 0.2")[3] == "+0.000 ± 0.000"
    # Of scale's ability 0.2 is left with all edits, 0.25 with 90%, 0.325 with 75% and 0.45 with half of them.
    # RECT keeps all of them at every strength.
    decided, _, added = third.partition("Not decided beforehand")
    found = [(cell[:8], cell.endswith(" (3)")) for cell in cells(decided, "rect-tiny-rome | 20")[2:]]
    assert found == [("**+0.310", False), ("**+0.260", True), ("**+0.185", True), ("**+0.060", True)]
    assert {cell[:8] for cell in cells(added, "rect-tiny-rome | 20")[2:]} == {"**+0.310"}
    for name in NAMES:
        a_file(folder, name)
    whole, _, _ = controls.page(controls.read(folder), {}).partition("### 2.")
    assert "Missing" not in whole and cells(whole, "rect-tiny-rome | 20 | 0.8")[4] == f"{8 * p:.3f}"


def test_single_edits_stand_beside_each_other(folder: Path):
    row: dict[str, Any] = {name: 0.5 for name in ("reliability", "norm_kept", "kept_small_weight", "overlap")}
    row |= {"reliability +-": 0.1, "rank_one_residual": None, "regularizer": "rect", "keep": 0.4}
    controls.write_rows(folder / f"{NAMES[1]}{controls.SINGLE}.csv", [row])
    page = controls.page([], controls.read_single(folder))
    assert "Not run yet: rect-tiny-llama-rome" in page
    assert "| `rect` 0.4 | 0.500 ± 0.100 |" in page
    assert "| `rect` 0.4 | 0.50 / 0.50 / 0.50 / - |" in page


def test_the_tables_are_those_of_the_files():
    text = controls.PAGE.read_text("utf-8")
    assert controls.rewritten(text) == text, "run python -m tools.sweep_tables controls"
    made = controls.details(controls.read(), controls.read_single())
    assert controls.DETAILS.read_text("utf-8") == made, "run python -m tools.sweep_tables controls"
