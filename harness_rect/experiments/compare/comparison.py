"""Evaluations side by side: how each score changed, whether that is more than chance, and a gate on it.

Scores are set side by side only where they mean the same: the same task version, documents, prompts, number
of shots, limit and seeds. Everything else is a *difference*, named, and refused unless allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness_rect import embedded
from harness_rect.errors import UserError, did_you_mean
from harness_rect.evaluation.catalogue import TASKS, is_editing
from harness_rect.experiments.compare.pairing import Paired, Unpairable, document_difference, pair, pair_group
from harness_rect.experiments.compare.significance import (
    RESAMPLES,
    Inference,
    holm,
    mcnemar,
    paired_bootstrap,
    unpaired,
)
from harness_rect.experiments.results import Key, Results, labels

SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


@dataclass(frozen=True)
class Comparison:
    """One metric of one task (or group) under the base and another model.

    change: other - base. retention: other / base, or base / other for metrics that are better when lower, so
        that less than 1 is always a loss; None where the base (or that other) is not positive.
    low, high: 95% confidence interval of the change. p, p_holm: two-sided, alone and corrected for all
        comparisons made together. None where there is nothing to compute them from.
    test: mcnemar, paired_bootstrap, unpaired or none; method says it in words. n: documents, where paired.
    min_retention: the gate this row had to pass, if any; passed: whether it did.
    """

    base: str
    other: str
    base_file: str
    other_file: str
    task: str
    metric: str
    filter: str
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
class Report:
    """Everything one comparison has to say.

    differences: what the evaluations differ in, where that was allowed. left_out: what only one side has.
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
    """Least retention: of every headline metric (task None), of a task's headline, or of one metric."""

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
) -> Report:
    """Compare each of ``others`` with ``base`` on the tasks both have.

    Args:
        tasks: only these tasks and groups (a group brings its tasks); default all.
        all_metrics: every metric instead of the headline of each task.
        gates: see :class:`Gate`; the most special one counts. Metrics named here get a row in any case; a
            gate that no row meets is refused.
        allow_differences: compare although the evaluations differ; the differences are in the report.
        resamples: of each bootstrap and permutation test.
        on_row: told (rows done, rows in all) after each row.

    Raises:
        UserError: the evaluations differ, have nothing in common, a name is unknown, or a gate on everything
            would pass over a task that only the base has.
    """
    everything = [base, *others]
    _check_names(everything, tasks, gates)
    named = labels(everything)
    differences: list[str] = []
    left_out: list[str] = []
    plan: list[tuple[Results, str, str, Key]] = []
    for other, label in zip(others, named[1:], strict=True):
        shared, only_base, only_other = _shared(base, other, tasks)
        for names, where in ((only_base, base), (only_other, other)):
            if names:
                left_out.append(f"only in {where.path}: {', '.join(names)}")
        if not shared:
            raise UserError(f"{base.path} and {other.path} have no task in common" + _of(tasks))
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
        rows = [(name, key) for name in shared for key in _keys(base, other, name, all_metrics, gates)]
        plan += [(other, label, name, key) for name, key in rows]
    for gate in gates:
        if gate.task is not None:
            for other in others:
                if not any(one is other and name == gate.task for one, _, name, _ in plan):
                    raise UserError(
                        f"--min-retention: {gate.task} is not compared with {other.path}, so it cannot pass"
                    )
    done: list[Comparison] = []
    for other, label, name, key in plan:
        row = _row(base, other, named[0], label, name, key, resamples)
        done.append(_gated(row, gates, headline=key == base.headline(name)))
        if on_row is not None:
            on_row(len(done), len(plan))
    corrected = holm([row.p for row in done])
    done = [replace(row, p_holm=p) for row, p in zip(done, corrected, strict=True)]
    return Report(done, differences, left_out)


# ------------------------------------------------------------------------------------- what is compared


def _check_names(everything: Sequence[Results], tasks: Sequence[str] | None, gates: Sequence[Gate]) -> None:
    known = set().union(*(one.names for one in everything))
    asked = [("--tasks", name) for name in tasks or ()]
    asked += [("--min-retention", gate.task) for gate in gates if gate.task is not None]
    for option, name in asked:
        if name not in known:
            raise UserError(f"{option}: no results have {name}: {did_you_mean(name, sorted(known))}")


def _of(tasks: Sequence[str] | None) -> str:
    return f" of {', '.join(tasks)}" if tasks else ""


