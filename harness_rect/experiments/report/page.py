"""The page: sections of figures and tables in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import jinja2
import numpy as np

import harness_rect
from harness_rect.evaluation.catalogue import EDITING_MEASURES, EDITING_PROTOCOL
from harness_rect.evaluation.catalogue import title as task_title
from harness_rect.experiments.report import figures, frontiers, reference, verdict
from harness_rect.experiments.report.copies import latex, markdown
from harness_rect.experiments.report.drawing import FigureSpec, Panel, inline_svg, swatch
from harness_rect.experiments.report.figures import (
    count,
    interval,
    number,
    percent,
    reliability_label,
    signed,
)
from harness_rect.experiments.report.filters import filters, series_tokens, setting_tokens, style
from harness_rect.experiments.report.series import Series, Setting
from harness_rect.experiments.report.study import TIMES, Flips, Run, Study


@dataclass(frozen=True)
class Table:
    """A table of text; columns from index ``numeric`` on are aligned right.

    tags: of each row, the classes by which the page's filters hide it; or empty.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: int = 1
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A section of the page. missing: what is needed, shown where the section is empty."""

    anchor: str
    title: str
    missing: str
    figures: Sequence[FigureSpec] = ()
    tables: Sequence[Table] = ()
    intro: str = ""

    @property
    def empty(self) -> bool:
        return not (self.figures or self.tables)


def sections(study: Study, published: reference.Reference | None = None) -> list[Section]:
    """The page's sections in their order, with figures and tables; an empty one says what it needs.

    Args:
        published: numbers to set ours beside, in a section of their own.
    """

    def specs(draw: Callable[[Study, Setting, str], FigureSpec], name: str) -> list[FigureSpec]:
        drawn = [
            replace(draw(study, setting, f"{name}-{i}"), tags=setting_tokens(setting))
            for i, setting in enumerate(study.settings)
        ]
        return [spec for spec in drawn if spec.panels]

    changes = _weight_changes(study)
    return [
        Section(
            "frontiers",
            "Ability against edits over strengths",
            "a regularizer at two or more strengths: regularizer=rect,keep=0.4 and others in --model_args.",
            specs(frontiers.figure, "frontier"),
            [
                Table(caption, header, rows)
                for setting in study.settings
                for caption, header, rows in frontiers.tables(study, setting)
            ],
            intro=frontiers.HOW,
        ),
        Section(
            "together",
            "Abilities and edits together",
            "runs of edited_hf that evaluate the same general tasks (a mean, and reliability).",
            specs(figures.trade_off, "together"),
        ),
        Section(
            "abilities",
            "Abilities against number of edits",
            "evaluations of general tasks after editing: lm_eval --model edited_hf --tasks rect_suite.",
            _abilities(study),
        ),
        Section(
            "regularizers",
            "Regularizers side by side",
            "two regularizers of one method: regularizer=rect,keep=0.4 and others in --model_args.",
            specs(figures.side_by_side, "regularizers"),
        ),
        Section(
            "editing",
            "Editing performance",
            "runs of the model class edited_hf, which measures its own edits.",
            [
                *specs(figures.editing_bars, "editing"),
                *specs(partial(figures.editing_bars, protocol="generated"), "editing-generated"),
            ],
        ),
        Section(
            "consequences",
            "Edits and their consequences",
            "evaluations of tasks about the edits: lm_eval --model edited_hf --tasks rect_editing.",
            _consequences(study),
            intro="What the tasks about the edits report at the end of the stream. Metrics of different"
            " protocols are not comparable: the tokens of a given answer are predicted (teacher-forced), its"
            " probability is read, or the model generates.",
        ),
        Section(
            "overfitting",
            "How much the weights changed",
            "runs of edited_hf of this version, whose results hold the change of each edited weight.",
            specs(figures.histograms, "delta"),
            changes,
            _WEIGHT_CHANGES if changes else "",
        ),
        Section(
            "heat-maps",
            "Heat maps of |dW|",
            "runs of edited_hf of this version, whose results hold a coarse picture of |dW|.",
            specs(figures.heat_maps, "heat-maps"),
        ),
        *([_beside(study, published)] if published else []),
    ]


def render(study: Study, found: Sequence[Section], drawn: Callable[[], object] = lambda: None) -> str:
    """The whole HTML document; ``drawn`` is called after each panel, of which a page may have hundreds."""

    def counted_svg(panel: Panel, name: str) -> str:
        svg = inline_svg(panel, name)
        drawn()
        return svg

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        inline_svg=counted_svg,
        swatch=swatch,
        task_title=task_title,
        flips_label=_flips_label,
        markdown=markdown,
        latex=latex,
    )
    models = list(dict.fromkeys(run.model for run in study.runs))
    return environment.get_template("template.html.j2").render(
        title=f"Editing report: {', '.join(models)}",
        headline=headline(study),
        verdicts=[(setting_tokens(s), text) for s, text in verdict.sentences(study).items()],
        verdicts_how=verdict.HOW,
        filters=(chosen := filters(study)),
        filter_style=style(chosen),
        glance=_glance(study),
        runs=_runs(study),
        sections=found,
        flips=study.flips,
        flip_table=_flip_table(study),
        common=_common(study),
        provenance=_provenance(study),
        hparams=_hparams(study),
        notes=study.notes,
        version=harness_rect.__version__,
    )


# --------------------------------------------------------------------------------------- top of the page


def headline(study: Study) -> str:
    """What was run, in a sentence."""
    edited = [run for run in study.runs if run.series]
    evaluations = count(len(study.runs), "evaluation")
    if not edited:
        return f"{evaluations}, none of a model edited by edited_hf."
    streams = max(len(study.at(run.series, run.n_edits)) for run in edited if run.series)
    labels = [setting.label for setting in study.settings]
    named = " and ".join(filter(None, (", ".join(labels[:-1]), labels[-1])))
    return (
        f"{evaluations}, {len(edited)} of edited models:"
        f" {named if len(labels) < 4 else f'{len(labels)} pairs of model and method'};"
        f" up to {count(max(run.n_edits for run in edited), 'edit')},"
        f" {count(streams, 'stream')} of edits{' at most' if streams > 1 else ''}."
    )


def _glance(study: Study) -> Table | None:
    """Abilities and edits of each series, at the number of edits at which its setting is compared.

    The teacher-forced reliability is always there, the generated one where it was measured.
    """
    last = [(series, n) for setting in study.settings for series, n in study.last(setting).items()]
    reliabilities = [
        (protocol, metrics[0], when)
        for protocol, metrics in EDITING_MEASURES.items()
        for when in TIMES
        if protocol == EDITING_PROTOCOL or any(study.editing(s, n, when, metrics[0]) for s, n in last)
    ]
    rows = []
    for series, n in last:
        points = [study.ability(series, n)]
        points += [study.editing(series, n, when, metric) for _, metric, when in reliabilities]
        ability, *edits = (number(point.value if point else None) for point in points)
        label = f"{_setting_label(study, series.setting)}, {series.label}"
        plain = verdict.plain_of(study, series.setting)
        change = verdict.ability_difference(study, series, plain, n) if plain and plain != series else None
        abilities = [ability, percent(study.retained(series, n)), signed(change)] if study.mean_of else []
        rows.append([label, str(n), *abilities, *edits])
    labels = (reliability_label(TIMES[when], protocol) for protocol, _, when in reliabilities)
    header: tuple[str, ...] = ("series", "edits", *labels)
    if study.mean_of:
        header = (*header[:2], study.mean_label.lower(), "kept", "saved", *header[2:])
    after = ""
    if len({n for _, n in last}) == 1:  # said once, which leaves a phone the other columns
        after = f", after {count(last[0][1], 'edit')}"
        header, rows = header[:1] + header[2:], [row[:1] + row[2:] for row in rows]
    tags = [series_tokens(series) for series, _ in last]
    caption = f"At a glance{after}: what is left of {'abilities and of ' if study.mean_of else ''}edits"
    return Table(caption, header, rows, tags=tags) if rows else None


def _setting_label(study: Study, setting: Setting) -> str:
    """Without the model where it is the same for all."""
    several = len({setting.model for setting in study.settings}) > 1
    return setting.label if several else setting.method_label


def _runs(study: Study) -> Table:
    """One row for each series and number of edits."""
    rows, tags = [], []
    for run in study.runs:
        if run.series is None:
            mean = [number(run.mean.value if run.mean else None), "-"] if study.mean_of else []
            rows.append([run.model, run.loaded or "unedited", "", "0", "1", *mean, "-", "-"])
            tags.append("")
    for series, n in _points(study):
        tags.append(series_tokens(series))
        abilities = [interval(study.ability(series, n)), percent(study.retained(series, n))]
        rows.append(
            [
                series.setting.model,
                series.setting.method_label,
                series.label,
                str(n),
                str(len(study.at(series, n))),
                *(abilities if study.mean_of else []),
                *(interval(study.editing(series, n, when, "reliability")) for when in TIMES),
            ]
        )
    header: tuple[str, ...] = ("model", "method", "regularizer", "edits", "streams")
    if study.mean_of:
        header = (*header, study.mean_label.lower(), "kept")
    return Table("All runs", (*header, *map(reliability_label, TIMES.values())), rows, 3, tags)


def _points(study: Study) -> list[tuple[Series, int]]:
    """All series with each of their numbers of edits."""
    every = [series for setting in study.settings for series in study.series(setting)]
    return [(series, n) for series in every for n in study.numbers(series)]


# ----------------------------------------------------------------------------------------------- sections


def _abilities(study: Study) -> list[FigureSpec]:
    """One figure of all methods without a regularizer, then one for each setting."""
    styles = figures.looks(study)
    every = [series for setting in study.settings for series in study.series(setting)]
    plain = {s: (_setting_label(study, s.setting), styles[s.setting]) for s in every if s.is_plain}
    specs = []
    if len(plain) > 1:
        specs.append(figures.curves(study, "methods", "Methods without a regularizer", plain))
    for i, setting in enumerate(study.settings):
        lines = {series: (series.label, styles[series]) for series in study.series(setting)}
        spec = figures.curves(study, f"abilities-{i}", setting.label, lines)
        specs.append(replace(spec, tags=setting_tokens(setting)))
    return [spec for spec in specs if spec.panels]


def _consequences(study: Study) -> list[FigureSpec]:
    """One figure for each setting and protocol."""
    specs = [
        replace(
            figures.measures(study, setting, protocol, f"consequences-{i}-{j}"), tags=setting_tokens(setting)
        )
        for i, setting in enumerate(study.settings)
        for j, protocol in enumerate(study.protocols())
    ]
    return [spec for spec in specs if spec.panels]


_THRESHOLDS = ("0.077", "0.171")
_WEIGHT_CHANGES = (
    "The Manhattan distance is the sum of |dW| over all edited weights; shares are of their elements,"
    " with delta = |dW / W| against the unedited weight. Means over streams."
)


def _beside(study: Study, published: reference.Reference) -> Section:
    """The section of published numbers."""
    rows = reference.compared(study, published)
    settings = sorted({f"{p.method} on {p.model}" for p in published.values if p.edits})
    known = [list(pair) for pair in published.differences.items()]
    tables = [
        Table(
            f"Ours and the published ({protocol or 'weights'})",
            reference.HEADER,
            [row.cells for row in rows if row.protocol == protocol],
            4,
        )
        for protocol in dict.fromkeys(row.protocol for row in rows)
    ]
    tables.append(Table("Known to differ", ("what", "how"), known, 2))
    return Section(
        "reference",
        f"Beside the numbers of {published.title}",
        f"runs of a published setting, one fact an edit: {', '.join(settings)}, or the unedited model.",
        reference.specs(study, rows),
        tables if rows else [],
        "Scores of tasks at the number of edits; editing performance right after each edit.",
    )


def _weight_changes(study: Study) -> list[Table]:
    """One table for each setting, then the paper's numbers."""
    header = ("regularizer", "edits", "Manhattan distance", "changed", "delta > 0.077", "delta > 0.171")
    tables = []
    for setting in study.settings:
        points = [(series, n) for series, n in _points(study) if series.setting == setting]
        found = [(series, n, row) for series, n in points if (row := _overfitting_row(study.at(series, n)))]
        if rows := [[series.label, str(n), *row] for series, n, row in found]:
            tags = [series_tokens(series) for series, _, _ in found]
            tables.append(Table(setting.label, header, rows, tags=tags))
    if tables:
        printed = reference.read_reference("paper")
        paper = [
            [
                str(p.edits),
                f"{p.weights[reference.MANHATTAN]:,.0f}",
                *(f"{100 * p.weights[t]:.1f}%" for t in _THRESHOLDS),
            ]
            for p in printed.values
            if p.weights
        ]
        tables.append(Table(f"For reference: {printed.title}", header[1:3] + header[4:], paper, 0))
    return tables


def _overfitting_row(runs: Sequence[Run]) -> list[str] | None:
    weights = [weight for run in runs for weight in run.edit.weights.values()]
    if all(weight.manhattan_distance is None for weight in weights):
        return None
    of_runs = [run.edit.weights.values() for run in runs if run.edit.weights]
    moved = np.mean([sum(w.manhattan_distance or 0 for w in of_run) for of_run in of_runs])
    shares = [[w.share_over[limit] for w in weights if limit in w.share_over] for limit in _THRESHOLDS]
    return [
        f"{moved:,.4g}" if moved < 1000 else f"{moved:,.0f}",
        f"{100 * np.mean([weight.changed or 0 for weight in weights]):.1f}%",
        *(f"{100 * np.mean(values):.1f}%" if values else "-" for values in shares),
    ]


# ------------------------------------------------------------------------------------ bottom of the page


def _common(study: Study) -> list[tuple[str, str]]:
    """Provenance that is the same in all runs that have it."""
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
            f"{run.series.setting.label}, {run.series.label}"
            if run.series
            else f"{run.model}: {run.loaded or 'unedited'}",
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
    return f"{run.series.setting.label}, {run.series.label}, {count(run.n_edits, 'edit')}"
