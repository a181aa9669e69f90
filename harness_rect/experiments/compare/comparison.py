"""How each score changed between evaluations, whether the change is significant, and gates on it.

Scores are compared only where they mean the same: the same task version, documents, prompts, number of shots,
limit and seeds. Anything else is a *difference* (:mod:`.differences`), which is an error unless allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from harness_rect.errors import UserError, did_you_mean
from harness_rect.evaluation.catalogue import is_retained, protocol
from harness_rect.experiments.compare.differences import find_differences
from harness_rect.experiments.compare.pairing import Unpairable, pair, pair_group
from harness_rect.experiments.compare.significance import (
    RESAMPLES,
    Inference,
    holm,
    mcnemar,
    paired_bootstrap,
    unpaired,
)
from harness_rect.experiments.results import Key, Results, labels
from harness_rect.io.files import shown


@dataclass(frozen=True)
class Comparison:
    """One metric of one task (or group) under the base and another model.

    protocol: how the metric gets at the model's answer, as the catalogue has it; None for tasks that are not
        ours.
    change: other - base. retention: other / base, or base / other for metrics that are better when lower, so
        that less than 1 is always a loss; None where it has no meaning, see :func:`retention`.
    low, high: 95% confidence interval of the change. p, p_holm: two-sided, uncorrected and corrected for all
        comparisons made together. None where the files do not allow computing them.
    test: mcnemar, paired_bootstrap, unpaired or none; method describes it. n: documents, where paired.
    min_retention: the gate of this row, if any; passed: whether it passed.
    """

    base: str
    other: str
    base_file: str
    other_file: str
    task: str
    metric: str
    filter: str
    protocol: str | None
    higher_is_better: bool
    score_base: float
    score_other: float
    change: float
    retention: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    test: str
    method: str
    n: int | None
    min_retention: float | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class ComparisonTable:
    """All rows of one call of :func:`compare`.

    differences: what the evaluations differ in, where that was allowed. left_out: tasks and metrics that only
        one has.
    """

    rows: list[Comparison]
    differences: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Comparison]:
        """Rows that fell short of their gate."""
        return [row for row in self.rows if row.passed is False]


@dataclass(frozen=True)
class Gate:
    """Minimum retention of every headline metric (task None), of a task's headline, or of one metric."""

    least: float
    task: str | None = None
    metric: str | None = None

    @classmethod
    def parse(cls, text: str) -> Gate:
        """``0.94``, ``94%``, ``rect_nli=0.9`` or ``rect_nli/valid_rate=0.9``.

        Raises:
            UserError: for anything else.
        """
        name, equals, number = text.rpartition("=")
        try:
            least = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        except ValueError:
            least = math.nan
        task, slash, metric = name.strip().partition("/")
        if not number.endswith("%") and least > 2:  # 94 without its percent sign
            least = math.nan
        if not 0 <= least < math.inf or bool(equals) != bool(task) or bool(slash) != bool(metric):
            raise UserError(f"--min-retention {text}: expected 0.94 or 94%, TASK=0.94 or TASK/METRIC=0.94")
        return cls(least, task or None, metric or None)


