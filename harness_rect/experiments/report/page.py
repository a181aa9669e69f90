"""The page: chapters of figures and tables in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import jinja2
import numpy as np

import harness_rect
from harness_rect.evaluation.catalogue import title as task_title
from harness_rect.experiments.report import figures
from harness_rect.experiments.report.drawing import Plate, inline_svg, swatch
from harness_rect.experiments.report.figures import interval, number
from harness_rect.experiments.report.series import Series, Setting
from harness_rect.experiments.report.study import TIMES, Flips, Run, Study

#: Gu et al. 2024, section 4: edits, Manhattan distance, share of elements with delta over each threshold.
PAPER = (
    (1, 9079, 0.200, 0.100),
    (5, 27072, 0.492, 0.289),
    (10, 52245, 0.674, 0.462),
    (15, 63248, 0.728, 0.522),
)


@dataclass(frozen=True)
class Table:
    """Cells are text; columns from the ``numeric``-th on are aligned right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: int = 1


@dataclass
class Section:
    """A chapter of the page. missing: what is needed, shown where the chapter is empty."""

    anchor: str
    title: str
    intro: str = ""
    plates: list[Plate] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: str = ""

    @property
    def empty(self) -> bool:
        return not (self.plates or self.tables)


def sections(study: Study) -> list[Section]:
    """The page's chapters in their order, with figures and tables; an empty one says what it needs."""
    chapters = (_abilities, _side_by_side, _editing, _together, _overfitting, _maps)
    return [chapter(study) for chapter in chapters]


