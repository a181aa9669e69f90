"""The figures of the page, and the numbers that they are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from harness_rect.evaluation import catalogue
from harness_rect.evaluation.catalogue import EDITING_MEASURES, EDITING_PROTOCOL, Metric, Protocol
from harness_rect.experiments.report.drawing import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    FigureSpec,
    Fill,
    Look,
    Panel,
    fitting,
)
from harness_rect.experiments.report.filters import drawn_for
from harness_rect.experiments.report.series import NO_REGULARIZER, Regularization, Series, Setting
from harness_rect.experiments.report.study import TIMES, Estimate, Run, Study
from harness_rect.session.report import When
from harness_rect.weight_change import LOG10_EDGES, THRESHOLDS

#: Largest number of histograms of delta (one per number of edits) in a panel.
_MOST_LINES = 4
#: Largest number of curves with bands: more bands would cover each other, so error bars are drawn instead.
_MOST_BANDS = 3
_BARS: dict[When, Fill] = {
    "after": {"facecolor": PALETTE[2], "edgecolor": PALETTE[2], "linewidth": 1},
    "end": {"facecolor": "none", "edgecolor": PALETTE[1], "hatch": "////", "linewidth": 1},
}


def looks(study: Study) -> dict[Series | Setting, Look]:
    """One look for each regularizer and for each method, the same in all figures of the page."""
    every = [series for setting in study.settings for series in study.series(setting)]
    orders = sorted({series.order for series in [*every, Series(Setting("", ""), Regularization())]})
    found: dict[Series | Setting, Look] = {s: Look.number(orders.index(s.order)) for s in every}
    return found | {setting: Look.number(i) for i, setting in enumerate(study.settings)}


# ------------------------------------------------------------------------------------------------- words


def number(value: float | None) -> str:
    """Three decimals, or whole numbers from 1000 on."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(point: Estimate | None) -> str:
    """``0.500 [0.400, 0.600]``"""
    if point is None:
        return "-"
    ends = f" [{number(point.low)}, {number(point.high)}]" if point.ends else ""
    return number(point.value) + ends


def signed(point: Estimate | None) -> str:
    """``+0.050 [-0.010, +0.110]``"""
    if point is None:
        return "-"
    ends = f" [{point.low:+.3f}, {point.high:+.3f}]" if point.ends else ""
    return f"{point.value:+.3f}{ends}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def count(n: int, what: str) -> str:
    """``1 edit``, ``2 edits``"""
    return f"{n} {what}{'s' if n > 1 else ''}"


def _labels(last: Mapping[Series, int]) -> dict[Series, str]:
    """Labels of the series, with the number of edits if it differs between them."""
    one = len(set(last.values())) == 1
    return {s: s.label if one else f"{s.label} ({n})" for s, n in last.items()}


def _edits(last: Mapping[Series, int]) -> str:
    numbers = set(last.values())
    return (
        f", {count(max(numbers), 'edit')}" if len(numbers) == 1 else ", each at its largest number of edits"
    )


def spread_words(points: Iterable[Estimate]) -> str:
    """The meaning of the bands and error bars of a figure, for its caption."""
    words = {
        "streams": "95% t-intervals over the streams of edits",
        "range": "the range of the two streams of edits",
        "documents": "95% intervals from the standard error over documents",
        "edits": "95% intervals from the standard error over edits",
    }
    points = list(points)
    kinds = {point.spread for point in points}
    present = [text for kind, text in words.items() if kind in kinds]
    numbers = sorted({point.n for point in points})
    text = f"n = {' to '.join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))} " if numbers else ""
    text += f"stream{'s' * (numbers[-1] > 1)} of edits a point. " if numbers else ""
    text += f"Bands and bars: {'; '.join(present)}." if present else ""
    if "none" in kinds:
        text += (
            " Without one: the standard error is 0 (all alike, which says nothing of chance) or missing (F1"
            " has one only with samples: --log_samples)."
        )
    return text.strip()


