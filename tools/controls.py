"""The numbers of docs/controls.md: what the eight sweeps and the single edits say, as tables.

``collect`` writes the scores of every evaluation of a finished sweep to ``results/controls/NAME.csv``;
``page`` and ``details`` are made from these files and ``NAME-single.csv`` alone.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from harness_rect.evaluation.catalogue import GENERAL
from harness_rect.experiments import results
from harness_rect.experiments.compare.significance import holm
from harness_rect.experiments.frontier import LEVELS, Point, ability_with, all_above
from harness_rect.io.files import written_whole
from harness_rect.session.report import When
from tools.docs_tables import ROOT, markdown

FOLDER = ROOT / "results" / "controls"
PAGE, DETAILS = ROOT / "docs" / "controls.md", FOLDER / "tables.md"
SINGLE = "-single"
STRENGTHS = (0.8, 0.6, 0.4, 0.2)
ABILITY, AFTER = "ability", "reliability right after"
#: Columns of the files: what is measured, and the editing metric and time where it is of the edits.
MEASURES: dict[str, tuple[When, str] | None] = {
    ABILITY: None,
    AFTER: ("after", "reliability"),
    "reliability at the end": ("end", "reliability"),
    "generalization at the end": ("end", "generalization"),
    "locality at the end": ("end", "locality"),
}
#: What Holm's correction was decided for.
CORRECTED = (ABILITY, AFTER)
#: (regularizer, strength, number of edits)
Cell = tuple[str, float | None, int]


@dataclass
class Sweep:
    """One sweep. values: cell -> order -> measure -> value. unedited: ability of the unedited model."""

    name: str
    values: dict[Cell, dict[int, dict[str, float]]] = field(default_factory=dict)
    unedited: float = math.nan

    @property
    def model(self) -> str:
        return "rect-tiny-llama" if self.name.startswith("rect-tiny-llama") else "rect-tiny"

    @property
    def counts(self) -> list[int]:
        return sorted({edits for _, _, edits in self.values})

    def differences(self, one: Cell, other: Cell, measure: str) -> list[float]:
        """The first minus the second in each order that both have."""
        ours, theirs = self.values.get(one, {}), self.values.get(other, {})
        return [
            ours[order][measure] - theirs[order][measure] for order in sorted(ours.keys() & theirs.keys())
        ]

    def curve(self, regularizer: str, edits: int, order: int) -> list[Point]:
        """Reliability right after each edit, and ability, from the method alone on over the strengths."""
        cells = [("none", None, edits), *((regularizer, k, edits) for k in STRENGTHS)]
        return [Point(of[AFTER], of[ABILITY]) for of in (self.values[cell][order] for cell in cells)]

    def at_a_share(self, edits: int, share: float) -> tuple[list[float], int]:
        """Ability of RECT minus that of scale in each order, with this share of plain reliability.

        And in how many orders all strengths of RECT keep more of the edits.
        """
        found, above = [], 0
        for order, plain in self.values[("none", None, edits)].items():
            level = share * plain[AFTER]
            rect, scale = (self.curve(name, edits, order) for name in ("rect", "scale"))
            found.append(_on(rect, level) - _on(scale, level))
            above += all_above(rect, level)
        return found, above

    def at_its_own(self, edits: int, k: float) -> list[float]:
        """Ability of RECT at k minus that of scale in each order, with the reliability of RECT at k.

        Where that is more than scale has at any strength, with the largest of scale.
        """
        found = []
        for order, rect in self.values[("rect", k, edits)].items():
            scale = self.curve("scale", edits, order)
            level = min(rect[AFTER], max(point.edits for point in scale))
            found.append(rect[ABILITY] - _on(scale, level))
        return found


def _on(curve: Sequence[Point], level: float) -> float:
    """The largest ability on a curve with at least this reliability, which the curve has somewhere."""
    ability = ability_with(curve, level)
    assert ability is not None
    return ability


# --------------------------------------------------------------------------------------- from sweeps to files


def names() -> list[str]:
    """Of the eight sweeps that were decided."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def collect(sweeps: Path) -> list[str]:
    """Write the file of every finished sweep below a folder; a line on each of the others."""
    notes = []
    for name in names():
        index = sweeps / name / "sweep.json"
        if not index.is_file():
            notes.append(f"{name}: no {index}")
            continue
        entries = json.loads(index.read_text(encoding="utf-8"))["evaluations"]
        done = sum(entry["done"] for entry in entries)
        if done < len(entries):
            notes.append(f"{name}: {done} of {len(entries)} evaluations are done")
            continue
        if models := {entry["model"] for entry in entries} - {Sweep(name).model}:
            notes.append(f"{name}: of another model: {', '.join(sorted(models))}")
            continue
        write_rows(FOLDER / f"{name}.csv", [_row(entry, index.parent) for entry in entries])
    return notes


