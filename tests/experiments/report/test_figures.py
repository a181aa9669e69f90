"""Figures show the numbers they are given, in every form, and the same bytes every time."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.report_files import edit

from harness_rect.experiments.report.drawing import CSS_NAMES, FigureSpec, Look, Panel, inline_svg, write
from harness_rect.experiments.report.page import sections
from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.report.study import Study

RECT: dict[str, Any] = {"regularizer": "rect", "keep": 0.4}
RANDOM: dict[str, Any] = {"regularizer": "random", "keep": 0.4}


@pytest.fixture
def study(add, runs: Path) -> Study:
    add(9)
    for n, right in ((5, 7), (20, 2)):
        add(right, edit(n, (0.8, 0.1)))
        add(right + 1, edit(n, (0.7, 0.2), **RECT))
        add(9, edit(n, (0.3, 0.1), **RANDOM))
    return read_study(runs)


def specs(study: Study) -> dict[str, FigureSpec]:
    return {spec.name: spec for section in sections(study) for spec in section.figures}


def axes_of(panel: Panel):
    axes = Figure().add_subplot()
    panel.draw_on(axes)
    return axes


def test_every_section_has_its_figure(study: Study) -> None:
    names = ["together-0", "abilities-0", "regularizers-0", "editing-0", "delta-0", "heat-maps-0"]
    assert list(specs(study)) == names


def test_curves_are_drawn_through_the_scores(study: Study) -> None:
    spec = specs(study)["abilities-0"]
    assert [panel.title for panel in spec.panels[:2]] == ["Mean of the eight", "Reasoning"]
    assert len(spec.panels) == 9
    for panel in spec.panels:
        lines = {line.get_label(): line for line in axes_of(panel).lines}
        drawn = {name: lines[name].get_xydata().tolist() for name, _ in spec.legend}
        assert np.allclose(drawn["no regularizer"], [[0, 0.9], [5, 0.7], [20, 0.2]])
        assert np.allclose(drawn["RECT 40%"], [[0, 0.9], [5, 0.8], [20, 0.3]])
        assert np.allclose(drawn["Random 40%"], [[0, 0.9], [5, 0.9], [20, 0.9]])
    assert ["NLI", "RECT 40%", "20"] in [list(row[:3]) for row in spec.rows]


def test_abilities_stand_against_edits_so_that_random_is_at_the_left(study: Study) -> None:
    after, end = specs(study)["together-0"].panels
    drawn = [line for line in axes_of(after).lines if len(line.get_xydata()) == 1]
    points = [tuple(line.get_xydata()[0]) for line in drawn]
    looks = dict(specs(study)["together-0"].legend).values()
    assert [(line.get_color(), line.get_marker()) for line in drawn] == [(k.color, k.marker) for k in looks]
    assert np.allclose(points, [(0.8, 0.2), (0.7, 0.3), (0.3, 0.9)])
    points = [tuple(line.get_xydata()[0]) for line in axes_of(end).lines if len(line.get_xydata()) == 1]
    assert np.allclose(points, [(0.1, 0.2), (0.2, 0.3), (0.1, 0.9)])
    rows = specs(study)["together-0"].rows
    assert [row[2] for row in rows] == ["22%", "33%", "100%"]
    assert [row[4] for row in rows] == ["100%", "87%", "37%"]


def test_bars_are_as_long_as_the_metrics(study: Study) -> None:
    spec = specs(study)["editing-0"]
    assert [panel.title for panel in spec.panels] == ["reliability", "generalization", "locality"]
    widths = [bar.get_width() for bar in axes_of(spec.panels[0]).patches]
    assert widths == [0.8, 0.7, 0.3, 0.1, 0.2, 0.1]  # right after each edit, then at the end


def test_histograms_are_shares_of_all_elements(study: Study) -> None:
    panel = specs(study)["delta-0"].panels[0]
    stairs = axes_of(panel).patches[0].get_data()
    assert stairs.values.sum() == pytest.approx(0.5)  # half of the elements changed
    assert stairs.values[20:22] == pytest.approx([0.15, 0.35])
    assert stairs.edges[20:23] == pytest.approx([10 ** (-6 + 0.25 * i) for i in (19, 20, 21)])


def test_heat_maps_share_a_colour_scale(study: Study) -> None:
    for panel in specs(study)["heat-maps-0"].panels:
        [image] = axes_of(panel).images
        assert image.get_array().tolist() == [[0.1, 0.2], [0.3, 0.4]]
        assert image.get_clim() == (0, 0.4)


def test_regularizers_keep_their_look_in_all_figures(study: Study) -> None:
    legends = [dict(specs(study)[name].legend) for name in ("abilities-0", "together-0")]
    assert legends[0] == legends[1]


def test_neighbouring_looks_differ_in_more_than_colour() -> None:
    looks = [Look.number(i) for i in range(9)]
    for i, a in enumerate(looks):
        for b in looks[:i]:
            assert (a.color != b.color) + (a.marker != b.marker) + (a.line != b.line) >= 2


def test_inline_figures_use_the_pages_colours_and_ids_of_their_own(study: Study) -> None:
    seen: set[str] = set()
    for spec in specs(study).values():
        for i, panel in enumerate(spec.panels):
            text = str(inline_svg(panel, f"{spec.name}-{i}"))
            root = ET.fromstring(text)
            ids = [found for e in root.iter() if (found := e.get("id"))]
            assert len(ids) == len(set(ids)) and not seen & set(ids)
            seen |= set(ids)
            referred = re.findall(r'(?:url\(|href=")#([^")]+)', text)
            assert set(referred) <= set(ids)
            assert not re.findall("|".join(CSS_NAMES), text) and "var(--ink)" in text
            assert root.get("role") == "img"
            [title, description] = [e.text for e in root if e.tag.endswith(("}title", "}desc"))]
            assert title and len(description or "") > 20
            texts = {"".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")}
            assert len(texts) > 3, "text must stay text"


def test_files_for_papers_are_the_same_bytes_every_time(study: Study, tmp_path: Path) -> None:
    spec = specs(study)["together-0"]
    first, second = write(spec, tmp_path / "a"), write(spec, tmp_path / "b")
    assert [path.name for path in first] == ["together-0.svg", "together-0.png"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    svg = first[0].read_text()
    assert "<dc:date>" not in svg and "RECT 40%" in svg  # the legend comes with it
    assert first[1].read_bytes().startswith(b"\x89PNG")


def test_a_dollar_sign_is_no_formula() -> None:
    panel = Panel("$\\frac{1}$ <b>", "d" * 30, lambda axes: None)
    text = str(inline_svg(panel, "x"))
    assert "$\\frac{1}$ &lt;b&gt;" in text and "<b>" not in text