# ------------------------------------------------------------------------------------------------- marks


def drawn_point(axes: Axes, x: float, y: float, look: Look, size: float) -> None:
    axes.plot([x], [y], color=look.color, marker=look.marker, ls="", ms=size, mec=PAPER, mew=0.6)


def axis_label(metric: Metric | None, up: bool = True) -> str:
    """Metric, protocol and direction, of what an axis shows: ``acc, generated``."""
    parts = [metric.name, metric.protocol] if metric else []
    return ", ".join(parts if up else [*parts, "lower is better"])


def reliability_label(words: str, protocol: Protocol = EDITING_PROTOCOL) -> str:
    """Of the reliability that the session measures; ``words`` say when."""
    return f"reliability ({protocol}) {words}"


def _unit_range(
    limits: Callable[[float, float], Any], values: Sequence[float], metric: Metric | None = None
) -> None:
    """The limits [0, 1] with a margin, for an axis whose values all lie within, unless they are no shares."""
    if values and min(values) >= 0 and max(values) <= 1 and (metric is None or metric.share):
        limits(-0.03, 1.04)


def _rows_of(axes: Axes, labels: Mapping[Series, str]) -> None:
    """One row for each series, the first at the top."""
    axes.set_yticks(range(len(labels)), [fitting(label, 20) for label in labels.values()])
    axes.set_ylim(len(labels) - 0.5, -0.5)


# ------------------------------------------------------------------------------------------------- curves


def curves(study: Study, name: str, title: str, lines: Mapping[Series, tuple[str, Look]]) -> FigureSpec:
    """Score against number of edits, for series with their labels: the mean first, then each task."""
    panels: list[Panel] = []
    rows: list[list[str]] = []
    drawn: list[Estimate] = []
    for task in study.shown:
        points = {series: curve for series in lines if (curve := study.curve(series, task))}
        if not points:
            continue
        text = "; ".join(
            f"{lines[series][0]}: {number(curve[0][1].value)} at {curve[0][0]} edits,"
            f" {number(curve[-1][1].value)} at {curve[-1][0]}"
            for series, curve in points.items()
        )
        heading, metric = study.title(task), study.metric(task)
        axis = axis_label(metric, study.improves_upwards(task))
        draw = partial(_curves, points, lines, metric, axis)
        panels.append(Panel(heading, f"Score ({axis}) against number of edits. {text}.", draw))
        for series, curve in points.items():
            rows += [[heading, lines[series][0], str(n), interval(point), axis] for n, point in curve]
            drawn += [point for _, point in curve]
    header = ("task", "series", "edits", "score", "metric")
    return FigureSpec(
        name, title, spread_words(drawn), panels, list(lines.values()), header=header, rows=rows
    )


def _curves(
    points: Mapping[Series, Sequence[tuple[int, Estimate]]],
    lines: Mapping[Series, tuple[str, Look]],
    metric: Metric | None,
    axis: str,
    axes: Axes,
) -> None:
    widest = max(curve[-1][0] for curve in points.values())
    for place, (series, curve) in enumerate(points.items()):
        with drawn_for(axes, series, f"curve{place}-"):
            bands = len(points) <= _MOST_BANDS
            _curve(curve, *lines[series], widest * 0.009 * (place - (len(points) - 1) / 2), bands, axes)
    _unit_range(axes.set_ylim, [point.value for curve in points.values() for _, point in curve], metric)
    axes.set(xlabel="number of edits", ylabel=axis)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def _curve(
    curve: Sequence[tuple[int, Estimate]], label: str, look: Look, shift: float, bands: bool, axes: Axes
) -> None:
    x = [n for n, _ in curve]
    y = [point.value for _, point in curve]
    axes.plot(x, y, color=look.color, ls=look.line, marker=look.marker, label=label)
    bars = [(n, *point.ends) for n, point in curve if point.ends]
    # A band needs an interval at every edited point; else each gets its own bar.
    if bands and len(bars) >= max(2, sum(n > 0 for n in x)):
        at, lows, highs = zip(*bars, strict=True)
        axes.fill_between(at, lows, highs, color=look.color, alpha=0.13, linewidth=0)
        return
    for n, *ends in bars:  # shifted, so that they do not overlap
        axes.plot([n + shift] * 2, ends, color=look.color, lw=1.1, alpha=0.6)


