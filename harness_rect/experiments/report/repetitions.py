"""Which of several evaluations of one model a study shows, and with which unedited run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness_rect.evaluation.catalogue import is_editing
from harness_rect.experiments import results
from harness_rect.experiments.compare.differences import LIMIT, find_differences
from harness_rect.experiments.report.study import Run
from harness_rect.experiments.results import Results

#: Task -> the file that its scores are of.
ByTask = Mapping[str, Results]


def by_task(paths: Iterable[Path]) -> ByTask:
    """The files of a run; of a task that several have, the last."""
    return {task: one for one in map(results.load, paths) for task in one.tasks}


def differences(
    base: ByTask, other: ByTask, expected: Collection[str] = (), editing: bool = False
) -> list[str]:
    """What makes the scores of two runs mean different things, see :func:`find_differences`.

    Runs without a task in common may differ in what holds for all tasks of a file.

    Args:
        editing: look at the tasks about the edits, too.
    """
    both = [task for task in other if task in base and (editing or not is_editing(task))]
    pairs = {(id(one), id(two)): (one, two) for one in base.values() for two in other.values()}
    found: dict[str, None] = {}
    for one, two in pairs.values():
        tasks = [task for task in both if base[task] is one and other[task] is two]
        found |= dict.fromkeys(find_differences(one, two, tasks, expected=("edit_seed", *expected)))
    return list(found)


class Repetitions:
    """What is left of several runs, and notes on the rest; see :func:`without_repetitions`."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.notes: list[str] = []
        self.runs: list[Run] = []
        # Files are read only where runs are of the same model and edits; they may be large.
        self._read = lru_cache(maxsize=4)(by_task)
        preferred = sorted(runs, key=lambda run: (run.limit, run.date, run.file), reverse=True)
        for model in dict.fromkeys(run.model for run in preferred):
            groups: dict[Any, list[Run]] = {None: []}
            for run in preferred:
                if run.model == model:
                    groups.setdefault(_edits(run), []).append(run)
            bases, *edited = (self._joined(group) for group in groups.values())
            self._add(model, bases, edited)

    def _differences(self, one: Run, other: Run, expected: Collection[str] = (), **more: bool) -> list[str]:
        return differences(self._read(one.paths), self._read(other.paths), expected, **more)

    def _leave_out(self, run: Run, why: str) -> None:
        self.notes.append(f"{run.file} is left out: {why}")

    def _joined(self, runs: Iterable[Run]) -> list[Run]:
        """Runs of the same edits, the preferred ones first: those of the same settings are one."""
        kept: list[Run] = []
        for run in runs:
            for place, better in enumerate(kept):
                fewer = run.series is not None and run.limit < better.limit and run.tasks <= better.tasks
                expected = LIMIT if fewer else ()
                if self._differences(better, run, expected, editing=run.series is not None):
                    continue
                if run.tasks <= better.tasks:
                    why = "has more documents of the same" if fewer else "is newer and evaluates the same"
                    if better.edit.run != run.edit.run and not fewer:
                        why = "is a newer run of the same edits, with other versions, threads or processors"
                    self._leave_out(run, f"{better.file} {why}.")
                else:
                    self.notes.append(
                        f"{run.file} and {better.file} evaluate the same model and are taken together."
                    )
                    kept[place] = _together(run, better)
                break
            else:
                kept.append(run)
        return kept

    def _add(self, model: str, bases: Sequence[Run], edited: Sequence[Sequence[Run]]) -> None:
        """The runs of a model: each edited one by the name of the unedited run that it is held against."""
        shown: dict[int, list[Run]] = {}
        for group in edited:
            chosen: dict[int, tuple[bool, Run]] = {}
            for run in group:
                place, differs = self._base(run, bases) if len(bases) > 1 or len(group) > 1 else (0, False)
                if place not in chosen:
                    chosen[place] = differs, run
                    continue
                worse, better = run, chosen[place][1]
                if chosen[place][0] and not differs:
                    worse, better = better, run
                    chosen[place] = differs, run
                lines = "; ".join(self._differences(better, worse, editing=True))
                self._leave_out(worse, f"it and {better.file}, of the same edits, differ: {lines}")
            for place, (_, run) in chosen.items():
                shown.setdefault(place, []).append(run)
        names: dict[int, str] = {}
        for place, base in enumerate(bases):
            if edited and place not in shown:
                continue
            first = bases[min(names, default=place)]
            if not edited and base is not first and self._has_fewer(base, first):
                continue
            names[place] = f"{model} (as in {base.file})" if names else model
            if base is not first:
                lines = "; ".join(self._differences(first, base))
                self.notes.append(
                    f"{base.file} and {first.file}, both unedited, differ, and each is shown with the edited"
                    f" runs like it: {lines}"
                )
        for place, base in enumerate(bases):
            if place in names:
                self.runs.append(base.of_model(names[place]))
                continue
            first = bases[min(names)]
            if self._has_fewer(base, first):
                self._leave_out(base, f"{first.file} has more documents of the same.")
            else:
                lines = "; ".join(self._differences(first, base))
                self._leave_out(base, f"no edited run is like it; it and {first.file} differ: {lines}")
        self.runs += [run.of_model(names.get(place, model)) for place, of in shown.items() for run in of]

    def _base(self, run: Run, bases: Sequence[Run]) -> tuple[int, bool]:
        """The place of the unedited run that an edited one is held against, and whether they differ."""
        differ = [bool(self._differences(base, run)) for base in bases]
        ranks = [(differ[i], -len(base.tasks & run.tasks), i) for i, base in enumerate(bases)]
        differs, _, place = min(ranks, default=(False, 0, 0))
        return place, differs

    def _has_fewer(self, run: Run, better: Run) -> bool:
        fewer = run.limit < better.limit and run.tasks <= better.tasks
        return fewer and not self._differences(better, run, LIMIT)


def _edits(run: Run) -> Any:
    return run.series and (run.series, run.n_edits, run.stream)


def _together(run: Run, better: Run) -> Run:
    return replace(
        better,
        paths=(*run.paths, *better.paths),
        scores={**run.scores, **better.scores},
        measures={**run.measures, **better.measures},
        higher_is_better={**run.higher_is_better, **better.higher_is_better},
        reported_means={**run.reported_means, **better.reported_means},
    )


def without_repetitions(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Of evaluations of the same the one on most documents, then the newest; notes on the others.

    Runs of the same edits on other tasks are one run if their settings are the same, else one is left out.
    Of several unedited runs that differ, each edited run is held against one that it does not differ from,
    if there is one; all but the first, and the edited runs like them, go by another name of the model.
    """
    found = Repetitions(runs)
    return found.runs, found.notes
