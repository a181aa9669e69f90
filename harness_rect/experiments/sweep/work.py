"""The work of a sweep: a model is loaded once, every trajectory edits it and is evaluated at checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from harness_rect.edits import load_edits
from harness_rect.experiments.sweep.checked import (
    Checked,
    by_row,
    coordinates,
    load_model,
    make_session,
    row_name,
)
from harness_rect.experiments.sweep.clock import Clock
from harness_rect.experiments.sweep.display import EDITING, EVALUATING, Row, duration
from harness_rect.experiments.sweep.evaluate import Evaluator, prompt_format
from harness_rect.experiments.sweep.networks import train_networks
from harness_rect.experiments.sweep.plan import Evaluation, ModelEntry, Plan, SweepConfig, Trajectory
from harness_rect.io.resume import State
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.models import EditableLM
from harness_rect.moments.layout import layout_name
from harness_rect.session.runs import EditCache, KeptRun

#: Called with a row that has changed, and a line for the log or "".
Changed = Callable[[Row, str], None]


def rows_of(plan: Plan) -> dict[str, Row]:
    """Name -> row of the table for each trajectory and unedited model."""
    rows = {}
    for name, group in by_row(plan, plan.evaluations).items():
        trajectory = group[0].trajectory
        method = "" if trajectory is None else f"{trajectory.model.label} {trajectory.config.method}"
        rows[name] = Row(name, method, group[-1].n_edits, len(group))
    return rows


@dataclass(frozen=True)
class _Loaded:
    config: SweepConfig
    entry: ModelEntry
    lm: EditedHF
    evaluator: Evaluator


class Worker:
    """Runs parts of sweeps in this process. The model of the last part stays loaded.

    Args:
        states: the folder for unfinished trajectories.
    """

    def __init__(self, states: Path, clock: Clock, changed: Changed) -> None:
        self.states, self.clock, self.changed = states, clock, changed
        self._loaded: _Loaded | None = None
        self._warnings: dict[str, list[str]] = {}  # value of edits= -> warnings of its reader

    def run(self, plan: Plan, rows: Mapping[str, Row]) -> None:
        """Make the evaluations of a plan that are not done.

        Raises:
            UserError: one line; what was finished before is unchanged.
        """
        for entry in plan.config.models:
            if plan.of_model(entry):
                self._model(plan, entry, rows)

    def _model(self, plan: Plan, entry: ModelEntry, rows: Mapping[str, Row]) -> None:
        loaded = self._load(plan, entry)
        with self.clock.running("checking"):
            checked = Checked(plan, entry, loaded.lm, loaded.evaluator)
        for evaluation in checked.done:
            row = rows[row_name(plan, evaluation)]
            row.evaluations += 1
            row.edits = max(row.edits, evaluation.n_edits)
            self.changed(row, "")
        for evaluation in checked.todo:
            if evaluation.trajectory is None:
                row = rows[row_name(plan, evaluation)]
                self._evaluate(loaded, evaluation, row, None, {}, checked.made_of[evaluation.folder])
        for trajectory in plan.trajectories:
            if todo := [e for e in checked.todo if e.trajectory is trajectory]:
                self._trajectory(loaded, trajectory, todo, rows[row_name(plan, todo[0])], checked)

    def _load(self, plan: Plan, entry: ModelEntry) -> _Loaded:
        """The model and its tasks; those that are loaded, if they are the same."""
        config = plan.config
        if self._loaded is None or (self._loaded.config, self._loaded.entry) != (config, entry):
            self._loaded = None  # before the next one is loaded
            with self.clock.running("loading"):
                lm = load_model(entry, config)
                evaluator = Evaluator(lm, config, config.model_args(entry))
            with self.clock.running("building requests"):
                evaluator.build()
            self._loaded = _Loaded(config, entry, lm, evaluator)
        self._train(plan, entry, self._loaded.lm)
        return self._loaded

    def _train(self, plan: Plan, entry: ModelEntry, lm: EditedHF) -> None:
        """Train MEND's networks if the plan edits with them; other processes wait for the first."""
        folder, given = plan.config.networks(entry), plan.config.train_mend
        asked = [t for t in plan.trajectories if t.model is entry and t.config.hparams == str(folder)]
        if folder is None or given is None or not asked:
            return
        with self.clock.running("training MEND"):
            editable = EditableLM(lm.model, lm.tokenizer, lm.add_bos_token, prompt_format(lm, plan.config))
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                train_networks(editable, given, folder, layout_name(entry.pretrained))

    def _trajectory(
        self,
        loaded: _Loaded,
        trajectory: Trajectory,
        todo: Sequence[Evaluation],
        row: Row,
        checked: Checked,
    ) -> None:
        at = {evaluation.n_edits: evaluation for evaluation in todo}
        editing_before = self.clock.read(EDITING)
        started_at: list[int] = []

        def stepped(done: int) -> None:
            started_at.append(done)
            row.edits, row.doing = max(done, row.edits), "editing"
            row.edits_made = done - started_at[0]
            row.seconds[EDITING] = self.clock.read(EDITING) - editing_before
            self.changed(row, "")

        def reached(report: dict[str, Any]) -> None:
            evaluation = at[report["n_edits"]]
            made_of = checked.made_of.get(evaluation.folder) or checked.identity(evaluation, session)
            # The report of a run of these edits only.
            spec = evaluation.model_args["edits"]
            if spec not in self._warnings:
                self._warnings[spec] = list(load_edits(spec).warnings)
            alone = report | {"edits_spec": spec, "edit_warnings": self._warnings[spec]}
            self._evaluate(loaded, evaluation, row, alone, session.originals, made_of)

        with self.clock.running(EDITING):
            session = make_session(loaded.lm, trajectory)
            try:
                cache = _TimedCache(self.states, self.clock)
                report = session.run(cache, checkpoints=list(at), on_checkpoint=reached, on_step=stepped)
            finally:
                session.revert()
        row.seconds[EDITING] = self.clock.read(EDITING) - editing_before
        row.doing = ""
        self.changed(row, "")
        cache.remove(report["run"])

    def _evaluate(
        self,
        loaded: _Loaded,
        evaluation: Evaluation,
        row: Row,
        report: dict[str, Any] | None,
        originals: Mapping[str, Tensor],
        made_of: dict[str, Any],
    ) -> None:
        row.doing = "evaluating"
        self.changed(row, "")
        before = self.clock.read(EVALUATING)
        with self.clock.running(EVALUATING):
            finished = loaded.evaluator.evaluate(evaluation, report, originals)
        seconds = self.clock.read(EVALUATING) - before
        with self.clock.running("writing"):
            finished.write(evaluation.folder, sweep=coordinates(evaluation) | {"made_of": made_of})
            row.evaluations += 1
            row.evaluations_made += 1
            row.seconds[EVALUATING] += seconds
            row.doing = ""
            what = f"{row.name}, {evaluation.n_edits} edits" if evaluation.trajectory else row.name
            self.changed(row, f"{what}: evaluated in {duration(seconds)}")


class _TimedCache(EditCache):
    """Unfinished trajectories; the time to save them is counted."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(folder)
        self._clock = clock

    def save(self, run: KeptRun) -> None:
        with self._clock.running("saving states"):
            super().save(run)

    def save_partial(self, key: str, state: State) -> None:
        with self._clock.running("saving states"):
            super().save_partial(key, state)