# -------------------------------------------------------------------------------- bars of editing metrics


def editing_bars(
    study: Study, setting: Setting, name: str, protocol: Protocol = EDITING_PROTOCOL
) -> FigureSpec:
    """What the session measures of each series by one protocol, right after each edit and at the end."""
    last = study.last(setting)
    labels = _labels(last)
    found = {
        metric: {
            (series, when): point
            for when in TIMES
            for series, n in last.items()
            if (point := study.editing(series, n, when, metric)) is not None
        }
        for metric in EDITING_MEASURES[protocol]
    }
    found = {metric: points for metric, points in found.items() if points}
    panels = []
    for metric, points in found.items():
        texts = []
        for series, label in labels.items():
            values = (
                f"{number(points[series, w].value)} {words}"
                for w, words in TIMES.items()
                if (series, w) in points
            )
            texts.append(f"{label}: {', '.join(values)}")
        draw = partial(_bars, points, labels)
        panels.append(Panel(metric, f"Bars. {'; '.join(texts)}.", draw, (4.2, 1.0 + 0.5 * len(last))))
    return FigureSpec(
        name,
        f"Editing performance ({protocol}), {setting.label}{_edits(last)}",
        "Means over the edits, right after each was made and of all of them at the end of the stream. "
        + spread_words(point for points in found.values() for point in points.values()),
        panels,
        [(words, _BARS[when]) for when, words in TIMES.items()],
        header=("series", "metric", *TIMES.values()),
        rows=[
            [label, metric, *(interval(points.get((series, when))) for when in TIMES)]
            for series, label in labels.items()
            for metric, points in found.items()
        ],
    )


def _bars(points: Mapping[tuple[Series, When], Estimate], labels: Mapping[Series, str], axes: Axes) -> None:
    places = {series: place for place, series in enumerate(labels)}
    for (series, when), point in points.items():
        y = places[series] + {"after": -0.2, "end": 0.2}[when]
        with drawn_for(axes, series, when):
            axes.barh(y, point.value, height=0.36, **_BARS[when])
            if point.ends:
                axes.plot([max(0, point.ends[0]), min(1, point.ends[1])], [y, y], color=INK, lw=1.2)
    _rows_of(axes, labels)
    axes.set_xlim(0, 1.02)
    axes.grid(axis="y", visible=False)


# --------------------------------------------------------------------------------------- side by side


@dataclass(frozen=True)
class _Row:
    """One metric of the series of a setting. axis: what its axis says; metric: None where it is not ours."""

    title: str
    metric: Metric | None
    axis: str
    points: Mapping[Series, Estimate]
    unedited: float | None


def side_by_side(study: Study, setting: Setting, name: str) -> FigureSpec:
    """Each task for each regularizer at one number of edits, beside the unedited model."""
    last = study.last(setting)
    base = study.base(setting.model)
    rows = []
    for task in study.shown if len(last) > 1 else ():
        points = {s: p for s, n in last.items() if (p := dict(study.curve(s, task)).get(n)) is not None}
        score = base.score(task) if base else None
        metric = study.metric(task)
        axis = axis_label(metric, study.improves_upwards(task))
        rows.append(_Row(study.title(task), metric, axis, points, score.value if score else None))
    title = f"Regularizers side by side, {setting.label}{_edits(last)}"
    return _beside(study, setting, rows, name, title)


