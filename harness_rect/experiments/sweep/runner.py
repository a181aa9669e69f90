"""``harness-rect sweep``: every trajectory edits once and is evaluated at its checkpoints, in place.

A sweep can be killed at any moment and resumed by the same command. An evaluation is done when its
``results.json`` exists; a trajectory resumes from its last saved state, at a checkpoint or at most half a
minute old. A results file records everything that determines its scores and is reused only if none of that
has changed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from harness_rect.compat.lm_eval import describe_machine
from harness_rect.edits import fingerprint, load_edits
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.checked import (
    Checked,
    by_row,
    coordinates,
    load_model,
    make_session,
    row_name,
)
from harness_rect.experiments.sweep.clock import Clock, read_timing
from harness_rect.experiments.sweep.display import EDITING, EVALUATING, Display, Row, duration, timing_table
from harness_rect.experiments.sweep.dry_run import show_dry_run
from harness_rect.experiments.sweep.evaluate import Evaluator, prompt_format
from harness_rect.experiments.sweep.named import read_sweep
from harness_rect.experiments.sweep.networks import train_networks
from harness_rect.experiments.sweep.plan import Evaluation, ModelEntry, Plan, Trajectory, make_plan
from harness_rect.io.files import check_parent, written_whole
from harness_rect.io.progress import console, logging_only
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.models import EditableLM
from harness_rect.moments.layout import layout_name
from harness_rect.session.runs import EditCache

log = logging.getLogger("harness_rect.sweep")

#: In the output folder: unfinished trajectories, and the lock of the process that works in it.
STATES, LOCK, INDEX = ".states", ".lock", "sweep.json"


def run_sweep(
    asked: Path | str,
    dry_run: bool = False,
    started: float | None = None,
    output: str | None = None,
    models: Sequence[str] = (),
) -> None:
    """Run, or resume, the sweep that a YAML file describes.

    Args:
        asked, output, models: see :func:`~harness_rect.experiments.sweep.named.read_sweep`.
        dry_run: only print what would be done and how long it would take.
        started: ``time.perf_counter()`` at the start of the command.

    Raises:
        UserError: one line; what was finished before is unchanged.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep runs in one process: start it without accelerate launch or torchrun")
    clock = Clock(started)
    config = read_sweep(str(asked), output, models)
    plan = make_plan(config, str(asked))
    check_parent(plan.output / INDEX)
    with logging_only(logging.WARNING, "lm_eval", "harness_rect.hparams", "harness_rect.edited_hf"):
        if dry_run:
            with _locked(plan.output) if plan.output.is_dir() else nullcontext():
                show_dry_run(plan, read_timing(plan.output / INDEX), console())
            return
        plan.output.mkdir(parents=True, exist_ok=True)
        with _locked(plan.output):
            Sweep(plan, clock).run()


