"""Ability against edits over strengths: curves, what is not dominated, abilities at equal reliability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from support.report_files import edit

from harness_rect import cli
from harness_rect.experiments.frontier import Point, ability_with, all_above, not_dominated, whole
from harness_rect.experiments.report import frontiers
from harness_rect.experiments.report.page import sections
from harness_rect.experiments.report.reading import read_study


@pytest.mark.parametrize(
    ("curve", "edits", "ability"),
    [
        ([(0.8, 0.2), (0.4, 0.6)], 0.8, 0.2),
        ([(0.8, 0.2), (0.4, 0.6)], 0.6, 0.4),  # half way
        ([(0.8, 0.2), (0.4, 0.6)], 0.3, 0.6),  # all of it keeps more
        ([(0.8, 0.2), (0.4, 0.6)], 0.9, None),
        ([(0.6, 0.2), (0.8, 0.5), (0.4, 0.7)], 0.6, 0.6),  # RECT can keep more edits than the method alone
        ([(0.6, 0.2), (0.8, 0.5), (0.4, 0.1)], 0.6, 0.5),  # more of both is not worse
        ([(0.6, 0.2), (0.6, 0.5)], 0.6, 0.5),
        ([(0.2, 0.1)], 0.2, 0.1),
    ],
)
def test_the_ability_at_so_many_edits_is_the_largest_on_the_curve(curve, edits, ability):
    assert ability_with([Point(*point) for point in curve], edits) == (ability and pytest.approx(ability))


def test_a_curve_above_a_share_is_told_from_one_that_reaches_it():
    curve = [Point(0.8, 0.2), Point(0.4, 0.6)]
    assert [all_above(curve, edits) for edits in (0.9, 0.8, 0.4, 0.39)] == [False, False, False, True]


def test_a_point_is_dominated_by_as_much_of_both_and_more_of_one():
    points = [Point(*p) for p in [(0.9, 0.1), (0.9, 0.2), (0.5, 0.5), (0.4, 0.5), (0.5, 0.5), (0.1, 0.4)]]
    assert not_dominated(points) == [False, True, True, False, True, False]


@pytest.mark.parametrize(
    ("regularizer", "keep"),
    [
        *((name, 1.0) for name in ("rect", "random", "magnitude", "scale", "norm_matched")),
        ("revive", 0.0),
        *((name, None) for name in ("prune", "sphere", "none", "of_another_package")),
    ],
)
def test_curves_start_where_a_strength_changes_nothing(regularizer, keep):
    assert whole(regularizer, {}) == keep


#: regularizer, keep -> reliability right after each edit, right answers of ten; the order adds to neither.
CELLS: dict[tuple[str, float | None], tuple[float, int]] = {
    ("none", None): (0.8, 2),
    ("rect", 0.4): (0.8, 5),
    ("rect", 0.8): (0.8, 3),
    ("scale", 0.4): (0.4, 6),
    ("revive", 0.4): (0.1, 1),
    ("prune", None): (0.9, 1),
}


@pytest.fixture
def sweep(add, runs: Path) -> Path:
    """Three orders; in order k one more answer is right with RECT 40% and the reliabilities are lower."""
    add(9)
    for order in range(3):
        for (name, keep), (reliability, right) in CELLS.items():
            given: dict[str, Any] = {"regularizer": name, "keep": keep, "stream": order}
            more = order if (name, keep) == ("rect", 0.4) else 0
            add(right + more, edit(20, (reliability * (1 - order / 10), 0.1), **given))
    return runs


def test_every_regularizer_is_one_curve_from_the_method_alone_on(sweep: Path):
    study = read_study(sweep)
    [setting] = study.settings
    found = {c.label: ([s.label for s in c.series], c.own) for c in frontiers.curves(study, setting)}
    assert found == {
        "no regularizer": (["no regularizer"], 1),
        "RECT": (["no regularizer", "RECT 80%", "RECT 40%"], 2),
        "Scale": (["Scale 40%"], 1),
        "PRUNE": (["PRUNE"], 1),
        "REVIVE": (["REVIVE 40%"], 1),
    }


def test_the_figure_has_means_intervals_and_rings(sweep: Path):
    [spec] = [s for section in sections(read_study(sweep)) for s in section.figures if s.name == "frontier-0"]
    titles = [panel.title for panel in spec.panels]
    assert titles == [
        "reliability right after each edit",
        *(f"{metric} at the end" for metric in ("reliability", "generalization", "locality")),
    ]
    assert len({look.marker for _, look in spec.legend}) == len(spec.legend) == 5
    axes = Figure().add_subplot()
    spec.panels[0].draw_on(axes)
    colors = dict(spec.legend)
    lines = [line for line in axes.lines if line.get_color() == colors["RECT"].color]
    assert np.allclose(lines[0].get_xydata(), [[0.72, 0.2], [0.72, 0.3], [0.72, 0.6]])
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5  # of 5, 6 and 7 right
    assert [0.6 - half, 0.6 + half] in [pytest.approx(line.get_ydata().tolist()) for line in lines]
    half = stats.t.ppf(0.975, 2) * 0.08 / 3**0.5
    assert [0.72 - half, 0.72 + half] in [pytest.approx(line.get_xdata().tolist()) for line in lines]
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert np.allclose(np.sort([ring.get_xdata() for ring in rings], 0), [[0.72], [0.81]])
    assert [row[1] for row in spec.rows[:6] if row[-1] == "yes"] == ["RECT 40%", "PRUNE"]


def test_abilities_at_equal_reliability_are_compared_order_by_order(add, runs: Path, sweep: Path, capsys):
    for order in range(3):
        given: dict[str, Any] = {"regularizer": "scale", "keep": 0.2, "stream": order}
        add(8, edit(20, (0.6 * (1 - order / 10), 0.1), **given))
    study = read_study(runs)
    [setting] = study.settings
    (_, header, abilities), (_, _, differences) = frontiers.tables(study, setting)
    assert header == ["regularizer", "100% (0.720)", "90% (0.648)", "75% (0.540)", "50% (0.360)"]
    rows = {row[0]: row[1:] for row in abilities}
    assert list(rows) == ["no regularizer", "RECT", "Scale"]
    assert rows["no regularizer"][0].startswith("0.200")
    # RECT keeps all of the edits at both of its strengths: what it has at fewer is not known, and said.
    assert rows["RECT"] == ["0.600 [0.352, 0.848]", *["0.600 [0.352, 0.848] *"] * 3]
    # Scale goes 0.8, 0.4, 0.6 of the edits with 2, 6, 8 right: at 0.72 it is a fifth of the way to 6.
    assert [cell[:5] for cell in rows["Scale"]] == ["0.200", "0.280", "0.800", "0.800"]
    assert not any("*" in cell for cell in rows["Scale"])  # it goes down to half of them
    assert {row[0]: row[2] for row in differences} == {
        "no regularizer": "+0.400 [+0.152, +0.648] *",
        "Scale": "+0.320 [+0.072, +0.568] *",
    }
    assert cli.main(["compare", str(runs)]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert "tiny: ROME, 20 edits, 3 orders" in line and "at least 90%" in line
    assert "RECT 0.600 [0.352, 0.848] *;" in line and "minus Scale +0.320 [+0.072, +0.568] *" in line
    assert line.endswith("(*: no strength of one of them loses so many edits in every order)")


def test_orders_that_another_regularizer_lacks_are_left_out(add, runs: Path, sweep: Path):
    add(9, edit(20, (0.8, 0.1), stream=7))  # an order of the method alone
    study = read_study(runs)
    (_, _, abilities), _ = frontiers.tables(study, study.settings[0])
    assert {row[0]: row[1] for row in abilities}["RECT"] == "0.600 [0.352, 0.848]"


def test_compare_says_what_a_folder_lacks(add, runs: Path, capsys):
    add(9)
    add(5, edit(20, (0.8, 0.1)))
    assert cli.main(["compare", str(runs)]) == 2
    assert "nothing to compare; name other results after it" in capsys.readouterr().err
    assert cli.main(["compare", str(runs), "--format", "csv"]) == 2
    assert "--format: needs results to compare" in capsys.readouterr().err
