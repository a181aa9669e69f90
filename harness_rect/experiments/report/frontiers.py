"""Ability against edits over the strengths of each regularizer: the figure, the tables, and one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from harness_rect.evaluation.catalogue import EDITING_METRICS, EDITING_PROTOCOL
from harness_rect.experiments.frontier import LEVELS, Point, ability_with, all_above, not_dominated, whole
from harness_rect.experiments.report.drawing import INK, MUTED, FigureSpec, Look, Panel
from harness_rect.experiments.report.figures import (
    count,
    drawn_point,
    interval,
    number,
    percent,
    reliability_label,
    signed,
    spread_words,
)
from harness_rect.experiments.report.filters import drawn_for
from harness_rect.experiments.report.series import Regularization, Series, Setting
from harness_rect.experiments.report.study import TIMES, Estimate, Study, estimate
from harness_rect.experiments.results import Score
from harness_rect.session.report import When

#: What is left of the edits, one panel each.
EDITS: tuple[tuple[When, str], ...] = (
    ("after", "reliability"),
    *(("end", metric) for metric in EDITING_METRICS),
)
#: How the tables are made.
HOW = (
    "A strength is the setting keep: the share kept, lambda, or tau. The tables answer what ability a"
    " regularizer leaves if some of the edits may be lost. In each order of the edits, points of neighbouring"
    " strengths are joined by straight lines, and of all places on them whose reliability right after each"
    " edit is at least the given share of that without a regularizer in the same order, the one with the"
    " largest ability is taken. A star: in one order or more no strength of it (or of one of the two) loses"
    " so many edits, so that it has more reliability there than was asked for, and its ability at less is not"
    " known. Intervals are 95% t-intervals of these values, or of their differences, over"
    " the orders (without one: fewer than three orders, or all alike)."
)
#: The share of the edits at which a line compares curves.
_LINE = 0.9


@dataclass(frozen=True)
class Curve:
    """A regularizer over its strengths.

    series: by strength, from the method without a regularizer on where the curve starts there.
    own: how many of them are of the regularizer itself.
    """

    label: str
    series: tuple[Series, ...]
    own: int


def curves(study: Study, setting: Setting) -> list[Curve]:
    """All regularizers of a setting, those of one strength too, and the method without one."""
    groups: dict[tuple[Regularization, str], dict[Series, float | None]] = {}
    for series in study.series(setting):
        settings = tuple(pair for pair in series.regularizer.settings if pair[0] != "keep")
        strength = _settings(study, series).get("keep")
        group = replace(series.regularizer, settings=settings), series.hparams
        groups.setdefault(group, {})[series] = strength
    found = []
    for (regularizer, hparams), strengths in groups.items():
        label = Series(setting, regularizer, hparams).label
        members, start = list(strengths), None
        if len(members) > 1:
            start = whole(regularizer.name, _settings(study, members[0]))
            members.sort(key=lambda series: abs((strengths[series] or 0) - (1 if start is None else start)))
        plain = Series(setting, Regularization(), hparams)
        first = [plain] if start is not None and study.numbers(plain) else []
        found.append(Curve(label, (*first, *members), len(members)))
    return found


def _settings(study: Study, series: Series) -> dict[str, Any]:
    return next(run.edit.settings for run in study.runs if run.series == series)


# ---------------------------------------------------------------------------------------------- the figure


def figure(study: Study, setting: Setting, name: str) -> FigureSpec:
    """Mean ability against what is left of the edits; without panels where no regularizer has a curve."""
    last = study.last(setting)
    # Those of one strength come last, so that the colours of the curves all differ.
    found = sorted(curves(study, setting), key=lambda curve: curve.own == 1 and not curve.series[0].is_plain)
    styles = {curve: Look.number(i) for i, curve in enumerate(found)}
    base = study.base(setting.model)
    level = base.mean.value if base and base.mean else None
    ability = study.mean_label[0].lower() + study.mean_label[1:]
    if known := study.metric(None):
        ability += f", {known.protocol}"
    panels, rows, drawn = [], [], []
    for when, metric in EDITS if any(curve.own > 1 for curve in found) else ():
        points = {
            series: (x, y)
            for curve in found
            for series in curve.series
            if (x := study.editing(series, last[series], when, metric))
            and (y := study.ability(series, last[series]))
        }
        if not points:
            continue
        title = f"{metric} {TIMES[when]}"
        means = [Point(x.value, y.value) for x, y in points.values()]
        best = dict(zip(points, not_dominated(means), strict=True))
        text = "; ".join(s.label for s in points if best[s])
        draw = partial(_draw, points, best, styles, level, metric, ability)
        description = f"Curves of {study.mean_label.lower()} against {title}. Not dominated: {text}."
        panels.append(Panel(title, description, draw, (4.2, 4.0)))
        drawn += [point for pair in points.values() for point in pair]
        rows += [
            [title, s.label, interval(x), interval(y), "yes" if best[s] else "no"]
            for s, (x, y) in points.items()
        ]
    return FigureSpec(
        name,
        f"Ability against edits over strengths, {setting.label}{_edits(study, setting)}",
        "Each curve is one regularizer over its strengths. It starts at the method without a regularizer, if"
        " one strength leaves updates whole (k = 1, lambda = 1, tau = 0). A ring marks what is not dominated:"
        " no other mean is as large in both directions and larger in one. "
        + ("The dashed line is the unedited model. " if level is not None else "")
        + spread_words(drawn),
        panels,
        [(curve.label, styles[curve]) for curve in found],
        columns=2,
        header=("edits", "series", "left of the edits", study.mean_label.lower(), "not dominated"),
        rows=rows,
    )


def _edits(study: Study, setting: Setting) -> str:
    numbers = set(study.last(setting).values())
    return f", {count(max(numbers), 'edit')}" if len(numbers) == 1 else ", each at its largest number"


def _draw(
    points: Mapping[Series, tuple[Estimate, Estimate]],
    best: Mapping[Series, bool],
    styles: Mapping[Curve, Look],
    level: float | None,
    metric: str,
    ability: str,
    axes: Axes,
) -> None:
    if level is not None:
        axes.axhline(level, color=MUTED, ls="--", lw=1.2, zorder=1)
    for curve, look in styles.items():
        on = [points[series] for series in curve.series if series in points]
        means = [x.value for x, _ in on], [y.value for _, y in on]
        with drawn_for(axes, curve.series[-1], "curve"):
            axes.plot(*means, color=look.color, ls=look.line, lw=1.6)
            for x, y in on[-curve.own :]:
                for xs, ys in ((x.ends, [y.value] * 2), ([x.value] * 2, y.ends)):
                    if xs and ys:
                        axes.plot(xs, ys, color=look.color, lw=0.9, alpha=0.45, zorder=1.5)
    for curve, look in styles.items():  # above all lines
        for series in (s for s in curve.series[-curve.own :] if s in points):
            x, y = points[series]
            with drawn_for(axes, series):
                drawn_point(axes, x.value, y.value, look, 7)
                if best[series]:
                    axes.plot(x.value, y.value, marker="o", ms=12, mfc="none", mec=INK, mew=1.3, ls="")
    axes.set(xlabel=f"{metric}, {EDITING_PROTOCOL}", ylabel=ability)


# -------------------------------------------------------------------------------------- at equal reliability


@dataclass(frozen=True)
class Compared:
    """The curves of a setting at shares of the method's own reliability, order by order.

    first: the curve that the others are compared with. reliability: the mean without a regularizer.
    bounded: whether abilities lie in [0, 1]. abilities: curve -> share -> order -> ability, for shares that
    the curve has in all of its orders.
    """

    first: Curve
    reliability: Estimate
    bounded: bool
    abilities: Mapping[Curve, Mapping[float, Mapping[tuple[str, int], float]]]
    above: Mapping[Curve, set[float]]

    def value(self, curve: Curve, share: float) -> Estimate | None:
        return _mean(self.abilities[curve].get(share, {}).values(), self.bounded)

    def difference(self, curve: Curve, other: Curve, share: float) -> Estimate | None:
        """Of the first from the second, within the orders that both have."""
        ours, theirs = (self.abilities[each].get(share, {}) for each in (curve, other))
        return _mean(ours[order] - theirs[order] for order in ours if order in theirs)

    def star(self, share: float, *of: Curve) -> str:
        """ " *" where one of the curves has more of the edits than this share."""
        return " *" if any(share in self.above[curve] for curve in of) else ""


def _mean(values: Iterable[float], bounded: bool = False) -> Estimate | None:
    return estimate([Score(value, None) for value in values], bounded=bounded)


def compared(study: Study, setting: Setting) -> Compared | None:
    """None without a curve, or without the method alone in the same orders."""
    last = study.last(setting)
    plain = Series(setting, Regularization())
    found = [curve for curve in curves(study, setting) if curve.own > 1 or curve.series == (plain,)]
    if plain not in last:
        return None
    points = {series: _points(study, series, n) for series, n in last.items()}
    abilities: dict[Curve, dict[float, dict[tuple[str, int], float]]] = {}
    above: dict[Curve, set[float]] = {curve: set() for curve in found}
    for curve in found:
        orders = [order for order in points[plain] if all(order in points[s] for s in curve.series)]
        for share in LEVELS if orders else ():
            values: dict[tuple[str, int], float | None] = {}
            for order in orders:
                of, level = [points[s][order] for s in curve.series], share * points[plain][order].edits
                values[order] = ability_with(of, level)
                if all_above(of, level):
                    above[curve].add(share)
            reached = {order: value for order, value in values.items() if value is not None}
            if len(reached) == len(orders):
                abilities.setdefault(curve, {})[share] = reached
    reliability = _mean(point.edits for point in points[plain].values())
    known = study.metric(None)
    first = next((curve for curve in abilities if curve.own > 1), None)
    if first is None or reliability is None:
        return None
    return Compared(first, reliability, known is not None and known.share, abilities, above)


def _points(study: Study, series: Series, n: int) -> dict[tuple[str, int], Point]:
    """Reliability right after each edit, and ability, in each order."""
    found = {}
    for run in study.at(series, n):
        reliability = run.editing["after"].get("reliability")
        if reliability is not None and run.mean is not None:
            found[run.stream] = Point(reliability.value, run.mean.value)
    return found


def tables(study: Study, setting: Setting) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, header, rows): abilities at equal reliability, and the first curve's differences."""
    if (at := compared(study, setting)) is None:
        return []
    first, others = at.first, [curve for curve in at.abilities if curve != at.first]
    orders = count(at.reliability.n, "order")
    levels = [f"{percent(share)} ({number(share * at.reliability.value)})" for share in LEVELS]
    where = f"{setting.label}{_edits(study, setting)}, {orders}"
    what = f"{study.mean_label.lower()} with at least this share of the"
    what += f" {reliability_label(TIMES['after'])} that the method has without a regularizer"
    return [
        (
            f"At equal reliability (a star: at more): {what}; {where}",
            ["regularizer", *levels],
            [[c.label, *(interval(at.value(c, s)) + at.star(s, c) for s in LEVELS)] for c in at.abilities],
        ),
        (
            f"The same, {first.label} minus the other, order by order; {where}",
            ["other", *levels],
            [
                [c.label, *(signed(at.difference(first, c, s)) + at.star(s, first, c) for s in LEVELS)]
                for c in others
            ],
        ),
    ]


def line(study: Study, setting: Setting) -> str | None:
    """The comparison of all curves of a setting with the first in one line; None where there is none."""
    if (at := compared(study, setting)) is None:
        return None
    first = at.first
    others = [curve for curve in at.abilities if curve != first]
    texts = [
        f"minus {curve.label} {signed(at.difference(first, curve, _LINE))}{at.star(_LINE, first, curve)}"
        for curve in others
    ]
    starred = any(at.star(_LINE, curve) for curve in at.abilities)
    return (
        f"{setting.label}{_edits(study, setting)}, {count(at.reliability.n, 'order')}:"
        f" {study.mean_label.lower()} with at least {percent(_LINE)} of the reliability right after each edit"
        f" that the method has alone ({number(at.reliability.value)}):"
        f" {first.label} {interval(at.value(first, _LINE))}{at.star(_LINE, first)};"
        f" {first.label} {', '.join(texts)}"
        + (" (*: no strength of one of them loses so many edits in every order)" if starred else "")
    )
