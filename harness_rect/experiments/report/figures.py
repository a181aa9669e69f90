"""The figures of the page: what is drawn, from which numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from harness_rect.evaluation.catalogue import EDITING_METRICS
from harness_rect.experiments.report.drawing import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    Look,
    Panel,
    Plate,
    filling,
    fitting,
)
from harness_rect.experiments.report.series import NO_REGULARIZER, Regularization, Series, Setting
from harness_rect.experiments.report.study import TIMES, Estimate, Run, Study
from harness_rect.session.report import WeightTotals, When

#: Histograms of delta: the most numbers of edits in one panel.
_MOST_LINES = 4
#: Curves: bands of more series than this would cover each other; then there are error bars.
_MOST_BANDS = 3

# -------------------------------------------------------------------------------------------------- looks


Looks = Mapping[Series | Setting, Look]


def looks(study: Study) -> Looks:
    """One look for each regularizer and for each method, the same in all figures of the page."""
    every = [series for setting in study.settings for series in study.series(setting)]
    plain = Series(Setting("", ""), Regularization())
    numbers = {order: i for i, order in enumerate(sorted({series.order for series in [*every, plain]}))}
    found: dict[Series | Setting, Look] = {series: Look.number(numbers[series.order]) for series in every}
    return found | {setting: Look.number(i) for i, setting in enumerate(study.settings)}


def number(value: float | None) -> str:
    """Three decimals, or whole numbers from 1000 on."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(point: Estimate | None) -> str:
    if point is None:
        return "-"
    if point.low is None or point.high is None:
        return number(point.value)
    return f"{number(point.value)} [{number(point.low)}, {number(point.high)}]"


# ------------------------------------------------------------------------------------------------- curves


def curves(
    study: Study, name: str, title: str, caption: str, lines: Mapping[Series, tuple[str, Look]]
) -> Plate:
    """Ability against number of edits: the mean first, then each task."""
    tasks: list[str | None] = [None, *study.tasks] if study.mean_of else list(study.tasks)
    points = {
        task: {series: drawn for series in lines if (drawn := study.curve(series, task))} for task in tasks
    }
    tasks = [task for task in tasks if points[task]]
    panels = [
        Panel(
            f"{name}-{i}",
            study.title(task),
            _curve_description(points[task], lines),
            _curve(study.title(task), points[task], lines),
        )
        for i, task in enumerate(tasks)
    ]
    rows = [
        [study.title(task), lines[series][0], str(n), interval(point)]
        for task in tasks
        for series, drawn in points[task].items()
        for n, point in drawn
    ]
    return Plate(
        name,
        title,
        caption,
        panels,
        list(lines.values()),
        header=("task", "series", "edits", "score"),
        rows=rows,
    )


Curves = Mapping[Series, Sequence[tuple[int, Estimate]]]


def _curve_description(points: Curves, lines: Mapping[Series, tuple[str, Look]]) -> str:
    ends = (
        f"{lines[series][0]}: {number(drawn[0][1].value)} at {drawn[0][0]} edits,"
        f" {number(drawn[-1][1].value)} at {drawn[-1][0]}"
        for series, drawn in points.items()
    )
    return "Score against number of edits. " + "; ".join(ends) + "."


def _curve(title: str, points: Curves, lines: Mapping[Series, tuple[str, Look]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        values = [point.value for drawn in points.values() for _, point in drawn]
        widest = max((drawn[-1][0] for drawn in points.values()), default=0)
        for place, (series, drawn) in enumerate(points.items()):
            look = lines[series][1]
            x = [n for n, _ in drawn]
            axes.plot(
                x,
                [p.value for _, p in drawn],
                color=look.color,
                ls=look.line,
                marker=look.marker,
                label=lines[series][0],
            )
            bars = [(n, p.low, p.high) for n, p in drawn if p.low is not None and p.high is not None]
            # A band needs an interval at every edited point; else each gets its own bar.
            whole = len(points) <= _MOST_BANDS and len(bars) >= max(2, sum(n > 0 for n in x))
            if whole:
                at, lows, highs = zip(*bars, strict=True)
                axes.fill_between(at, lows, highs, color=look.color, alpha=0.13, linewidth=0)
            for n, low, high in () if whole else bars:  # side by side, so that they do not overlap
                beside = n + widest * 0.009 * (place - (len(points) - 1) / 2)
                axes.plot([beside, beside], [low, high], color=look.color, lw=1.1, alpha=0.6)
        if values and min(values) >= 0 and max(values) <= 1:
            axes.set_ylim(-0.03, 1.04)
        axes.set(title=fitting(title), xlabel="number of edits")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))

    return draw