def measures(study: Study, setting: Setting, protocol: Protocol | None, name: str) -> FigureSpec:
    """The metrics of one protocol, of tasks that are not about abilities, for each series."""
    last = study.last(setting)
    rows = []
    for task, metric in study.measures:
        if catalogue.protocol(task, metric) != protocol:
            continue
        known = catalogue.entry(task, metric)
        axis = axis_label(known, known is None or known.higher_is_better)
        found = {s: p for s, n in last.items() if (p := study.measure(s, n, (task, metric))) is not None}
        title = f"{catalogue.title(task)}: {metric}"
        rows.append(_Row(title, known, axis, found, study.unedited(last, (task, metric))))
    title = f"Edits and their consequences ({protocol}), {setting.label}{_edits(last)}"
    return _beside(study, setting, rows, name, title)


def _beside(study: Study, setting: Setting, rows: Sequence[_Row], name: str, title: str) -> FigureSpec:
    """A panel for each row, without the rows that no series has."""
    labels, styles = _labels(study.last(setting)), looks(study)
    rows = [row for row in rows if row.points]
    panels = []
    for row in rows:
        text = "; ".join(f"{labels[s]} {number(p.value)}" for s, p in row.points.items())
        description = f"Points with error bars ({row.axis}). Unedited {number(row.unedited)}; {text}."
        draw = partial(_dots, row, labels, styles)
        panels.append(Panel(row.title, description, draw, (4.2, 1.2 + 0.3 * len(labels))))
    dashed = any(row.unedited is not None for row in rows)
    return FigureSpec(
        name,
        title,
        ("The dashed line is the unedited model. " if dashed else "")
        + spread_words(point for row in rows for point in row.points.values()),
        panels,
        header=("task", "series", "score", "unedited", "metric"),
        rows=[
            [row.title, labels[s], interval(p), number(row.unedited), row.axis]
            for row in rows
            for s, p in row.points.items()
        ],
    )


def _dots(
    row: _Row, labels: Mapping[Series, str], styles: Mapping[Series | Setting, Look], axes: Axes
) -> None:
    points, unedited = row.points, row.unedited
    values = [p.value for p in points.values()] + ([] if unedited is None else [unedited])
    for place, series in enumerate(labels):
        if point := points.get(series):
            with drawn_for(axes, series):
                if point.ends:
                    axes.plot(point.ends, [place, place], color=styles[series].color, lw=2)
                drawn_point(axes, point.value, place, styles[series], 8)
    if unedited is not None:
        axes.axvline(unedited, color=MUTED, ls="--", lw=1.2, zorder=1)
    _unit_range(axes.set_xlim, values, row.metric)
    axes.set_xlabel(row.axis)
    _rows_of(axes, labels)


# --------------------------------------------------------------------------------- abilities and edits


def trade_off(study: Study, setting: Setting, name: str) -> FigureSpec:
    """Mean ability against reliability, right after each edit and at the end; both should be high."""
    last = study.last(setting)
    base = study.base(setting.model)
    level = base.mean.value if base and base.mean else None
    styles, ability = looks(study), study.mean_label
    panels: list[Panel] = []
    drawn: list[Estimate] = []
    for when, words in TIMES.items():
        points = {
            series: (x, y)
            for series, n in last.items()
            if (x := study.editing(series, n, when, "reliability")) and (y := study.ability(series, n))
        }
        if not points:
            continue
        drawn += [point for pair in points.values() for point in pair]
        text = "; ".join(
            f"{s.label}: reliability {number(x.value)}, mean ability {number(y.value)}"
            for s, (x, y) in points.items()
        )
        axis = ability[0].lower() + ability[1:]
        if metric := study.metric(None):
            axis += f", {metric.protocol}"
        draw = partial(_scatter, points, level, axis, styles)
        panels.append(Panel(words, f"Scatter. {text}.", draw, (4.2, 3.8)))
    of_plain = f"of {NO_REGULARIZER}"
    return FigureSpec(
        name,
        f"Abilities and edits together, {setting.label}{_edits(last)}",
        "Up: abilities are kept. Right: the edits are there. Only the upper right corner is a success: a"
        " regularizer that drops updates keeps the abilities, loses the edits and stands at the upper left. "
        + ("The dashed line is the unedited model. " if base and base.mean else "")
        + spread_words(drawn),
        panels,
        [(label, styles[series]) for series, label in _labels(last).items()],
        columns=2,
        header=(
            *("series", ability.lower(), "of the unedited"),
            *(column for words in TIMES.values() for column in (reliability_label(words), of_plain)),
        ),
        rows=_kept(study, last),
    )


