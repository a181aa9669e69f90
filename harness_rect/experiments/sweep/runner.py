"""``harness-rect sweep``: every trajectory edits once and is evaluated at its checkpoints, in place.

Killed at any moment, the same command goes on: an evaluation is done when its ``results.json`` is there, and
a trajectory goes on from the state saved last, at a checkpoint or half a minute ago. What lies in the output
folder is only ever taken for the same evaluation: its results say all that determines them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from harness_rect.compat.lm_eval import describe_machine
from harness_rect.edits import EditStream, fingerprint, load_edits
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.clock import Clock
from harness_rect.experiments.sweep.display import (
    EDITING,
    EVALUATING,
    Display,
    Progress,
    Row,
    duration,
    timing_table,
)
from harness_rect.experiments.sweep.evaluate import Evaluator, QuietHF, read_results
from harness_rect.experiments.sweep.plan import (
    Evaluation,
    ModelEntry,
    Plan,
    SweepConfig,
    Trajectory,
    make_plan,
    read_config,
)
from harness_rect.fingerprint import model_fingerprint
from harness_rect.io.files import written_whole
from harness_rect.io.progress import logging_only
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.moments.layout import layout_name
from harness_rect.session import EditSession
from harness_rect.session.runs import EditCache

log = logging.getLogger("harness_rect.sweep")

#: In the output folder: unfinished trajectories, and the lock of the process that works in it.
STATES, LOCK, INDEX = ".states", ".lock", "sweep.json"
#: A dry run of a sweep that was never timed evaluates this many documents of each task.
PROBE_DOCUMENTS = 8


def run_sweep(path: Path, dry_run: bool = False, started: float | None = None) -> None:
    """Run, or go on with, the sweep that a YAML file describes.

    Args:
        path: the configuration, see docs/sweep.md.
        dry_run: only print what would be done and what it would cost.
        started: ``time.perf_counter()`` from which on time is counted.

    Raises:
        UserError: one line; nothing is changed then that was finished before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep runs in one process: start it without accelerate launch or torchrun")
    clock = Clock(started)
    config = read_config(path)
    plan = make_plan(config, str(path))
    _check_writable(plan.output)
    with logging_only(logging.WARNING, "lm_eval", "harness_rect.hparams", "harness_rect.edited_hf"):
        if dry_run:
            with _locked(plan.output) if plan.output.is_dir() else _nothing():
                DryRun(plan).show(Console())
            return
        plan.output.mkdir(parents=True, exist_ok=True)
        with _locked(plan.output):
            Sweep(plan, clock).run()