# -------------------------------------------------------------------------------- bars of editing metrics


_FULL, _HATCHED = (
    Patch(facecolor=PALETTE[2], edgecolor=PALETTE[2]),
    Patch(facecolor="none", edgecolor=PALETTE[1], hatch="////"),
)
_BARS: dict[When, Patch] = {"after": _FULL, "end": _HATCHED}


def editing_bars(study: Study, setting: Setting, name: str) -> Plate | None:
    """Reliability, generalization and locality of each series, right after each edit and at the end."""
    last = study.last(setting)
    bars = {
        (metric, when, series): point
        for metric in EDITING_METRICS
        for when in TIMES
        for series, n in last.items()
        if (point := study.editing(series, n, when, metric)) is not None
    }
    metrics = [metric for metric in EDITING_METRICS if any(key[0] == metric for key in bars)]
    if not metrics:
        return None
    labels = _labels(last)
    panels = []
    for i, metric in enumerate(metrics):
        of = {when: {s: p for (m, t, s), p in bars.items() if (m, t) == (metric, when)} for when in TIMES}
        text = "; ".join(
            f"{labels[series]}: "
            + ", ".join(
                f"{number(of[when][series].value)} {words}"
                for when, words in TIMES.items()
                if series in of[when]
            )
            for series in last
        )
        size = (4.2, 1.0 + 0.5 * len(last))
        panels.append(Panel(f"{name}-{i}", metric, f"Bars. {text}.", _bars(metric, of, labels), size))
    rows = [
        [labels[series], metric, *(interval(bars.get((metric, when, series))) for when in TIMES)]
        for series in last
        for metric in metrics
    ]
    return Plate(
        name,
        f"Editing performance, {setting.label}{_edits(last)}",
        "Means over the edits, right after each was made and of all of them at the end of the stream."
        f" {_spread_words(bars.values())}",
        panels,
        [(words, _BARS[when]) for when, words in TIMES.items()],
        header=("series", "metric", *TIMES.values()),
        rows=rows,
    )


