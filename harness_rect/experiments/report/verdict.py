"""What editing cost, and what a regularizer saved of it: a sentence for each setting."""

from __future__ import annotations

from collections.abc import Callable

from harness_rect.experiments.report.figures import count, interval, number, reliability_label, signed
from harness_rect.experiments.report.series import Series, Setting
from harness_rect.experiments.report.study import TIMES, Estimate, Run, Study, estimate
from harness_rect.experiments.results import Score

#: The share that the paper recommends RECT to keep.
RECOMMENDED = 0.4
#: Which series a sentence is about; no result has a part in it.
HOW = (
    "The regularizer named is RECT at the strength nearest to the recommended 40%, or the first one where"
    " RECT was not run. Differences are taken within each order of the edits. Saved: the mean minus that"
    " without a regularizer."
)


def sentences(study: Study) -> dict[Setting, str]:
    """One for each setting that has edited models with the mean of the abilities."""
    found = {setting: _sentence(study, setting) for setting in study.settings}
    return {setting: text for setting, text in found.items() if text}


def difference(
    study: Study, one: Series, other: Series, n: int, of: Callable[[Run], Score | None]
) -> Estimate | None:
    """``one`` minus ``other`` after ``n`` edits, within the streams that both have; None without any."""
    values = [{run.stream: of(run) for run in study.at(series, n)} for series in (one, other)]
    pairs = [(values[0][stream], values[1][stream]) for stream in values[0] if stream in values[1]]
    return estimate([Score(a.value - b.value, None) for a, b in pairs if a and b])


def ability_difference(study: Study, one: Series, other: Series, n: int) -> Estimate | None:
    return difference(study, one, other, n, lambda run: run.mean)


def plain_of(study: Study, setting: Setting) -> Series | None:
    """The method without a regularizer."""
    return next((series for series in study.series(setting) if series.is_plain), None)


def _named(study: Study, setting: Setting) -> Series | None:
    """The series that the sentence compares with the method alone; see :data:`HOW`."""
    trimmed = [series for series in study.series(setting) if series.regularizer.name != "none"]
    rect = [series for series in trimmed if series.regularizer.name == "rect"]
    if rect:
        return min(rect, key=lambda series: abs((series.regularizer.kept or 0) - RECOMMENDED))
    return trimmed[0] if trimmed else None


def _sentence(study: Study, setting: Setting) -> str:
    last, plain, named = study.last(setting), plain_of(study, setting), _named(study, setting)
    first = plain or named
    ability = study.ability(first, last[first]) if first else None
    if first is None or ability is None:
        return ""
    n, what = last[first], study.mean_label[0].lower() + study.mean_label[1:]
    base = study.base(setting.model)
    before = f" (unedited {number(base.mean.value)})" if base and base.mean else ""
    alone = "without a regularizer" if first is plain else f"with {first.label}"
    text = f"{setting.label}, {count(n, 'edit')}: the {what} is {interval(ability)} {alone}{before}"
    if plain is None or named is None or last[named] != n:
        return f"{text}."
    change = ability_difference(study, named, plain, n)
    if change is None:
        return (
            f"{text}; with {named.label} it is {interval(study.ability(named, n))}, of other orders of edits."
        )
    text += f"; {_effect(named.label, change, study.ability(named, n))}"
    edits = difference(study, named, plain, n, lambda run: run.editing["after"].get("reliability"))
    if edits:
        text += f", and the {reliability_label(TIMES['after'])} changes by {signed(edits)}"
    return f"{text}; {_spread(change)}."


def _effect(label: str, change: Estimate, ability: Estimate | None) -> str:
    if not change.ends:
        return f"with {label} it is {interval(ability)} ({signed(change)})"
    if change.ends[0] <= 0 <= change.ends[1]:
        return f"{label} makes no difference to it that these orders show, {signed(change)}"
    return f"{label} {'raises' if change.value > 0 else 'lowers'} it by {signed(change)}"


def _spread(change: Estimate) -> str:
    if change.n == 1:
        return "one order of the edits, so without an interval of the differences"
    if not change.ends:
        return f"{change.n} orders of the edits"
    kind = "ranges of the differences in the two" if change.spread == "range" else "95% t-intervals over the"
    return f"{kind} orders of the edits" if change.n == 2 else f"{kind} {change.n} orders of the edits"
