"""``harness-rect sweep``: every trajectory edits once and is evaluated at its checkpoints, in place.

A sweep can be killed at any moment and resumed by the same command. An evaluation is done when its
``results.json`` exists; a trajectory resumes from its last saved state, at a checkpoint or at most half a
minute old. A results file records everything that determines its scores and is reused only if none of that
has changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from harness_rect.compat.lm_eval import describe_machine
from harness_rect.errors import Failed, UserError
from harness_rect.experiments.sweep.clock import Clock, read_timing
from harness_rect.experiments.sweep.display import EDITING, EVALUATING, Display, Row, timing_table
from harness_rect.experiments.sweep.dry_run import show_dry_run
from harness_rect.experiments.sweep.folder import INDEX, Folder
from harness_rect.experiments.sweep.named import read_sweep
from harness_rect.experiments.sweep.plan import Plan, Shard, make_plan
from harness_rect.experiments.sweep.ray_workers import WAITING, Resources, run_with_ray
from harness_rect.experiments.sweep.work import Worker, rows_of
from harness_rect.io.files import check_parent
from harness_rect.io.progress import console, logging_only

#: Loggers that a sweep mutes up to warnings.
QUIET = ("lm_eval", "harness_rect.hparams", "harness_rect.edited_hf")


def run_sweep(
    asked: Path | str,
    dry_run: bool = False,
    started: float | None = None,
    output: str | None = None,
    models: Sequence[str] = (),
    shard: Shard | None = None,
    ray: Resources | None = None,
    times: bool = True,
) -> None:
    """Run, or resume, the sweep that a YAML file describes.

    Args:
        asked, output, models: see :func:`~harness_rect.experiments.sweep.named.read_sweep`.
        dry_run: only print what would be done and what it would cost.
        started: ``time.perf_counter()`` at the start of the command.
        shard: the part of the sweep to run; None for all of it.
        ray: what each worker takes, if trajectories run in workers of Ray; None runs them in this process.
        times: print a table of the time that was spent.

    Raises:
        UserError: one line; what was finished before is unchanged.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep runs in one process: start it without accelerate launch or torchrun")
    clock = Clock(started)
    plan = make_plan(read_sweep(str(asked), output, models), str(asked))
    part = plan.part(shard) if shard else plan
    check_parent(plan.output / INDEX)
    with logging_only(logging.WARNING, *QUIET):
        if dry_run:
            show_dry_run(part, read_timing(plan.output / INDEX), console())
            return
        folder = Folder(plan, shard)
        with folder.held():
            _Sweep(folder, part, clock).run(ray, times)
            if lost := sum(not evaluation.file.is_file() for evaluation in part.evaluations):
                raise Failed(
                    f"{plan.output}: {lost} evaluations are gone; was the folder removed meanwhile?"
                    " Give the same command again"
                )
    print(f"results: {plan.output} ({folder.done} of {len(plan.evaluations)} evaluations are done)")


class _Sweep:
    """Runs a part of a plan, and shows and records how far it is."""

    def __init__(self, folder: Folder, part: Plan, clock: Clock) -> None:
        self.folder, self.part, self.clock = folder, part, clock
        self.rows = rows_of(part)
        self.display = Display(list(self.rows.values()), console(stderr=True))

    def run(self, ray: Resources | None, times: bool) -> None:
        self.folder.plan.write_orders()
        with self.display.shown():
            if ray is None:
                with self.clock.running("loading"):
                    describe_machine()
                Worker(self.folder.states, self.clock, self.changed).run(self.part, self.rows)
            else:
                run_with_ray(self.part, self.folder.states, ray, self.clock, self.changed)
        if times:
            work = (EDITING, EVALUATING, WAITING)
            overhead = {kind: seconds for kind, seconds in self.clock.seconds.items() if kind not in work}
            console().print(timing_table(self.display.rows, overhead))

    def changed(self, row: Row, line: str) -> None:
        """Show a row; record its times when an evaluation or the trajectory has ended."""
        vars(self.rows[row.name]).update(vars(row))
        if line:
            self.display.log(line)
        if row.doing or not (row.edits_made or row.evaluations_made):
            return
        times = {}
        if row.edits_made:
            times["seconds_per_edit"] = row.seconds[EDITING] / row.edits_made
        if row.evaluations_made:
            times["seconds_per_evaluation"] = row.seconds[EVALUATING] / row.evaluations_made
        with self.clock.running("writing"):
            self.folder.write_index({row.name: times})