def _bars(
    metric: str, of: Mapping[When, Mapping[Series, Estimate]], labels: Mapping[Series, str]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for shift, when in zip((-0.2, 0.2), TIMES, strict=True):
            for place, series in enumerate(labels):
                if (point := of[when].get(series)) is None:
                    continue
                axes.barh(place + shift, point.value, height=0.36, **filling(_BARS[when]))
                if point.low is not None and point.high is not None:
                    axes.plot([max(0, point.low), min(1, point.high)], [place + shift] * 2, color=INK, lw=1.2)
        axes.set_yticks(range(len(labels)), [fitting(label, 20) for label in labels.values()])
        axes.set(title=metric, xlim=(0, 1.02), ylim=(len(labels) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)

    return draw


def _labels(last: Mapping[Series, int]) -> dict[Series, str]:
    """Labels of the series, with the number of edits where it is not the same for all."""
    one = len(set(last.values())) == 1
    return {s: s.label if one else f"{s.label} ({n})" for s, n in last.items()}


def _edits(last: Mapping[Series, int]) -> str:
    numbers = set(last.values())
    if len(numbers) > 1:
        return ", each at its largest number of edits"
    [n] = numbers
    return f", {n} edit{'s' if n > 1 else ''}"


def _spread_words(points: Any) -> str:
    """What the bands and bars of a figure are."""
    words = {
        "streams": "95% t-intervals over the streams of edits",
        "range": "the range of the two streams of edits",
        "documents": "95% intervals from the standard error over documents",
        "edits": "95% intervals from the standard error over edits",
    }
    kinds = {point.spread for point in points}
    present = [text for kind, text in words.items() if kind in kinds]
    text = f"Bands and bars: {'; '.join(present)}." if present else ""
    if "none" in kinds:
        text += (
            " Without one: the standard error is 0 (all alike, which says nothing of chance) or missing (F1"
            " has one only with samples: --log_samples)."
        )
    return text.strip()


def curve_spread(study: Study, lines: Sequence[Series]) -> str:
    """The same for the curves of these series."""
    tasks = [None, *study.tasks]
    return _spread_words([p for series in lines for task in tasks for _, p in study.curve(series, task)])


# --------------------------------------------------------------------------------------- side by side


def side_by_side(study: Study, setting: Setting, name: str, styles: Looks) -> Plate | None:
    """Each task for each regularizer at one number of edits, beside the unedited model."""
    last = study.last(setting)
    if len(last) < 2:
        return None
    base = study.base(setting.model)
    labels = _labels(last)
    tasks: list[str | None] = [None, *study.tasks] if study.mean_of else list(study.tasks)
    panels: list[Panel] = []
    rows: list[list[str]] = []
    drawn: list[Estimate] = []
    for i, task in enumerate(tasks):
        points = {s: p for s, n in last.items() if (p := dict(study.curve(s, task)).get(n)) is not None}
        if not points:
            continue
        score = (base.mean if task is None else base.scores.get(task)) if base else None
        unedited = score.value if score else None
        label = study.title(task)
        text = "; ".join(f"{labels[s]} {number(p.value)}" for s, p in points.items())
        panels.append(
            Panel(
                f"{name}-{i}",
                label,
                f"Points with error bars. Unedited {number(unedited)}; {text}.",
                _dots(label, points, labels, unedited, styles),
                (4.2, 1.0 + 0.3 * len(labels)),
            )
        )
        drawn += points.values()
        rows += [[label, labels[s], interval(points.get(s)), number(unedited)] for s in last if s in points]
    return Plate(
        name,
        f"Regularizers side by side, {setting.label}{_edits(last)}",
        ("The dashed line is the unedited model. " if base else "") + _spread_words(drawn),
        panels,
        header=("task", "series", "score", "unedited"),
        rows=rows,
    )


def _dots(
    title: str,
    points: Mapping[Series, Estimate],
    labels: Mapping[Series, str],
    unedited: float | None,
    styles: Looks,
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        values = [p.value for p in points.values()] + ([] if unedited is None else [unedited])
        for place, series in enumerate(labels):
            if (point := points.get(series)) is None:
                continue
            look = styles[series]
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [place] * 2, color=look.color, lw=2)
            axes.plot(
                [point.value], [place], color=look.color, marker=look.marker, ls="", ms=8, mec=PAPER, mew=0.6
            )
        if unedited is not None:
            axes.axvline(unedited, color=MUTED, ls="--", lw=1.2, zorder=1)
        if values and min(values) >= 0 and max(values) <= 1:
            axes.set_xlim(-0.03, 1.04)
        axes.set_yticks(range(len(labels)), [fitting(label, 20) for label in labels.values()])
        axes.set(title=fitting(title), ylim=(len(labels) - 0.5, -0.5))

    return draw


# --------------------------------------------------------------------------------- abilities and edits


#: Columns of :func:`both`, after the mean's own.
BOTH = (
    "of the unedited",
    "reliability right after",
    f"of {NO_REGULARIZER}",
    "reliability at the end",
    f"of {NO_REGULARIZER}",
)


def both(study: Study, setting: Setting) -> list[list[str]]:
    """A row for each series: its label, then value and share of the abilities and of the edits.

    Shares of abilities are of the unedited model, those of edits of the same method without a regularizer.
    """
    last = study.last(setting)
    rows = []
    plain = next((series for series in last if series.is_plain), None)
    for series, n in last.items():
        cells = [study.ability(series, n)]
        cells += [study.editing(series, n, when, "reliability") for when in TIMES]
        shares: list[float | None] = [study.retained(series, n)]
        for when, edits in zip(TIMES, cells[1:], strict=True):
            whole = (
                study.editing(plain, last[plain], when, "reliability") if plain and last[plain] == n else None
            )
            shares.append(edits.value / whole.value if edits and whole and whole.value > 0 else None)
        labelled = _labels(last)[series]
        row = [labelled]
        for cell, share in zip(cells, shares, strict=True):
            row += [interval(cell), "-" if share is None else f"{100 * share:.0f}%"]
        rows.append(row)
    return rows


def trade_off(study: Study, setting: Setting, name: str, styles: Looks) -> Plate | None:
    """Mean ability against reliability, right after each edit and at the end: both must be high."""
    last = study.last(setting)
    base = study.base(setting.model)
    panels, drawn = [], []
    for i, (when, words) in enumerate(TIMES.items()):
        points = {
            series: (edits, ability)
            for series, n in last.items()
            if (edits := study.editing(series, n, when, "reliability"))
            and (ability := study.ability(series, n))
        }
        if not points:
            continue
        drawn += [point for pair in points.values() for point in pair]
        text = "; ".join(
            f"{s.label}: reliability {number(e.value)}, mean ability {number(a.value)}"
            for s, (e, a) in points.items()
        )
        level = base.mean.value if base and base.mean else None
        panels.append(
            Panel(
                f"{name}-{i}",
                words,
                f"Scatter. {text}.",
                _scatter(words, points, level, study.mean_label, styles),
                (4.2, 3.8),
            )
        )
    if not panels:
        return None
    return Plate(
        name,
        f"Abilities and edits together, {setting.label}{_edits(last)}",
        "Up: abilities are kept. Right: the edits are there. Only the upper right corner is a success: a"
        " regularizer that drops updates keeps the abilities, loses the edits and stands at the upper left. "
        + ("The dashed line is the unedited model. " if base and base.mean else "")
        + _spread_words(drawn),
        panels,
        [(_labels(last)[series], styles[series]) for series in last],
        columns=2,
        header=("series", study.mean_label.lower(), *BOTH),
        rows=both(study, setting),
    )


def _scatter(
    title: str,
    points: Mapping[Series, tuple[Estimate, Estimate]],
    level: float | None,
    ability: str,
    styles: Looks,
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for series, (x, y) in points.items():
            look = styles[series]
            if x.low is not None and x.high is not None:
                axes.plot([x.low, x.high], [y.value] * 2, color=look.color, lw=1, alpha=0.6)
            if y.low is not None and y.high is not None:
                axes.plot([x.value] * 2, [y.low, y.high], color=look.color, lw=1, alpha=0.6)
            axes.plot(
                [x.value], [y.value], color=look.color, marker=look.marker, ls="", ms=9, mec=PAPER, mew=0.6
            )
        if level is not None:
            axes.axhline(level, color=MUTED, ls="--", lw=1.2, zorder=1)
        heights = [y.value for _, y in points.values()]
        if min(heights) >= 0 and max(heights) <= 1:
            axes.set_ylim(-0.03, 1.04)
        axes.set(
            title=title, xlim=(-0.03, 1.04), xlabel="reliability", ylabel=ability[0].lower() + ability[1:]
        )

    return draw


# ------------------------------------------------------------------------------------------ weight changes


def histograms(study: Study, setting: Setting, name: str) -> Plate | None:
    """How delta = |dW / W_0| is distributed, for each series, at up to four numbers of edits."""
    from harness_rect.weight_change import LOG10_EDGES, THRESHOLDS

    bins = len(LOG10_EDGES) + 1
    panels: list[Panel] = []
    numbers: list[int] = _some(sorted({n for s in study.series(setting) for n in study.numbers(s)}))
    shades = {n: replace(Look.number(i), marker="") for i, n in enumerate(numbers)}
    for i, series in enumerate(study.series(setting)):
        shares = {n: share for n in numbers if (share := _shares(study.at(series, n), bins)) is not None}
        if shares:
            text = "; ".join(f"{n} edits: {_middle(share, LOG10_EDGES)}" for n, share in shares.items())
            panels.append(
                Panel(
                    f"{name}-{i}",
                    series.label,
                    f"Distribution of the relative change. Half of the changed elements exceed: {text}.",
                    _histogram(series.label, shares, shades, LOG10_EDGES, THRESHOLDS),
                )
            )
    if not panels:
        return None
    drawn = {n for s in study.series(setting) for n in numbers if _shares(study.at(s, n), bins) is not None}
    return Plate(
        name,
        f"How far each element moved, {setting.label}",
        "Share of all elements by delta = |dW / W|, against the unedited weight; dotted lines at the paper's"
        " 0.077 and 0.171. The outermost bins hold all beyond; elements that did not change are not drawn."
        " Means over edited weights and streams.",
        panels,
        [(f"{n} edit{'s' if n > 1 else ''}", shades[n]) for n in numbers if n in drawn],
    )


def _some(numbers: Sequence[int]) -> list[int]:
    """At most four, with the first and the last."""
    if len(numbers) <= _MOST_LINES:
        return list(numbers)
    places = np.linspace(0, len(numbers) - 1, _MOST_LINES).round().astype(int)
    return [numbers[place] for place in places]


def _shares(runs: Sequence[Run], bins: int) -> np.ndarray | None:
    """(bins,) share of all elements, the mean over weights and streams."""
    found = []
    for run in runs:
        for weight in run.weights.values():
            counts = np.asarray(weight.delta_histogram, dtype=float)
            if counts.shape == (bins,) and counts.sum() > 0:
                found.append(counts / counts.sum() * (weight.changed or 0))
    return np.mean(found, axis=0) if found else None


def _middle(shares: np.ndarray, edges: Sequence[float]) -> str:
    place = int(np.searchsorted(np.cumsum(shares), shares.sum() / 2))
    return f"about {10 ** edges[min(place, len(edges) - 1)]:.2g}"


def _histogram(
    title: str,
    shares: Mapping[int, np.ndarray],
    shades: Mapping[int, Look],
    edges: Sequence[float],
    thresholds: Sequence[float],
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        width = edges[1] - edges[0]
        outer = [edges[0] - width, *edges, edges[-1] + width]
        for n, share in shares.items():
            look = shades[n]
            axes.stairs(share, [10**edge for edge in outer], color=look.color, ls=look.line, lw=1.8)
        for threshold in thresholds:
            axes.axvline(threshold, color=MUTED, ls=":", lw=1.2)
        axes.set_xscale("log")
        axes.set(title=fitting(title), xlabel="delta", ylabel="share of elements", ylim=(0, None))
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_power))

    return draw


def _power(value: float, _: Any) -> str:
    """0.01, 1, 100, and 1e-4 below 0.001."""
    return f"{value:g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def heat_maps(study: Study, setting: Setting, name: str) -> Plate | None:
    """Where |dW| is large: the weight that changed most, for each series, on one colour scale."""
    last = study.last(setting)
    labels = _labels(last)
    chosen: dict[Series, tuple[str, np.ndarray]] = {}
    for series, n in last.items():
        maps = {
            weight: grid
            for weight, totals in study.at(series, n)[0].weights.items()
            if (grid := _grid(totals)) is not None
        }
        if maps:
            weights = study.at(series, n)[0].weights
            most = max(maps, key=lambda weight: weights[weight].manhattan_distance or 0)
            chosen[series] = most, maps[most]
    if not chosen:
        return None
    highest = max(float(grid.max()) for _, grid in chosen.values()) or 1.0
    panels = [
        Panel(
            f"{name}-{i}",
            f"{labels[series]}: {weight}",
            f"Heat map of the mean |dW|: at most {grid.max():.3g}, on average {grid.mean():.3g}.",
            _heat_map(labels[series], grid, highest),
            (4.2, 2.7),
        )
        for i, (series, (weight, grid)) in enumerate(chosen.items())
    ]
    names = ", ".join(dict.fromkeys(weight for weight, _ in chosen.values()))
    return Plate(
        name,
        f"Where the weights changed, {setting.label}{_edits(last)}",
        f"Mean |dW| over a coarse grid of {names}, rows as stored, of the first stream of each series."
        " One colour scale for all.",
        panels,
    )


def _grid(totals: WeightTotals) -> np.ndarray | None:
    """The weight's heat map; None without one, or if its rows differ in length or a value is missing."""
    if len({len(row) for row in totals.heat_map}) != 1:
        return None
    grid = np.array(totals.heat_map, dtype=float)
    return grid if grid.size and np.isfinite(grid).all() else None


def _heat_map(title: str, grid: np.ndarray, highest: float) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=highest, aspect="auto", interpolation="none")
        axes.set(title=fitting(title), xticks=[], yticks=[], xlabel="columns", ylabel="rows")
        axes.grid(visible=False)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
        bar.locator = MaxNLocator(4)
        bar.outline.set_visible(False)
        bar.update_ticks()

    return draw