def _kept(study: Study, last: Mapping[Series, int]) -> list[list[str]]:
    """A row for each series: label, then value and share of abilities and of edits.

    Shares of abilities are relative to the unedited model, shares of edits to the method without a
    regularizer.
    """
    rows = []
    plain = next((series for series in last if series.is_plain), None)
    for series, n in last.items():
        row = [_labels(last)[series], interval(study.ability(series, n)), percent(study.retained(series, n))]
        for when in TIMES:
            edits = study.editing(series, n, when, "reliability")
            whole = study.editing(plain, n, when, "reliability") if plain and last[plain] == n else None
            share = edits.value / whole.value if edits and whole and whole.value > 0 else None
            row += [interval(edits), percent(share)]
        rows.append(row)
    return rows


def _scatter(
    points: Mapping[Series, tuple[Estimate, Estimate]],
    level: float | None,
    ability: str,
    styles: Mapping[Series | Setting, Look],
    axes: Axes,
) -> None:
    for series, (x, y) in points.items():
        look = styles[series]
        with drawn_for(axes, series):
            if x.ends:
                axes.plot(x.ends, [y.value] * 2, color=look.color, lw=1, alpha=0.6)
            if y.ends:
                axes.plot([x.value] * 2, y.ends, color=look.color, lw=1, alpha=0.6)
            drawn_point(axes, x.value, y.value, look, 9)
    if level is not None:
        axes.axhline(level, color=MUTED, ls="--", lw=1.2, zorder=1)
    _unit_range(axes.set_ylim, [y.value for _, y in points.values()])
    axes.set(xlim=(-0.03, 1.04), xlabel=f"reliability, {EDITING_PROTOCOL}", ylabel=ability)


# ------------------------------------------------------------------------------------------ weight changes


def histograms(study: Study, setting: Setting, name: str) -> FigureSpec:
    """The distribution of delta = |dW / W_0| for each series, at up to four numbers of edits."""
    numbers = _some(sorted({n for s in study.series(setting) for n in study.numbers(s)}))
    shades = {n: replace(Look.number(i), marker="") for i, n in enumerate(numbers)}
    panels = []
    drawn: set[int] = set()
    for series in study.series(setting):
        found = {n: _shares(study.at(series, n)) for n in numbers}
        shares = {n: share for n, share in found.items() if share is not None}
        if not shares:
            continue
        text = "; ".join(f"{n} edits: {_median(share)}" for n, share in shares.items())
        description = f"Distribution of the relative change. Half of the changed elements exceed: {text}."
        draw = partial(_histogram, shares, shades)
        panels.append(Panel(series.label, description, draw))
        drawn |= shares.keys()
    return FigureSpec(
        name,
        f"How far each element moved, {setting.label}",
        "Share of all elements by delta = |dW / W|, against the unedited weight; dotted lines at the paper's"
        " 0.077 and 0.171. The outermost bins hold all beyond; elements that did not change are not drawn."
        " Means over edited weights and streams.",
        panels,
        [(count(n, "edit"), shades[n]) for n in numbers if n in drawn],
    )