def _row(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    one = results.load(folder / entry["results"])
    place = {"regularizer": entry.get("regularizer", ""), "keep": entry.get("keep")}
    row = place | {"order": entry.get("order"), "edits": entry["n_edits"]}
    for name, source in MEASURES.items():
        if source is None:
            row[name] = one.scores(GENERAL.name)[one.headline(GENERAL.name)].value
        elif one.edit is not None and entry["n_edits"]:
            when, metric = source
            row[name] = one.edit.averages(when)[metric]
    return row


def write_rows(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file with the keys of all rows as columns, numbers with five decimals."""
    with written_whole(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(n for row in rows for n in row), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


def read(folder: Path = FOLDER) -> list[Sweep]:
    """All sweeps that have a file."""
    found = []
    for name in names():
        path = folder / f"{name}.csv"
        if path.is_file():
            found.append(Sweep(name))
            for row in _rows(path):
                if row["regularizer"] == "":
                    found[-1].unedited = float(row[ABILITY])
                    continue
                cell = row["regularizer"], _number(row["keep"]), int(row["edits"])
                values = {measure: float(row[measure]) for measure in MEASURES}
                found[-1].values.setdefault(cell, {})[int(row["order"])] = values
    return found


def read_single(folder: Path = FOLDER) -> dict[str, list[dict[str, str]]]:
    """name of a sweep -> its rows of single edits."""
    files = ((name, folder / f"{name}{SINGLE}.csv") for name in names())
    return {name: _rows(path) for name, path in files if path.is_file()}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float | None:
    return float(text) if text else None


# ------------------------------------------------------------------------------------------------ statistics


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval of Student's t; NaN of a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def p_value(differences: Sequence[float]) -> float | None:
    """Of the paired t-test that belongs to :func:`interval`; None with fewer than two orders."""
    if len(differences) < 2:
        return None
    spread, mean = stdev(differences), fmean(differences)
    if spread < 1e-12:  # alike in all orders
        return 1.0 if abs(mean) < 1e-12 else 0.0
    return float(2 * stats.t.sf(abs(mean) / spread * math.sqrt(len(differences)), len(differences) - 1))


def _differs(differences: Sequence[float]) -> int:
    """1 or -1 if the interval of the mean excludes 0, else 0."""
    mean, half = interval(differences)
    return 0 if not abs(mean) > half else 1 if mean > 0 else -1


# ---------------------------------------------------------------------------------------------------- tables


def _value(values: Sequence[float], sign: str = "") -> str:
    mean, half = interval(values)
    text = f"{mean:{sign}.3f} ± {half:.3f}"
    return f"**{text}**" if sign and _differs(values) else text


def _p(value: float | None) -> str:
    return "-" if value is None else "<.001" if value < 0.001 else f"{value:.3f}"


def _label(regularizer: str, keep: float | str | None) -> str:
    return f"`{regularizer}`" + (f" {float(keep):g}" if keep not in (None, "") else "")


def page(sweeps: Sequence[Sweep], single: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The part of docs/controls.md that is made from the files."""
    missing = [name for name in names() if name not in {sweep.name for sweep in sweeps}]
    parts = []
    if missing:
        tests = sum(len(sweep.counts) for sweep in sweeps) * len(STRENGTHS)
        parts.append(
            f"Finished: {len(sweeps)} of the eight sweeps. Missing: {', '.join(missing)}."
            + (f" Holm's correction counts the {tests} tests that are there, not 64." if sweeps else "")
        )
    if sweeps:
        orders = sorted({len(of) for sweep in sweeps for of in sweep.values.values()})
        shown = " to ".join(str(n) for n in dict.fromkeys((orders[0], orders[-1])))
        parts += [
            f"Every ± is half of a 95% interval of Student's t over {shown} orders; bold: the interval"
            " excludes 0. Every setting of every sweep: [tables](../results/controls/tables.md). Unedited,"
            f" the mean of the eight is {_unedited(sweeps)}.",
            "### 1. RECT against `norm_matched`, at the same k",
            _counts(sweeps),
            _differences(sweeps, "norm_matched", corrected=True),
            "### 2. RECT against `magnitude`, at the same k",
            _differences(sweeps, "magnitude", corrected=False),
            "### 3. RECT against `scale`, at equal reliability right after each edit",
            "Ability of RECT minus that of `scale`, with at least this share of the reliability of the method"
            " without a regularizer, as was decided. In brackets: in how many orders no strength of RECT"
            " loses so many edits. There RECT has more of the edits than was asked for, and `scale` has not.",
            markdown(
                ["sweep", "edits", *(f"{share:.0%}" for share in LEVELS)],
                [
                    [s.name, str(n), *(_at_a_share(s, n, share) for share in LEVELS)]
                    for s in sweeps
                    for n in s.counts
                ],
            ),
            "Not decided beforehand, but added because of these brackets: ability of RECT at k minus that of"
            " `scale` with the reliability of RECT at this k in the same order (where that is more than"
            " `scale` has at any strength: with the largest of `scale`).",
            markdown(
                ["sweep", "edits", *(f"k = {k:g}" for k in STRENGTHS)],
                [
                    [s.name, str(n), *(_value(s.at_its_own(n, k), "+") for k in STRENGTHS)]
                    for s in sweeps
                    for n in s.counts
                ],
            ),
        ]
    return "\n\n".join([*parts, *_single(single)])


def _at_a_share(sweep: Sweep, edits: int, share: float) -> str:
    differences, above = sweep.at_a_share(edits, share)
    return _value(differences, "+") + (f" ({above})" if above else "")


def _unedited(sweeps: Sequence[Sweep]) -> str:
    models = {sweep.model: sweep.unedited for sweep in sweeps}
    return ", ".join(f"{value:.3f} ({model})" for model, value in models.items())


def _tests(sweeps: Sequence[Sweep], against: str) -> dict[str, list[list[float]]]:
    """measure -> differences of RECT from another regularizer in each test, in the order of the rows."""
    return {
        measure: [
            s.differences(("rect", k, n), (against, k, n), measure)
            for s in sweeps
            for n in s.counts
            for k in STRENGTHS
        ]
        for measure in MEASURES
    }


def _differences(sweeps: Sequence[Sweep], against: str, corrected: bool) -> str:
    """RECT minus another regularizer; p-values by Holm where corrected."""
    tests = _tests(sweeps, against)
    places = [[s.name, str(n), f"{k:g}"] for s in sweeps for n in s.counts for k in STRENGTHS]
    header = ["sweep", "edits", "k"]
    columns: list[list[str]] = []
    for measure, differences in tests.items():
        header.append(measure)
        columns.append([_value(each, "+") for each in differences])
        if corrected and measure in CORRECTED:
            header.append("p (Holm)")
            columns.append([_p(p) for p in holm([p_value(each) for each in differences])])
    return markdown(header, [place + list(cells) for place, *cells in zip(places, *columns, strict=True)])


def _counts(sweeps: Sequence[Sweep]) -> str:
    """In how many tests of the first comparison RECT is better, the same or worse, for each model."""
    tests = _tests(sweeps, "norm_matched")
    places = [(s, n) for s in sweeps for n in s.counts for _ in STRENGTHS]
    corrected = {m: holm([p_value(each) for each in tests[m]]) for m in CORRECTED}
    rows = []
    for model in dict.fromkeys(s.model for s in sweeps):
        chosen = [i for i, (s, _) in enumerate(places) if s.model == model]
        for measure in MEASURES:
            signs = [_differs(tests[measure][i]) for i in chosen]
            cells = [str(signs.count(sign)) for sign in (1, -1)]
            if measure in corrected:
                p = [corrected[measure][i] for i in chosen]
                left = [sign for sign, of in zip(signs, p, strict=True) if of is not None and of < 0.05]
                cells = [f"{signs.count(sign)} ({left.count(sign)})" for sign in (1, -1)]
            rows.append([model, measure, str(len(chosen)), *cells, str(signs.count(0))])
    header = [
        "model",
        "measure",
        "tests",
        "RECT more (after Holm)",
        "RECT less (after Holm)",
        "no difference",
    ]
    return markdown(header, rows)


def _single(single: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    missing = [name for name in names() if name not in single]
    parts = ["### Single edits"]
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)} (`python -m tools.single_edits`).")
    if single:
        parts += [
            "Reliability of the edits `tiny[100:300]`, each on the unedited model (`batch10`: in batches of"
            " ten).",
            _across(single, lambda row: _with_half(row, "reliability")),
            "### What is left of single updates",
            "Of the same updates: norm of dW' / norm of dW; the share of the kept elements whose weight is"
            " smaller than the median; the overlap of dW' with the leading direction of dW; the share of the"
            " norm of dW' outside its own leading direction. `harness_rect.experiments.masks` defines them.",
            _across(single, lambda row: " / ".join(_short(row[name]) for name in _LEFT)),
        ]
    return parts


_LEFT = ("norm_kept", "kept_small_weight", "overlap", "rank_one_residual")


def _across(
    single: Mapping[str, Sequence[Mapping[str, str]]], cell: Callable[[Mapping[str, str]], str]
) -> str:
    """One row for each regularizer and strength, one column for each sweep."""
    labels = dict.fromkeys(
        _label(row["regularizer"], row["keep"]) for rows in single.values() for row in rows
    )
    columns = [{_label(r["regularizer"], r["keep"]): cell(r) for r in rows} for rows in single.values()]
    return markdown(
        ["regularizer", *single], [[label, *(of.get(label, "") for of in columns)] for label in labels]
    )


def _with_half(row: Mapping[str, str], name: str) -> str:
    return f"{float(row[name]):.3f} ± {float(row[f'{name} +-']):.3f}" if row[name] else "-"


def _short(text: str) -> str:
    return f"{float(text):.2f}" if text else "-"


def details(sweeps: Sequence[Sweep], single: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The page of all settings: for each sweep and number of edits every measure, then the single edits."""
    parts = [
        "# Every setting of the controls",
        "Made by `python -m tools.sweep_tables controls`; [what it is about](../../docs/controls.md). Means"
        " over orders (single edits: over edits) ± half of the 95% interval of Student's t.",
    ]
    for sweep in sweeps:
        for n in sweep.counts:
            rows = [
                [_label(regularizer, keep), *(_value([of[m] for of in orders.values()]) for m in MEASURES)]
                for (regularizer, keep, edits), orders in sweep.values.items()
                if edits == n
            ]
            parts += [f"## {sweep.name}, {n} edits", markdown(["regularizer", *MEASURES], rows)]
    for name, of in single.items():
        measures = ("reliability", "generalization", "locality", *_LEFT)
        lines = [[_label(r["regularizer"], r["keep"]), *(_with_half(r, m) for m in measures)] for r in of]
        parts += [f"## {name}, single edits", markdown(["regularizer", *measures], lines)]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------- the documents

BEGIN, END = "<!-- controls -->\n", "<!-- end of controls -->"


def rewritten(text: str) -> str:
    """docs/controls.md with its tables as the files have them now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{page(read(), read_single())}\n\n{END}{after}"


def write_documents() -> Iterable[Path]:
    """Write the tables into docs/controls.md and results/controls/tables.md."""
    for path, text in ((PAGE, rewritten(PAGE.read_text("utf-8"))), (DETAILS, details(read(), read_single()))):
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        yield path