class Sweep:
    """Runs a plan in this process; the output folder must be locked."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self.plan, self.clock = plan, clock
        self.rows = {row.name: row for row in _rows(plan)}
        self.display = Display(list(self.rows.values()), console(stderr=True))
        self._timing = read_timing(plan.output / INDEX)
        self._warnings: dict[str, list[str]] = {}  # value of edits= -> warnings of its reader

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
        console().print(timing_table(self.display.rows, overhead))
        print(f"results: {self.plan.output}")

    def _model(self, entry: ModelEntry) -> None:
        with self.clock.running("loading"):
            lm = load_model(entry, self.plan.config)
        if (folder := self.plan.config.networks(entry)) and (given := self.plan.config.train_mend):
            with self.clock.running("training MEND"):
                format = prompt_format(lm, self.plan.config)
                editable = EditableLM(lm.model, lm.tokenizer, lm.add_bos_token, format)
                train_networks(editable, given, folder, layout_name(entry.pretrained))
        with self.clock.running("loading"):
            evaluator = Evaluator(lm, self.plan.config, self.plan.config.model_args(entry))
        with self.clock.running("building requests"):
            evaluator.build()
        with self.clock.running("checking"):
            checked = Checked(self.plan, entry, lm, evaluator)
            self._write_index()
        for evaluation in checked.done:
            row = self.rows[row_name(self.plan, evaluation)]
            row.evaluations += 1
            row.edits = max(row.edits, evaluation.n_edits)
        if checked.done:
            self.display.log(f"{entry.label}: {len(checked.done)} evaluations found")
        for evaluation in checked.todo:
            if evaluation.trajectory is None:
                self._evaluate(evaluator, evaluation, None, {}, checked.made_of[evaluation.folder])
        for trajectory in self.plan.trajectories:
            if todo := [e for e in checked.todo if e.trajectory is trajectory]:
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
        row = self.rows[row_name(self.plan, todo[0])]
        editing_before = self.clock.read(EDITING)
        started_at: list[int] = []

        def stepped(done: int) -> None:
            started_at.append(done)
            row.edits, row.doing = max(done, row.edits), "editing"
            row.edits_made = done - started_at[0]
            row.seconds[EDITING] = self.clock.read(EDITING) - editing_before

        def reached(report: dict[str, Any]) -> None:
            evaluation = at[report["n_edits"]]
            made_of = checked.made_of.get(evaluation.folder) or checked.identity(evaluation, session)
            # The report of a run of these edits only.
            spec = evaluation.model_args["edits"]
            if spec not in self._warnings:
                self._warnings[spec] = list(load_edits(spec).warnings)
            alone = report | {"edits_spec": spec, "edit_warnings": self._warnings[spec]}
            self._evaluate(evaluator, evaluation, alone, session.originals, made_of)

        with self.clock.running(EDITING):
            session = make_session(lm, trajectory)
            try:
                cache = _TimedCache(self.plan.output / STATES, self.clock)
                report = session.run(cache, checkpoints=list(at), on_checkpoint=reached, on_step=stepped)
            finally:
                session.revert()
        row.seconds[EDITING] = self.clock.read(EDITING) - editing_before
        row.doing = ""
        self._record(row)
        cache.path(report["run"]).unlink(missing_ok=True)

    def _evaluate(
        self,
        evaluator: Evaluator,
        evaluation: Evaluation,
        report: dict[str, Any] | None,
        originals: Mapping[str, Tensor],
        made_of: dict[str, Any],
    ) -> None:
        row = self.rows[row_name(self.plan, evaluation)]
        row.doing = "evaluating"
        before = self.clock.read(EVALUATING)
        with self.clock.running(EVALUATING):
            finished = evaluator.evaluate(evaluation, report, originals)
        seconds = self.clock.read(EVALUATING) - before
        with self.clock.running("writing"):
            finished.write(evaluation.folder, coordinates(evaluation) | {"made_of": made_of})
            row.evaluations += 1
            row.evaluations_made += 1
            row.seconds[EVALUATING] += seconds
            row.doing = ""
            self._record(row)
        what = f"{row.name}, {evaluation.n_edits} edits" if evaluation.trajectory else row.name
        self.display.log(f"{what}: evaluated in {duration(seconds)}")

    def _record(self, row: Row) -> None:
        """Save the times of a row, for the estimates of later runs."""
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
                coordinates(evaluation)
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


class _TimedCache(EditCache):
    """Unfinished trajectories; the time to save them is counted."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(folder)
        self._clock = clock

    def save(self, *arguments: Any, **named: Any) -> None:
        with self._clock.running("saving states"):
            super().save(*arguments, **named)


def _rows(plan: Plan) -> Iterator[Row]:
    for name, group in by_row(plan, plan.evaluations).items():
        trajectory = group[0].trajectory
        method = "" if trajectory is None else f"{trajectory.model.label} {trajectory.config.method}"
        yield Row(name, method, group[-1].n_edits, len(group))


def _remove_leftovers(plan: Plan) -> None:
    """Remove temporary files of a killed process from the folders of this plan."""
    folders = {plan.output, plan.output / STATES, plan.output / "edits"}
    for folder in folders | {evaluation.folder for evaluation in plan.evaluations}:
        for path in folder.glob(".*.tmp"):
            if path.is_file():
                path.unlink()
            elif path.name.startswith(".results."):
                shutil.rmtree(path)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output folder.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(output / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        problem = "another sweep is running in this folder; wait for it, or stop it"
        raise UserError(f"{output}: {problem}") from None
    try:
        yield
    finally:
        lock.release()