def _some(numbers: Sequence[int]) -> list[int]:
    """At most four, with the first and the last."""
    places = np.linspace(0, len(numbers) - 1, min(_MOST_LINES, len(numbers))).round().astype(int)
    return [numbers[place] for place in places]


def _shares(runs: Sequence[Run]) -> np.ndarray | None:
    """Share of all elements in each bin, (bins,): the mean over weights and streams."""
    found = []
    for weight in (weight for run in runs for weight in run.edit.weights.values()):
        counts = np.asarray(weight.delta_histogram, dtype=float)
        if counts.shape == (len(LOG10_EDGES) + 1,) and counts.sum() > 0:
            found.append(counts / counts.sum() * (weight.changed or 0))
    return np.mean(found, axis=0) if found else None


def _median(shares: np.ndarray) -> str:
    place = int(np.searchsorted(np.cumsum(shares), shares.sum() / 2))
    return f"about {10 ** LOG10_EDGES[min(place, len(LOG10_EDGES) - 1)]:.2g}"


def _histogram(shares: Mapping[int, np.ndarray], shades: Mapping[int, Look], axes: Axes) -> None:
    first, second, *_, last = LOG10_EDGES
    width = second - first
    outer = [10**edge for edge in (first - width, *LOG10_EDGES, last + width)]
    for n, share in shares.items():
        axes.stairs(share, outer, color=shades[n].color, ls=shades[n].line, lw=1.8)
    for threshold in THRESHOLDS:
        axes.axvline(threshold, color=MUTED, ls=":", lw=1.2)
    axes.set_xscale("log")
    axes.set(xlabel="delta", ylabel="share of elements", ylim=(0, None))
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_power))


def _power(value: float, _: Any) -> str:
    """0.01, 1, 100, and 1e-4 below 0.001."""
    return f"{value:g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def heat_maps(study: Study, setting: Setting, name: str) -> FigureSpec:
    """Heat maps of |dW| of the weight that changed most in each series, on one colour scale."""
    last = study.last(setting)
    chosen: dict[Series, tuple[str, np.ndarray]] = {}
    for series, n in last.items():
        weights = study.at(series, n)[0].edit.weights
        maps = {weight: _grid(totals.heat_map) for weight, totals in weights.items()}
        drawable = {weight: grid for weight, grid in maps.items() if grid is not None}
        if drawable:
            most = max(drawable, key=lambda weight: weights[weight].manhattan_distance or 0)
            chosen[series] = most, drawable[most]
    highest = max((float(grid.max()) for _, grid in chosen.values()), default=0.0) or 1.0
    panels = []
    for series, (weight, grid) in chosen.items():
        label = _labels(last)[series]
        description = f"Heat map of the mean |dW|: at most {grid.max():.3g}, on average {grid.mean():.3g}."
        draw = partial(_heat_map, label, grid, highest)
        panels.append(Panel(f"{label}: {weight}", description, draw, (4.2, 2.7)))
    names = ", ".join(dict.fromkeys(weight for weight, _ in chosen.values()))
    return FigureSpec(
        name,
        f"Where the weights changed, {setting.label}{_edits(last)}",
        f"Mean |dW| over a coarse grid of {names}, rows as stored, of the first stream of each series."
        " One colour scale for all.",
        panels,
    )


def _grid(heat_map: Sequence[Sequence[float | None]]) -> np.ndarray | None:
    """A weight's heat map; None without one, or if its rows differ in length or a value is missing."""
    if len({len(row) for row in heat_map}) != 1:
        return None
    grid = np.array(heat_map, dtype=float)
    return grid if grid.size and np.isfinite(grid).all() else None


def _heat_map(title: str, grid: np.ndarray, highest: float, axes: Axes) -> None:
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=highest, aspect="auto", interpolation="none")
    axes.set(title=fitting(title), xticks=[], yticks=[], xlabel="columns", ylabel="rows")
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.locator = MaxNLocator(4)
    bar.outline.set_visible(False)
    bar.update_ticks()
