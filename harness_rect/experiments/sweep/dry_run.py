"""What a sweep would do and what that would cost, from earlier runs or a short probe."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness_rect.experiments.sweep.checked import (
    Checked,
    by_row,
    load_model,
    make_session,
)
from harness_rect.experiments.sweep.clock import Timing
from harness_rect.experiments.sweep.display import duration
from harness_rect.experiments.sweep.evaluate import Evaluator
from harness_rect.experiments.sweep.plan import Evaluation, ModelEntry, Plan, Trajectory
from harness_rect.model_wrappers.edited_hf import EditedHF

#: A dry run of a sweep that was never timed evaluates this many documents of each task.
PROBE_DOCUMENTS = 8


def show_dry_run(plan: Plan, timing: Timing, console: Console) -> None:
    """Print what a sweep would do and what that would cost.

    Args:
        timing: of earlier runs; rows it lacks are estimated from a short probe.
    """
    config = plan.config
    table = Table(title=f"{plan.output}: what is left to do")
    for heading in ("", "edits", "evaluations", "requests", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    totals, done, measured = [0, 0, 0, 0.0], 0, False
    for entry in config.models:
        lm = load_model(entry, config)
        evaluator = Evaluator(lm, config, config.model_args(entry))
        evaluator.build()
        checked = Checked(plan, entry, lm, evaluator, planning=True)
        done += len(checked.done)
        if not checked.todo:
            continue
        probe = Probe(plan, entry, lm, evaluator)
        for name, group in by_row(plan, checked.todo).items():
            known = timing.get(name, {})
            trajectory = group[0].trajectory
            requests = sum(evaluator.requests(evaluation.edits) for evaluation in group)
            edits = group[-1].n_edits
            measured |= "seconds_per_evaluation" in known
            evaluation = known.get("seconds_per_evaluation")
            seconds = evaluation * len(group) if evaluation else probe.seconds_per_request() * requests
            if trajectory is not None:
                each = known.get("seconds_per_edit") or probe.seconds_per_edit(trajectory)
                seconds += each * edits
            cells = [edits, len(group), requests, seconds]
            table.add_row(name, *(f"{cell:.0f}" for cell in cells))
            totals = [a + b for a, b in zip(totals, cells, strict=True)]
    table.add_section()
    table.add_row("total", *(f"{cell:.0f}" for cell in totals))
    console.print(table)
    console.print(f"{done} evaluations are done already.")
    if totals[1]:
        how = "from earlier runs in this folder" if measured else "from a short probe"
        console.print(
            f"About {duration(totals[3])}, {how}; edited models often generate longer answers.",
            soft_wrap=True,
        )


class Probe:
    """Seconds per request and per edit, each measured once on a few."""

    def __init__(self, plan: Plan, entry: ModelEntry, lm: EditedHF, evaluator: Evaluator) -> None:
        self._plan, self._entry, self._lm, self._evaluator = plan, entry, lm, evaluator
        self._request: float | None = None
        self._edit: dict[str, float] = {}

    def seconds_per_request(self) -> float:
        if self._request is None:
            limit = min(self._plan.config.limit or PROBE_DOCUMENTS, PROBE_DOCUMENTS)
            config = self._plan.config.model_copy(update={"limit": limit})
            small = Evaluator(self._lm, config, config.model_args(self._entry))
            small.build()
            edits = self._plan.stream.edits[:PROBE_DOCUMENTS]
            requests = small.requests(edits)
            evaluation = Evaluation(self._entry, None, 0, Path(), config.model_args(self._entry), edits)
            started = time.perf_counter()
            small.evaluate(evaluation, None, {})
            self._request = (time.perf_counter() - started) / requests
        return self._request

    def seconds_per_edit(self, trajectory: Trajectory) -> float:
        """Of one step of the method, without what a run does once before its first step."""
        if trajectory.label not in self._edit:
            size = trajectory.config.edit_batch_size
            session = make_session(self._lm, trajectory, size)
            try:
                step = session.run(on_step=lambda done: None)["steps"][0]
            finally:
                session.revert()
            self._edit[trajectory.label] = (step["seconds"] + step["measuring_seconds"]) / size
        return self._edit[trajectory.label]