def _shared(
    base: Results, other: Results, chosen: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Tasks, then groups, that both have; what only the base has; what only the other has."""

    def wanted(results: Results) -> list[str]:
        scored = [*results.tasks, *results.groups]
        if chosen is None:
            return scored
        inside = {leaf for name in chosen for leaf in results.leaves(name)} | set(chosen)
        # A group within a chosen group comes with its tasks.
        inside |= {name for name in results.groups if set(results.leaves(name)) <= inside}
        return [name for name in scored if name in inside]

    first, second = wanted(base), wanted(other)
    shared = [name for name in first if name in second]
    # Means over different tasks are different things.
    unlike = {name for name in shared if set(base.leaves(name)) != set(other.leaves(name))}
    return (
        [name for name in shared if name not in unlike],
        [name for name in first if name not in second or name in unlike],
        [name for name in second if name not in first],
    )


def _keys(base: Results, other: Results, name: str, all_metrics: bool, gates: Sequence[Gate]) -> list[Key]:
    keys = base.metrics(name)
    asked = {gate.metric for gate in gates if gate.task == name and gate.metric is not None}
    present = [key.metric for key in keys]
    for metric in asked - {m for key in keys for m in (key.metric, ",".join(key))}:
        raise UserError(
            f"--min-retention: {name} has no {metric} in {base.path}; it has {', '.join(present)}"
        )
    headline = base.headline(name)
    kept = [k for k in keys if all_metrics or k == headline or {k.metric, ",".join(k)} & asked]
    missing = [k for k in kept if k not in other.scores(name)]
    if missing and (headline in missing or {k.metric for k in missing} & asked):
        raise UserError(f"{other.path}: {name} has no {','.join(missing[0])}, which {base.path} has")
    return [key for key in kept if key not in missing]


# ------------------------------------------------------------------------------------------ differences


def find_differences(
    base: Results, other: Results, names: Sequence[str], expected: Collection[str] = ()
) -> list[str]:
    """What makes the scores of these tasks and groups mean different things, one line each.

    Tasks that differ in the same way share a line. What a file does not say (older ones lack some entries)
    is not held against it, and neither is what is ``expected`` to differ ("edit_seed").
    """
    lines = [
        f"{what} {_said(a)} and {_said(b)}"
        for what, a, b in _of_the_run(base, other)
        if a is not _UNKNOWN and b is not _UNKNOWN and a != b and what not in expected
    ]
    tasks = list(dict.fromkeys(leaf for name in names for leaf in base.leaves(name)))
    per_task: dict[tuple[str, str], list[str]] = {}
    for name in [*tasks, *(name for name in names if name in base.groups)]:
        a, b = (_number(one.file.versions.get(name, _UNKNOWN)) for one in (base, other))
        if _UNKNOWN not in (a, b) and a != b:
            per_task.setdefault(("version", f"{a} and {b}"), []).append(name)
    for task in tasks:
        for what, a, b in _of_the_task(base, other, task):
            if a is not _UNKNOWN and b is not _UNKNOWN and a != b:
                per_task.setdefault((what, f"{_said(a)} and {_said(b)}"), []).append(task)
        if (difference := document_difference(base, other, task)) is not None:
            per_task.setdefault(difference, []).append(task)
    return lines + [f"{what} of {', '.join(of)}: {how}" for (what, how), of in per_task.items()]


_UNKNOWN = "?"


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _number(value: Any) -> Any:
    """1.0 for 1, "1" and "1.0": lm-eval writes versions of groups as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _of_the_run(base: Results, other: Results) -> list[tuple[str, Any, Any]]:
    configs = base.file.config, other.file.config
    found = [("limit", *(_number(config.get("limit", _UNKNOWN)) for config in configs))]
    found += [(seed, *(config.get(seed, _UNKNOWN) for config in configs)) for seed in SEEDS]
    found += [
        ("edit_seed", *(one.edit.get("edit_seed", _UNKNOWN) for one in (base, other))),
        ("chat template", base.file.chat_template_sha, other.file.chat_template_sha),
        ("system instruction", base.file.system_instruction_sha, other.file.system_instruction_sha),
    ]
    return found


def _of_the_task(base: Results, other: Results, task: str) -> list[tuple[str, Any, Any]]:
    sides = base, other
    rows = [one.effective_rows(task) for one in sides]
    found = [
        ("num_fewshot", *(one.file.n_shot.get(task, _UNKNOWN) for one in sides)),
        ("number of documents", *(_UNKNOWN if n is None else n for n in rows)),
    ]
    if not is_editing(task):
        found.append(("data", *(_data(one, task) for one in sides)))
    elif any(one.samples(task) is None for one in sides):  # else the documents themselves are compared
        hashes = [one.edit.get("edits_sha256") for one in sides]
        specs = [one.metadata(task).get("edits") or _default_edits(one) for one in sides]
        found.append(("edits", *(hashes if all(hashes) else specs)))
    return found


def _data(results: Results, task: str) -> Any:
    """Where a task's rows came from, as far as the file says it."""
    config = results.file.configs.get(task)
    if config is None:
        return _UNKNOWN
    if task in TASKS:
        metadata = results.metadata(task)
        spec = metadata.get("data")
        if spec in (None, ""):
            return (
                "tiny" if embedded.is_embedded(metadata.get("pretrained")) or _is_default(results) else "hub"
            )
        return spec if spec in ("hub", "tiny") else str(Path(str(spec)).expanduser().resolve())
    split = config.get("test_split") or config.get("validation_split")
    return " ".join(
        str(part) for part in (config.get("dataset_path"), config.get("dataset_name"), split) if part
    )


def _is_default(results: Results) -> bool:
    """Whether ``edited_hf`` was given no model and took the embedded one."""
    return results.model_class == "edited_hf" and not results.model_args.get("pretrained")


def _default_edits(results: Results) -> Any:
    named = embedded.is_embedded(results.model_args.get("pretrained")) or _is_default(results)
    return embedded.DEFAULT_EDITS if named else _UNKNOWN


# ------------------------------------------------------------------------------------------------- rows


def _row(
    base: Results, other: Results, base_label: str, other_label: str, name: str, key: Key, resamples: int
) -> Comparison:
    a, b = base.scores(name)[key], other.scores(name)[key]
    higher = base.higher_is_better(name, key.metric)
    inference, method, n = _inference(base, other, name, key, resamples)
    return Comparison(
        base=base_label,
        other=other_label,
        base_file=str(base.path),
        other_file=str(other.path),
        task=name,
        metric=key.metric,
        filter=key.filter,
        higher_is_better=higher,
        score_base=a.value,
        score_other=b.value,
        change=b.value - a.value,
        retention=retention(a.value, b.value, higher),
        low=inference.low,
        high=inference.high,
        p=inference.p,
        p_holm=None,
        test=inference.test,
        method=method,
        n=n,
    )


def retention(base: float, other: float, higher_is_better: bool = True) -> float | None:
    """Share of the base's score that is left; None where that is no share of anything (see Comparison)."""
    whole, part = (base, other) if higher_is_better else (other, base)
    return part / whole if whole > 0 else None


def _inference(
    base: Results, other: Results, name: str, key: Key, resamples: int
) -> tuple[Inference, str, int | None]:
    """The test that the files allow for, in words, and the number of documents if they are paired."""
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
        if found.low is None:
            return found, f"unpaired: {reason}; a standard error is 0", None
        return found, f"unpaired: {reason}", None
    return *_paired_test(paired, resamples), paired.documents


def _paired_test(paired: Paired, resamples: int) -> tuple[Inference, str]:
    if paired.outcomes is not None:
        lost, gained = paired.outcomes
        return mcnemar(gained, lost, paired.documents), f"paired McNemar, n={paired.documents}"
    units = len(paired.stratum.base)
    size = f"n={paired.documents}" + ("" if paired.unit == "documents" else f" in {units} {paired.unit}")
    return paired_bootstrap([paired.stratum], resamples), f"paired bootstrap, {size}"


# ------------------------------------------------------------------------------------------------ gates


def _gated(row: Comparison, gates: Sequence[Gate], headline: bool) -> Comparison:
    """The row with the gate that applies: one on its metric before one on its task before one on all."""

    def rank(gate: Gate) -> int:
        if gate.task is None or gate.task == row.task:
            if gate.metric in (row.metric, f"{row.metric},{row.filter}"):
                return 3
            if gate.metric is None and headline:
                return 1 if gate.task is None else 2
        return 0

    fitting = [gate for gate in gates if rank(gate)]
    if not fitting:
        return row
    gate = max(enumerate(fitting), key=lambda pair: (rank(pair[1]), pair[0]))[1]  # of equals the last said
    return replace(row, min_retention=gate.least, passed=passes(row, gate.least))


def passes(row: Comparison, least: float) -> bool:
    """Whether at least this share is left. Where there is no share (base 0), whether nothing was lost."""
    if not (math.isfinite(row.score_base) and math.isfinite(row.score_other)):
        return False
    if row.retention is None:
        return row.change >= 0 if row.higher_is_better else row.change <= 0
    return row.retention >= least - 1e-9  # 0.47 / 0.5 is 0.94, whatever the last bit says


def as_row(row: Comparison) -> Mapping[str, Any]:
    """A flat dict, for data frames, JSON and CSV."""
    return dict(vars(row))