def compare(
    base: Results,
    others: Sequence[Results],
    *,
    tasks: Sequence[str] | None = None,
    all_metrics: bool = False,
    gates: Sequence[Gate] = (),
    allow_differences: bool = False,
    resamples: int = RESAMPLES,
    on_row: Callable[[int, int], None] | None = None,
) -> ComparisonTable:
    """Compare each of ``others`` with ``base`` on the tasks both have.

    Args:
        tasks: only these tasks and groups (a group brings its tasks); default all.
        all_metrics: every metric instead of the headline of each task.
        gates: see :class:`Gate`; the most specific one applies. Metrics named here always get a row; a
            gate that applies to no row is an error.
        allow_differences: compare although the evaluations differ; the differences are listed in the result.
        resamples: of each bootstrap and permutation test.
        on_row: called with (rows done, number of rows) after each row.

    Raises:
        UserError: the evaluations differ or have no task or metric in common, a name is unknown, or there is
            a gate that cannot be judged: on what ``other`` lacks, or on a metric that has no retention.
    """
    known = base.names.union(*(other.names for other in others))
    asked = [("--tasks", name) for name in tasks or ()]
    asked += [("--min-retention", gate.task) for gate in gates if gate.task is not None]
    for option, name in asked:
        if name not in known:
            raise UserError(f"{option}: no results have {name}: {did_you_mean(name, sorted(known))}")
    named = labels([base, *others])
    differences: list[str] = []
    left_out: list[str] = []
    plan: list[tuple[Results, str, str, Key]] = []
    for other, label in zip(others, named[1:], strict=True):
        shared, only_base, only_other = _shared(base, other, tasks)
        for names, where in ((only_base, base), (only_other, other)):
            if names:
                left_out.append(f"only in {where.path}: {', '.join(names)}")
        if not shared:
            of = f" of {', '.join(tasks)}" if tasks else ""
            raise UserError(f"{base.path} and {other.path} have no task in common{of}")
        if only_base and any(gate.task is None for gate in gates):
            raise UserError(
                f"--min-retention: {other.path} lacks {', '.join(only_base)}, which {base.path} has;"
                " choose with --tasks what to compare"
            )
        found = find_differences(base, other, shared)
        if found and not allow_differences:
            raise UserError(
                f"{other.path} cannot be compared with {base.path}: {'; '.join(found)}"
                " (--allow-differences compares all the same, --tasks chooses tasks)"
            )
        differences += [f"{label}: {difference}" for difference in found]
        missing = {gate.task for gate in gates if gate.task is not None} - set(shared)
        for task in sorted(missing):
            raise UserError(f"--min-retention: {task} is not compared with {other.path}, so it cannot pass")
        before = len(plan)
        for name in shared:
            keys, lacking = _keys(base, other, name, all_metrics, gates)
            plan += [(other, label, name, key) for key in keys]
            left_out += [f"only in {where.path}: {name} {_label(key)}" for where, key in lacking]
        if len(plan) == before:
            raise UserError(f"{base.path} and {other.path} have no metric in common of {', '.join(shared)}")
    done: list[Comparison] = []
    for other, label, name, key in plan:
        row = _row(base, other, named[0], label, name, key, resamples)
        done.append(_gated(row, gates, headline=key == base.headline(name)))
        if on_row is not None:
            on_row(len(done), len(plan))
    corrected = holm([row.p for row in done])
    done = [replace(row, p_holm=p) for row, p in zip(done, corrected, strict=True)]
    return ComparisonTable(done, differences, left_out)


# ------------------------------------------------------------------------------------- what is compared