def render(study: Study, chapters: Sequence[Section]) -> str:
    """The whole HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        inline_svg=inline_svg, swatch=swatch, task_title=task_title, flips_label=_flips_label
    )
    models = list(dict.fromkeys(run.model for run in study.runs))
    return environment.get_template("template.html.j2").render(
        title=f"Editing report: {', '.join(models)}",
        headline=headline(study),
        glance=_glance(study),
        runs=_runs(study),
        sections=chapters,
        flips=study.flips,
        flip_table=_flip_table(study),
        common=_common(study),
        provenance=_provenance(study),
        hparams=_hparams(study),
        notes=study.notes,
        version=harness_rect.__version__,
    )


# ------------------------------------------------------------------------------------------------- the top


def headline(study: Study) -> str:
    """What was run, in a sentence."""
    edited = [run for run in study.runs if run.series]
    count = f"{len(study.runs)} evaluation{'s' if len(study.runs) > 1 else ''}"
    if not edited:
        return f"{count}, none of a model edited by edited_hf."
    streams = max(len(study.at(run.series, run.n_edits)) for run in edited if run.series)
    most = max(run.n_edits for run in edited)
    return (
        f"{count}, {len(edited)} of edited models: {_listed([setting.label for setting in study.settings])};"
        f" up to {most} edit{'s' if most > 1 else ''},"
        f" {streams} stream{'s' if streams > 1 else ''} of edits{' at most' if streams > 1 else ''}."
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _glance(study: Study) -> Table | None:
    """Abilities and edits of every series, where the series of its setting are compared."""
    several = len({setting.model for setting in study.settings}) > 1
    rows = []
    for setting in study.settings:
        for series, n in study.last(setting).items():
            ability, kept = study.ability(series, n), study.retained(series, n)
            edits = [study.editing(series, n, when, "reliability") for when in TIMES]
            rows.append(
                [
                    f"{setting.label if several else setting.method_label}, {series.label}",
                    str(n),
                    *(number(point.value if point else None) for point in (ability, *edits)),
                ]
            )
            rows[-1].insert(3, "-" if kept is None else f"{100 * kept:.0f}%")
    header = ("series", "edits", study.mean_label.lower(), "kept", "reliability right after", "at the end")
    return Table("At a glance: what is left of abilities and of edits", header, rows) if rows else None


def _runs(study: Study) -> Table:
    """One row for each series and number of edits."""
    rows = []
    for run in study.runs:
        if run.series is None:
            mean = number(run.mean.value if run.mean else None)
            rows.append([run.model, "unedited", "", "0", "1", mean, "-", "-", "-"])
    for setting in study.settings:
        for series in study.series(setting):
            for n in study.numbers(series):
                kept = study.retained(series, n)
                rows.append(
                    [
                        setting.model,
                        setting.method_label,
                        series.label,
                        str(n),
                        str(len(study.at(series, n))),
                        interval(study.ability(series, n)),
                        "-" if kept is None else f"{100 * kept:.0f}%",
                        interval(study.editing(series, n, "after", "reliability")),
                        interval(study.editing(series, n, "end", "reliability")),
                    ]
                )
    header = ("model", "method", "regularizer", "edits", "streams", study.mean_label.lower(), "kept")
    return Table("All runs", (*header, "reliability right after", "reliability at the end"), rows, 3)


# ----------------------------------------------------------------------------------------------- chapters


def _abilities(study: Study) -> Section:
    section = Section(
        "abilities",
        "Abilities against number of edits",
        missing="evaluations of general tasks after editing: lm_eval --model edited_hf --tasks rect_suite.",
    )
    styles = figures.looks(study)
    several = len({setting.model for setting in study.settings}) > 1
    plain = {
        series: setting.label if several else setting.method_label
        for setting in study.settings
        for series in study.series(setting)
        if series.is_plain
    }
    plots: list[tuple[str, str, dict[Series, str]]] = []
    if len(plain) > 1:
        plots.append(("methods", "Methods without a regularizer", plain))
    for i, setting in enumerate(study.settings):
        plots.append((f"abilities-{i}", setting.label, {s: s.label for s in study.series(setting)}))
    for name, title, labels in plots:
        lines = {
            series: (label, styles[series.setting if name == "methods" else series])
            for series, label in labels.items()
        }
        plate = figures.curves(study, name, title, figures.curve_spread(study, list(lines)), lines)
        if plate.panels:
            section.plates.append(plate)
    return section


def _per_setting(
    section: Section, study: Study, draw: Callable[[Study, Setting, str], Plate | None], name: str
) -> Section:
    for i, setting in enumerate(study.settings):
        plate = draw(study, setting, f"{name}-{i}")
        if plate is not None and plate.panels:
            section.plates.append(plate)
    return section


def _side_by_side(study: Study) -> Section:
    section = Section(
        "regularizers",
        "Regularizers side by side",
        missing="two regularizers of one method: regularizer=rect,keep=0.4 and others in --model_args.",
    )
    draw = partial(figures.side_by_side, styles=figures.looks(study))
    return _per_setting(section, study, draw, "regularizers")


def _editing(study: Study) -> Section:
    section = Section(
        "editing",
        "Editing performance",
        missing="runs of the model class edited_hf, which measures its own edits.",
    )
    return _per_setting(section, study, figures.editing_bars, "editing")


def _together(study: Study) -> Section:
    section = Section(
        "together",
        "Abilities and edits together",
        missing="runs of edited_hf that evaluate the same general tasks (a mean, and reliability).",
    )
    draw = partial(figures.trade_off, styles=figures.looks(study))
    return _per_setting(section, study, draw, "together")


def _overfitting(study: Study) -> Section:
    section = Section(
        "overfitting",
        "How much the weights changed",
        missing="runs of edited_hf of this version, whose results hold the change of each edited weight.",
    )
    header = ("regularizer", "edits", "Manhattan distance", "changed", "delta > 0.077", "delta > 0.171")
    for setting in study.settings:
        rows = []
        for series in study.series(setting):
            for n in study.numbers(series):
                if (row := _overfitting_row(study.at(series, n))) is not None:
                    rows.append([series.label, str(n), *row])
        if rows:
            section.tables.append(Table(setting.label, header, rows))
    if section.tables:
        section.intro = (
            "The Manhattan distance is the sum of |dW| over all edited weights; shares are of their elements,"
            " with delta = |dW / W| against the unedited weight. Means over streams."
        )
        paper = [
            [str(n), f"{distance:,}", f"{100 * low:.1f}%", f"{100 * high:.1f}%"]
            for n, distance, low, high in PAPER
        ]
        caption = "For reference: Gu et al. 2024, section 4"
        section.tables.append(Table(caption, header[1:3] + header[4:], paper, 0))
    return _per_setting(section, study, figures.histograms, "delta")


def _overfitting_row(runs: Sequence[Run]) -> list[str] | None:
    weights = [weight for run in runs for weight in run.weights.values()]
    if all(weight.manhattan_distance is None for weight in weights):
        return None
    moved = [sum(w.manhattan_distance or 0 for w in run.weights.values()) for run in runs if run.weights]
    shares = [[w.share_over[limit] for w in weights if limit in w.share_over] for limit in ("0.077", "0.171")]
    return [
        f"{np.mean(moved):,.4g}" if np.mean(moved) < 1000 else f"{np.mean(moved):,.0f}",
        f"{100 * np.mean([weight.changed or 0 for weight in weights]):.1f}%",
        *(f"{100 * np.mean(values):.1f}%" if values else "-" for values in shares),
    ]


def _maps(study: Study) -> Section:
    section = Section(
        "heat-maps",
        "Heat maps of |dW|",
        missing="runs of edited_hf of this version, whose results hold a coarse picture of |dW|.",
    )
    return _per_setting(section, study, figures.heat_maps, "heat-maps")


# ---------------------------------------------------------------------------------------------- the bottom


def _common(study: Study) -> list[tuple[str, str]]:
    """What is the same in all runs that have it."""
    columns = dict.fromkeys(name for run in study.runs for name in run.provenance)
    values = {
        name: {run.provenance[name] for run in study.runs if name in run.provenance} for name in columns
    }
    return [(name, next(iter(found))) for name, found in values.items() if len(found) == 1]


def _provenance(study: Study) -> Table:
    common = {name for name, _ in _common(study)}
    columns = list(dict.fromkeys(name for run in study.runs for name in run.provenance if name not in common))
    rows = [
        [
            run.file,
            f"{run.series.setting.label}, {run.series.label}" if run.series else f"{run.model}: unedited",
            str(run.n_edits),
            _day(run.date),
            *(run.provenance.get(name, "") for name in columns),
        ]
        for run in study.runs
    ]
    header = ("file", "series", "edits", "evaluated", *columns)
    return Table("Provenance of each run", header, rows, len(header))


def _day(date: float) -> str:
    try:
        return f"{datetime.fromtimestamp(date, timezone.utc):%Y-%m-%d %H:%M} UTC" if date else ""
    except (ValueError, OverflowError, OSError):  # not a time
        return ""


def _hparams(study: Study) -> list[tuple[str, list[tuple[str, str]]]]:
    """Hyper-parameters, once for all series whose first run has the same."""
    users: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for setting in study.settings:
        for series in study.series(setting):
            run = next(run for run in study.runs if run.series == series)
            if run.hparams:
                pairs = tuple((name, str(value)) for name, value in run.hparams.items())
                users.setdefault(pairs, []).append(f"{setting.label}, {series.label}")
    return [("; ".join(names), list(pairs)) for pairs, names in users.items()]


def _flip_table(study: Study) -> Table:
    """One row for each run, one column for each task."""
    tasks = [task for task in study.tasks if any(task in flips.counts for flips in study.flips)]
    rows = []
    for flips in study.flips:
        cells = []
        for task in tasks:
            documents, lost, gained = flips.counts.get(task, (0, 0, 0))
            cells.append(f"{lost} / {gained} of {documents}" if documents else "-")
        rows.append([_flips_label(flips), *cells])
    caption = "Right to wrong / wrong to right, of all documents"
    return Table(caption, ("series", *map(task_title, tasks)), rows)


def _flips_label(flips: Flips) -> str:
    run = flips.run
    if run.series is None:
        return run.model
    edits = f"{run.n_edits} edit{'s' if run.n_edits > 1 else ''}"
    return f"{run.series.setting.label}, {run.series.label}, {edits}"
