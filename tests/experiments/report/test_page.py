"""The page: complete, self-contained, well-formed, and harmless whatever the files say."""

from __future__ import annotations

import logging
import os
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from support.report_files import edit

from harness_rect import cli
from harness_rect.experiments import analysis
from harness_rect.experiments.report.page import render, sections
from harness_rect.experiments.report.reading import read_study

HOSTILE = '<script>alert("x")</script><img src=https://evil.example/a.png onerror=alert(1)>&amp;"\'{{ 7*7 }}'
VOID = {"meta", "link", "br", "img", "hr", "input", "use", "path", "rect", "image"}


class Page(HTMLParser):
    """Elements in order; fails where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (tag in {"path", "rect", "image", "use"}):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path) -> str:
    study = read_study(folder)
    return render(study, sections(study))


@pytest.fixture
def full(add, runs: Path) -> str:
    docs = [{"question": f"q{i}"} for i in range(10)]
    add(9, samples=True, docs=docs)
    for n in (5, 20):
        add(5, edit(n, (0.8, 0.1)), samples=True, docs=docs)
        add(6, edit(n, (0.7, 0.2), regularizer="rect", keep=0.4), samples=True, docs=docs)
    return page_of(runs)


def test_every_section_is_there_and_the_document_is_well_formed(full: str) -> None:
    page = Page(full)
    assert page.all("html") == [{"lang": "en"}]
    assert [s["id"] for s in page.all("section")] == [
        *("together", "abilities", "regularizers", "editing", "overfitting", "heat-maps", "answers"),
        *("runs", "left-out", "provenance"),
    ]
    assert re.findall(
        r"<dd>(.*?)</dd>", full[full.index("this is needed:") : full.index("Provenance</h2>")]
    ) == [
        "a regularizer at two or more strengths: regularizer=rect,keep=0.4 and others in --model_args.",
        "evaluations of tasks about the edits: lm_eval --model edited_hf --tasks rect_editing.",
    ]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= set(ids)


def test_nothing_is_fetched_and_nothing_runs(full: str) -> None:
    page = Page(full)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    assert not re.findall(r"@import|url\((?!#)", full)
    addresses = set(re.findall(r"https?://[^\"' <]+", full))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places


def test_tables_and_figures_are_accessible(full: str) -> None:
    page = Page(full)
    assert all(cell.get("scope") in {"col", "row"} for cell in page.all("th"))
    figures = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert len(figures) > 20 and all(a["role"] == "img" and a["aria-labelledby"] for a in figures)
    assert len(page.all("caption")) >= 4


def test_the_page_says_the_numbers_of_the_files(full: str) -> None:
    text = " ".join(" ".join(Page(full).text).split())
    assert "5 evaluations, 4 of edited models: tiny: ROME; up to 20 edits, 1 stream of edits." in text
    assert "At a glance, after 20 edits" in text
    assert "ROME, RECT 40% 0.600 67% +0.100 0.700 0.200" in text  # abilities and edits at a glance
    [verdict] = re.findall(r"tiny: ROME, 20 edits: the mean of the eight is .*? of the differences\.", text)
    verdict = re.sub(r" \[.*?\]", "", verdict)
    assert "is 0.500 without a regularizer (unedited 0.900); with RECT 40% it is 0.600 (+0.100)" in verdict
    assert "reliability (teacher-forced) right after each edit changes by -0.100; one order" in verdict
    assert "| ROME, RECT 40% | 0.600 |" in re.sub(" +", " ", text)
    assert r"ROME, RECT 40\% & 0.600 &" in re.sub(" +", " ", text)
    assert "RECT 40% 20 12.5 50.0% 60.0% 40.0%" in text  # the overfitting table
    assert "15 63,248 72.8% 52.2%" in text  # the paper's
    assert "4 / 0 of 10" in text  # answers that flipped
    assert "preset tiny" in text and "torch 2.13.0" in text and "v_lr 0.5" in text


def test_whatever_the_files_say_is_text(add, runs: Path) -> None:
    report = edit(5, (1, 0.5), hparams={HOSTILE: HOSTILE}, hparams_origin=HOSTILE, regularizer=HOSTILE)
    report["weights"] = {HOSTILE: report["weights"]["h.3.weight"]}
    report["edits_spec"] = HOSTILE
    tasks = ("rect_nli", "<i>task</i>")
    add(9, model=HOSTILE, tasks=tasks, samples=False)
    add(5, report, model=HOSTILE, tasks=tasks, samples=False)
    text = page_of(runs)
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "i"}
    assert HOSTILE in "".join(page.text)
    assert "49" not in re.findall(r"<title>(.*?)</title>", text)[0]


def test_hostile_answers_are_text(add, runs: Path) -> None:
    add({"rect_nli": 9}, tasks=("rect_nli",), samples=True)
    add({"rect_nli": 5}, edit(5, (1, 1)), tasks=("rect_nli",), samples=True)
    for samples in runs.rglob("samples_*.jsonl"):
        answer = '"</p><script>alert(1)</script>"'
        samples.write_text(
            samples.read_text(encoding="utf-8").replace('"a\u2028b"', answer), encoding="utf-8"
        )
    text = page_of(runs)
    assert "&lt;/p&gt;&lt;script&gt;" in text and "<script" not in text
    Page(text)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_names_of_files_need_not_be_text(add, runs: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    # What pytest keeps of a test's output must be text, for pytest-xdist.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    base, other = (add(right, model="org/one", tasks=("rect_nli",)) for right in (9, 8))
    other = other.rename(runs / os.fsdecode(b"results_\xff.json"))
    outputs = [tmp_path / name for name in ("r.html", "c.csv", "c.json")]
    for output in outputs:
        inputs = ("report", runs, "-o") if output == outputs[0] else ("compare", base, other, "--output")
        assert cli.main([*map(str, inputs), str(output)]) == 0
        capsys.readouterr()
        assert r"results_\udcff.json" in output.read_text(encoding="utf-8")
    assert r"results_\udcff.json" in "".join(row["file"] for row in analysis.runs(runs))


def test_sections_without_data_say_what_they_need(add, runs: Path) -> None:
    add(9, model="org/one")
    text = page_of(runs)
    Page(text)
    missing = re.findall(
        r"<dd>(.*?)</dd>", text[text.index("this is needed:") : text.index("Provenance</h2>")]
    )
    assert len(missing) == 9 and "--log_samples" in missing[-1]
    assert "1 evaluation, none of a model edited by edited_hf." in text
    assert 'href="#overfitting"' not in text


def test_without_tasks_about_abilities_no_table_has_a_column_for_them(add, runs: Path) -> None:
    add(8, edit(5, (1, 0.5)), tasks=("rect_zsre",))
    text = page_of(runs)
    Page(text)
    assert "what is left of edits" in text and "0 task" not in text and "saved</th>" not in text
    add(8, edit(5, (1, 0.5)))
    assert "what is left of abilities and of edits" in page_of(runs)


def test_results_of_an_older_version_lack_only_what_they_lack(add, runs: Path) -> None:
    report = edit(5, (1, 0.5), weights={"h.3.weight": {"manhattan_distance": 3.5, "changed": 1.0}})
    add(9)
    add(5, report)
    text = page_of(runs)
    assert "3.5</td>" in text and 'id="delta-0"' not in text and 'id="heat-maps-0"' not in text
    assert "hold a coarse picture" in text


def test_nothing_depends_on_when_it_is_made(add, runs: Path) -> None:
    add(9)
    add(5, edit(5, (1, 0.5)))
    assert page_of(runs) == page_of(runs)


# ------------------------------------------------------------------------------------------ the command


def test_the_command_writes_page_and_figures(evaluations: dict[str, Path], tmp_path: Path, capsys) -> None:
    page, folder = tmp_path / "out/report.html", tmp_path / "figures"
    source = str(evaluations["base"].parent)
    assert cli.main(["report", source, "-o", str(page), "--figures", str(folder)]) == 0
    Page(page.read_text(encoding="utf-8"))
    assert capsys.readouterr().out.startswith(f"{page}: 2 evaluations\n")
    names = {path.name for path in folder.iterdir()}
    assert {
        f"{name}-0.{form}" for name in ("abilities", "delta", "heat-maps") for form in ("svg", "png")
    } <= names


def test_wrong_use_exits_with_2_and_one_line(add, runs: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    path = add(9)
    file = tmp_path / "file"
    file.touch()
    page = str(tmp_path / "r.html")

    def refused(*arguments: object) -> str:
        assert cli.main(["report", *map(str, arguments)]) == 2
        assert not (tmp_path / "r.html").exists()
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "missing: no such file or folder" in refused(tmp_path / "missing", "-o", page)
    assert "empty: no results*.json" in refused(tmp_path / "empty", "-o", page)
    assert "is a folder" in refused(runs, "-o", tmp_path)
    assert "is a file" in refused(runs, "-o", page, "--figures", file)
    assert "cannot be created" in refused(runs, "-o", file / "r.html")
    path.write_text("{")
    assert f"{path}, line 1: malformed JSON" in refused(runs, "-o", page)
    path.write_bytes(b"\xff\xfe")
    assert f"{path}, line 1: not UTF-8" in refused(runs, "-o", page)