def _shared(
    base: Results, other: Results, chosen: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Tasks, then groups, that both have; what only the base has; what only the other has."""

    def wanted(results: Results) -> list[str]:
        scored = [*results.tasks, *results.groups]
        if chosen is None:
            return scored
        inside = {leaf for name in chosen for leaf in results.leaves(name)} | set(chosen)
        # A group within a chosen group is chosen with its tasks.
        inside |= {name for name in results.groups if set(results.leaves(name)) <= inside}
        return [name for name in scored if name in inside]

    first, second = wanted(base), wanted(other)
    shared = [name for name in first if name in second]
    # Groups of different tasks have means that cannot be compared.
    unlike = {name for name in shared if set(base.leaves(name)) != set(other.leaves(name))}
    return (
        [name for name in shared if name not in unlike],
        [name for name in first if name not in second or name in unlike],
        [name for name in second if name not in first],
    )


def _keys(
    base: Results, other: Results, name: str, all_metrics: bool, gates: Sequence[Gate]
) -> tuple[list[Key], list[tuple[Results, Key]]]:
    """The metrics of a task that are compared, and those that only one of the two has.

    Without ``all_metrics`` these are the headline, or the first metric that both have where one side lacks
    its headline (what needs the unedited model is absent under another model class), and those of gates.
    """
    keys, headline = base.metrics(name), base.headline(name)
    asked = {gate.metric for gate in gates if gate.task == name and gate.metric is not None}
    gated = [key for key in keys if {key.metric, ",".join(key)} & asked]
    for metric in asked - {text for key in gated for text in (key.metric, ",".join(key))}:
        raise UserError(
            f"--min-retention: {name} has no {metric} in {base.path};"
            f" it has {', '.join(key.metric for key in keys)}"
        )
    if any(gate.task == name and gate.metric is None for gate in gates):
        gated.append(headline)
    for key in gated:
        if not is_retained(name, key.metric):
            raise UserError(
                f"--min-retention: {name} {key.metric} has no retention; name another metric:"
                f" {name}/METRIC=SHARE"
            )
    shared = [key for key in keys if key in other.scores(name)]
    on_all = any(gate.task is None for gate in gates) and is_retained(name, headline.metric)
    needed = [*gated, headline] if on_all else gated
    if missing := [key for key in needed if key not in shared]:
        raise UserError(
            f"--min-retention: {other.path}: {name} has no {_label(missing[0])}, which {base.path} has"
        )
    if all_metrics:
        compared, shown = shared, [*keys, *other.metrics(name)]
    else:
        compared = [key for key in shared if key in (shared[0], *gated)]
        shown = [headline, other.headline(name)]
    lacking = [key for key in dict.fromkeys(shown) if key not in shared]
    return compared, [(base if key in keys else other, key) for key in lacking]


def _label(key: Key) -> str:
    """``acc``, or ``acc,strict-match`` where answers went through a filter."""
    return key.metric if key.filter == "none" else ",".join(key)


# ------------------------------------------------------------------------------------------------- rows


def _row(
    base: Results, other: Results, base_label: str, other_label: str, name: str, key: Key, resamples: int
) -> Comparison:
    a, b = base.scores(name)[key].value, other.scores(name)[key].value
    higher = base.higher_is_better(name, key.metric)
    inference, method, n = _inference(base, other, name, key, resamples)
    return Comparison(
        base=base_label,
        other=other_label,
        base_file=shown(base.path),
        other_file=shown(other.path),
        task=name,
        metric=key.metric,
        filter=key.filter,
        protocol=protocol(name, key.metric),
        higher_is_better=higher,
        score_base=a,
        score_other=b,
        change=b - a,
        retention=retention(a, b, higher) if is_retained(name, key.metric) else None,
        p_holm=None,
        method=method,
        n=n,
        **vars(inference),
    )


def retention(base: float, other: float, higher_is_better: bool = True) -> float | None:
    """other / base, or base / other where lower is better.

    None where nothing could be lost or the ratio is no share: the base is not above 0, or the other below 0
    (or, where lower is better, 0), or one is not finite.
    """
    if not (math.isfinite(base) and math.isfinite(other)):
        return None
    whole, part = (base, other) if higher_is_better else (other, base)
    return part / whole if base > 0 and part >= 0 and whole > 0 else None


def _inference(
    base: Results, other: Results, name: str, key: Key, resamples: int
) -> tuple[Inference, str, int | None]:
    """The test that the files allow, its description, and the number of documents if they are paired."""
    try:
        if name in base.groups:
            parts = pair_group(base, other, name, key)
            n = sum(part.documents for part in parts)
            found = paired_bootstrap([part.stratum for part in parts], resamples)
            return found, f"paired bootstrap within tasks, n={n} documents of {len(parts)} tasks", n
        paired = pair(base, other, name, key)
    except Unpairable as reason:
        a, b = base.scores(name)[key], other.scores(name)[key]
        if not math.isfinite(b.value - a.value):
            return Inference("none"), "none: a score is not finite", None
        found = unpaired(b.value - a.value, a.stderr, b.stderr)
        if found.test == "none":
            return found, f"none: {reason}, and no standard errors", None
        return found, f"unpaired: {reason}" + ("; a standard error is 0" if found.low is None else ""), None
    n = paired.documents
    if paired.outcomes is not None:
        lost, gained = paired.outcomes
        return mcnemar(gained, lost, n), f"paired McNemar, n={n}", n
    units = "" if paired.unit == "documents" else f" in {len(paired.stratum.base)} {paired.unit}"
    if paired.one_sided:
        units += f", {paired.one_sided} with this metric on one side only"
    return paired_bootstrap([paired.stratum], resamples), f"paired bootstrap, n={n}{units}", n


# ------------------------------------------------------------------------------------------------ gates


def _gated(row: Comparison, gates: Sequence[Gate], headline: bool) -> Comparison:
    """The row with the most specific gate: on its metric, else on its task, else on all tasks.

    A gate on all tasks passes over a metric that has no retention.
    """

    def rank(gate: Gate) -> int:
        if gate.task is None and not is_retained(row.task, row.metric):
            return 0
        if gate.task is None or gate.task == row.task:
            if gate.metric in (row.metric, f"{row.metric},{row.filter}"):
                return 3
            if gate.metric is None and headline:
                return 1 if gate.task is None else 2
        return 0

    gate = max(reversed(gates), key=rank, default=None)  # of equal ranks the last given
    if gate is None or not rank(gate):
        return row
    return replace(row, min_retention=gate.least, passed=passes(row, gate.least))


def passes(row: Comparison, least: float) -> bool:
    """Whether retention is at least this much; where it is undefined, whether the score did not get worse."""
    if not (math.isfinite(row.score_base) and math.isfinite(row.score_other)):
        return False
    if row.retention is None:
        return row.change >= 0 if row.higher_is_better else row.change <= 0
    return row.retention >= least - 1e-9  # 0.47 / 0.5 must pass a gate of 0.94