class Sweep:
    """One process's work on a plan. The output folder must be locked."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self.plan, self.clock = plan, clock
        self.rows = {row.name: row for row in _rows(plan)}
        self.display = Display(Progress(list(self.rows.values())), Console(stderr=True))
        self._timing: dict[str, dict[str, float]] = _timing(plan.output)
        self._warnings: dict[str, list[str]] = {}  # of the edits an edits= names

    def run(self) -> None:
        _remove_leftovers(self.plan)
        self.plan.write_orders()
        with self.clock.running("loading"):
            describe_machine()
        with self.display.shown():
            for model in self.plan.config.models:
                self._model(model)
        shutil.rmtree(self.plan.output / STATES, ignore_errors=True)
        overhead = {k: s for k, s in self.clock.seconds.items() if k not in (EDITING, EVALUATING)}
        Console().print(timing_table(list(self.rows.values()), overhead))
        print(f"results: {self.plan.output}")

    def _model(self, entry: ModelEntry) -> None:
        with self.clock.running("loading"):
            lm = load_model(entry, self.plan.config)
            evaluator = Evaluator(lm, self.plan.config, _task_arguments(entry, self.plan.config))
        with self.clock.running("building requests"):
            evaluator.build()
        with self.clock.running("checking"):
            checked = Checked(self.plan, entry, lm, evaluator)
            self._write_index()
        for evaluation in checked.done:
            row = self.rows[_row_name(self.plan, evaluation)]
            row.evaluations += 1
            row.edits = max(row.edits, evaluation.n_edits)
        if checked.done:
            self.display.say(f"{entry.label}: {len(checked.done)} evaluations found")
        for evaluation in checked.todo:
            if evaluation.trajectory is None:
                self._evaluate(evaluator, evaluation, None, checked.made_of[evaluation.folder])
        for trajectory in self.plan.trajectories:
            todo = [e for e in checked.todo if e.trajectory is trajectory]
            if todo:
                self._trajectory(lm, evaluator, trajectory, todo, checked)

    def _trajectory(
        self,
        lm: EditedHF,
        evaluator: Evaluator,
        trajectory: Trajectory,
        todo: Sequence[Evaluation],
        checked: Checked,
    ) -> None:
        at = {evaluation.n_edits: evaluation for evaluation in todo}
        row = self.rows[_row_name(self.plan, todo[0])]
        editing_before = self.clock.read(EDITING)
        started_at: list[int] = []
        base = {kind: row.seconds[kind] for kind in row.seconds}

        def stepped(done: int) -> None:
            started_at.append(done)
            row.edits, row.doing = max(done, row.edits), "editing"
            row.edits_made = done - started_at[0]
            row.seconds[EDITING] = base[EDITING] + self.clock.read(EDITING) - editing_before

        def reached(report: dict[str, Any]) -> None:
            evaluation = at[report["n_edits"]]
            made_of = checked.made_of.get(evaluation.folder) or checked.identity(evaluation, session)
            # As a run of these edits alone would report them.
            spec = evaluation.model_args["edits"]
            if spec not in self._warnings:
                self._warnings[spec] = list(load_edits(spec).warnings)
            alone = report | {"edits_spec": spec, "edit_warnings": self._warnings[spec]}
            self._evaluate(evaluator, evaluation, alone, made_of)

        with self.clock.running(EDITING):
            session = make_session(lm, trajectory)
            try:
                cache = _TimedCache(self.plan.output / STATES, self.clock)
                report = session.run(cache, checkpoints=list(at), on_checkpoint=reached, on_step=stepped)
            finally:
                session.revert()
        row.seconds[EDITING] = base[EDITING] + self.clock.read(EDITING) - editing_before
        row.doing = ""
        self._record(row)
        cache.path(report["run"]).unlink(missing_ok=True)

    def _evaluate(
        self,
        evaluator: Evaluator,
        evaluation: Evaluation,
        report: dict[str, Any] | None,
        made_of: dict[str, Any],
    ) -> None:
        row = self.rows[_row_name(self.plan, evaluation)]
        row.doing = "evaluating"
        before = self.clock.read(EVALUATING)
        with self.clock.running(EVALUATING):
            finished = evaluator.evaluate(evaluation, report)
        seconds = self.clock.read(EVALUATING) - before
        with self.clock.running("writing"):
            finished.write(evaluation.folder, _coordinates(evaluation) | {"made_of": made_of})
            row.evaluations += 1
            row.evaluations_made += 1
            row.seconds[EVALUATING] += seconds
            row.doing = ""
            self._record(row)
        what = f"{row.name}, {evaluation.n_edits} edits" if evaluation.trajectory else row.name
        self.display.say(f"{what}: evaluated in {duration(seconds)}")

    def _record(self, row: Row) -> None:
        """Keep what was timed for later runs' estimates."""
        kept = self._timing.setdefault(row.name, {})
        if row.edits_made:
            kept["seconds_per_edit"] = row.seconds[EDITING] / row.edits_made
        if row.evaluations_made:
            kept["seconds_per_evaluation"] = row.seconds[EVALUATING] / row.evaluations_made
        self._write_index()

    def _write_index(self) -> None:
        config = self.plan.config
        index = {
            "config": config.model_dump(mode="json"),
            "edits_sha256": fingerprint(self.plan.stream.edits),
            "evaluations": [
                _coordinates(evaluation)
                | {
                    "results": str(evaluation.file.relative_to(self.plan.output)),
                    "done": evaluation.file.is_file(),
                }
                for evaluation in self.plan.evaluations
            ],
            "timing": self._timing,
        }
        with written_whole(self.plan.output / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Checked:
    """Which evaluations of a model are done, and what the others will be made of.

    Raises:
        UserError: a results file is there that something else went into than would now.
    """

    def __init__(
        self, plan: Plan, entry: ModelEntry, lm: EditedHF, evaluator: Evaluator, planning: bool = False
    ) -> None:
        self.done: list[Evaluation] = []
        self.todo: list[Evaluation] = []
        self.made_of: dict[Path, dict[str, Any]] = {}
        self._tasks = evaluator.identity()
        self._model = {"model_fingerprint": model_fingerprint(lm.model)}
        session: EditSession | None = None
        of: Trajectory | None = None
        read: set[tuple[Any, ...]] = set()
        for evaluation in plan.of_model(entry):
            if evaluation.trajectory is not None and evaluation.trajectory is not of:
                of = evaluation.trajectory
                session = make_session(lm, of)  # also checks its hyper-parameters
                moments = (of.config.method, of.config.hparams, of.config.stats)
                if moments not in read and not planning:  # what is missing is found now, not after hours
                    session.prepare()
                    read.add(moments)
            results = read_results(evaluation.file)
            if evaluation.trajectory is None or results is not None:
                self.made_of[evaluation.folder] = self.identity(evaluation, session)
            if results is None:
                self.todo.append(evaluation)
                continue
            difference = _difference(results["sweep"].get("made_of"), self.made_of[evaluation.folder])
            if difference:
                raise UserError(
                    f"{evaluation.file}: made with {difference}; remove {evaluation.folder},"
                    " or give another output folder"
                )
            self.done.append(evaluation)

    def identity(self, evaluation: Evaluation, session: EditSession | None) -> dict[str, Any]:
        """Everything that determines the results of ``evaluation``, as plain JSON."""
        if evaluation.trajectory is None or session is None:
            edited: dict[str, Any] = self._model | {"edits_sha256": fingerprint(evaluation.edits)}
        else:
            edited = session.identity(evaluation.n_edits)
        made_of = {"model_args": evaluation.model_args, "edited": edited, **self._tasks}
        return json.loads(json.dumps(made_of, default=str))


class DryRun:
    """What a sweep would do and what that would cost."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def show(self, console: Console) -> None:
        config, timing = self.plan.config, _timing(self.plan.output)
        table = Table(title=f"{self.plan.output}: what is left to do")
        for heading in ("", "edits", "evaluations", "requests", "seconds"):
            table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
        totals = [0, 0, 0, 0.0]
        done, measured = 0, 0
        for entry in config.models:
            lm = load_model(entry, config)
            evaluator = Evaluator(lm, config, _task_arguments(entry, config))
            evaluator.build()
            checked = Checked(self.plan, entry, lm, evaluator, planning=True)
            done += len(checked.done)
            if not checked.todo:
                continue
            probe = Probe(self.plan, entry, lm, evaluator)
            for name, group in _by_row(self.plan, checked.todo).items():
                known = timing.get(name, {})
                trajectory = group[0].trajectory
                requests = sum(evaluator.requests(evaluation.edits) for evaluation in group)
                edits = group[-1].n_edits
                measured += "seconds_per_evaluation" in known
                evaluation = known.get("seconds_per_evaluation")
                seconds = evaluation * len(group) if evaluation else probe.seconds_per_request() * requests
                if trajectory is not None:
                    each = known.get("seconds_per_edit") or probe.seconds_per_edit(trajectory)
                    seconds += each * edits
                cells = [edits, len(group), requests, seconds]
                table.add_row(name, *(f"{cell:.0f}" for cell in cells))
                totals = [a + b for a, b in zip(totals, cells, strict=True)]
        table.add_section()
        table.add_row("together", *(f"{cell:.0f}" for cell in totals))
        console.print(table)
        console.print(f"{done} evaluations are done already.")
        if totals[1]:
            how = "from earlier runs in this folder" if measured else "from a short probe"
            console.print(
                f"About {duration(totals[3])}, {how}; edited models often ramble on, which takes longer.",
                soft_wrap=True,
            )


class Probe:
    """How long things take, from doing a little of each, once."""

    def __init__(self, plan: Plan, entry: ModelEntry, lm: EditedHF, evaluator: Evaluator) -> None:
        self._plan, self._entry, self._lm, self._evaluator = plan, entry, lm, evaluator
        self._request: float | None = None
        self._edit: dict[str, float] = {}

    def seconds_per_request(self) -> float:
        if self._request is None:
            limit = min(self._plan.config.limit or PROBE_DOCUMENTS, PROBE_DOCUMENTS)
            config = self._plan.config.model_copy(update={"limit": limit})
            small = Evaluator(self._lm, config, _task_arguments(self._entry, config))
            small.build()
            edits = self._plan.stream.edits[:PROBE_DOCUMENTS]
            requests = small.requests(edits)
            evaluation = Evaluation(self._entry, None, 0, Path(), _task_arguments(self._entry, config), edits)
            started = time.perf_counter()
            small.evaluate(evaluation, None)
            self._request = (time.perf_counter() - started) / requests
        return self._request

    def seconds_per_edit(self, trajectory: Trajectory) -> float:
        """Of one step of the method; what a run does once, before its first step, is not counted."""
        if trajectory.label not in self._edit:
            size = trajectory.config.edit_batch_size
            session = make_session(self._lm, trajectory, size)
            try:
                step = session.run(on_step=lambda done: None)["steps"][0]
            finally:
                session.revert()
            self._edit[trajectory.label] = (step["seconds"] + step["measuring_seconds"]) / size
        return self._edit[trajectory.label]


def load_model(entry: ModelEntry, config: SweepConfig) -> QuietHF:
    """The unedited model, as lm-eval would load it.

    Raises:
        UserError: it cannot be loaded.
    """
    settings = {"batch_size": config.batch_size, "device": config.device}
    try:
        return QuietHF.create_from_arg_obj(entry.arguments | {"method": "none"}, settings)
    except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"models: {entry.pretrained} cannot be loaded as asked: {reason}") from None


def make_session(lm: EditedHF, trajectory: Trajectory, n_edits: int | None = None) -> EditSession:
    """The editing of a trajectory, up to its last checkpoint or the first ``n_edits``.

    Raises:
        UserError: the model cannot be edited so.
    """
    edits = EditStream(trajectory.edits[:n_edits], trajectory.config.edits or "")
    name = layout_name(trajectory.model.pretrained)
    return EditSession(
        lm.model, lm.tokenizer, trajectory.config, edits, name, add_special_tokens=lm.add_bos_token
    )


class _TimedCache(EditCache):
    """Unfinished trajectories, and how long saving them takes."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(folder)
        self._clock = clock

    def save(self, *arguments: Any) -> None:
        with self._clock.running("saving states"):
            super().save(*arguments)

    def save_partial(self, *arguments: Any) -> None:
        with self._clock.running("saving states"):
            super().save_partial(*arguments)


def _coordinates(evaluation: Evaluation) -> dict[str, Any]:
    """Where an evaluation stands in its sweep."""
    trajectory = evaluation.trajectory
    where: dict[str, Any] = {"model": evaluation.model.label, "n_edits": evaluation.n_edits}
    if trajectory is None:
        return where | {"method": "none"}
    config = trajectory.config
    return where | {
        "label": trajectory.label,
        "method": config.method,
        "regularizer": config.regularizer.name,
        "keep": config.regularizer.model_dump().get("keep"),
        "order": trajectory.order.number,
        "edit_seed": config.edit_seed,
    }


def _task_arguments(entry: ModelEntry, config: SweepConfig) -> dict[str, Any]:
    """What the tasks are told of an unedited model."""
    data = {} if config.data is None else {"data": config.data}
    return entry.arguments | {"method": "none", "edits": config.edits} | data


def _row_name(plan: Plan, evaluation: Evaluation) -> str:
    """One row of the table: the folder above ``edits_NNN``, or the unedited model's."""
    folder = evaluation.folder.parent if evaluation.trajectory else evaluation.folder
    return folder.relative_to(plan.output).as_posix()


def _by_row(plan: Plan, evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    grouped: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        grouped.setdefault(_row_name(plan, evaluation), []).append(evaluation)
    return grouped


def _rows(plan: Plan) -> Iterator[Row]:
    for name, group in _by_row(plan, plan.evaluations).items():
        trajectory = group[0].trajectory
        method = "" if trajectory is None else f"{trajectory.model.label} {trajectory.config.method}"
        yield Row(name, method, group[-1].n_edits, len(group))


def _difference(there: Any, here: Any, path: str = "") -> str:
    """The first difference between two JSON trees: "limit 5, now 10"; empty if they are equal."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*here, *(key for key in there if key not in here)]:
            if found := _difference(there.get(key), here.get(key), f"{path}.{key}" if path else key):
                return found
        return ""
    return "" if there == here else f"{path} {_brief(there)}, now {_brief(here)}"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _timing(output: Path) -> dict[str, dict[str, float]]:
    """What earlier runs in this folder took, by row."""
    try:
        timing = json.loads((output / INDEX).read_text(encoding="utf-8"))["timing"]
        return {str(name): {k: float(v) for k, v in row.items()} for name, row in timing.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}  # it is only good for estimates


def _remove_leftovers(plan: Plan) -> None:
    """What a killed process was about to write, in the folders of this plan and under our own names only."""
    folders = {plan.output, plan.output / STATES, plan.output / "edits"} | {
        e.folder for e in plan.evaluations
    }
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if path.is_dir() and path.name.startswith(".results."):
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()


def _check_writable(output: Path) -> None:
    """Raise UserError where ``output``, there already or not, could not be written to."""
    there = next(folder for folder in [output, *output.absolute().parents] if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output: {output}: cannot be written; {there} is no folder that you can write to")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Only one process works in an output folder.

    Raises:
        UserError: another one does.
    """
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{output}: another sweep is running in this folder; wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()
