"""What a sweep would do, and an estimate of the time from earlier runs or a short measurement."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from accelerate.utils import get_max_memory
from rich.console import Console
from rich.table import Table

from harness_rect.errors import UserError
from harness_rect.experiments.sweep.checked import Checked, by_row, load_model, make_session
from harness_rect.experiments.sweep.clock import Timing
from harness_rect.experiments.sweep.display import duration
from harness_rect.experiments.sweep.evaluate import Evaluator, prompt_format
from harness_rect.experiments.sweep.memory import (
    device_of,
    free_on,
    needed,
    parts_of,
    scored_token,
    skeleton,
    weights_of,
)
from harness_rect.experiments.sweep.networks import are_trained, seconds_of_a_step
from harness_rect.experiments.sweep.plan import Evaluation, ModelEntry, Plan, Trajectory
from harness_rect.io.progress import logging_only
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.models import EditableLM

#: Documents of each task that a dry run evaluates to estimate the time, if there are no earlier runs.
PROBE_DOCUMENTS = 8
#: Tokens of each sequence of a batch for which the memory of evaluating is told.
TOKENS = 100


def show_dry_run(plan: Plan, timing: Timing, console: Console) -> None:
    """Print what a sweep would do and what that would cost: memory, and time where the model can be loaded.

    Args:
        timing: of earlier runs; for rows that it lacks a few edits and documents are timed.
    """
    config = plan.config
    weights = _show_memory(plan, console)
    table = Table(title=f"{plan.output}: what is left to do")
    for heading in ("", "edits", "evaluations", "requests", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    totals, done, measured = [0, 0, 0, 0.0], 0, False
    notes: list[str] = []
    for entry in config.models:
        try:
            _check_room(entry, weights[entry.label], device_of(entry, config))
            lm = load_model(entry, config)
        except (UserError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            notes.append(f"{entry.label}: requests and seconds need its weights in memory: {reason}")
            for name, group in by_row(plan, plan.of_model(entry)).items():
                counts = [group[-1].n_edits, len(group)]
                table.add_row(name, *map(str, counts), "-", "-")
                totals = [a + b for a, b in zip(totals, [*counts, 0, 0.0], strict=True)]
            continue
        evaluator = Evaluator(lm, config, config.model_args(entry))
        evaluator.build()
        checked = Checked(plan, entry, lm, evaluator, planning=True)
        done += len(checked.done)
        if not checked.todo:
            continue
        probe = Probe(plan, entry, lm, evaluator)
        if probe.untrained and config.train_mend:
            editable = EditableLM(lm.model, lm.tokenizer, lm.add_bos_token, prompt_format(lm, config))
            steps = config.train_mend.settings(editable).steps
            seconds = steps * seconds_of_a_step(editable, config.train_mend)
            totals[3] += seconds
            table.add_row(
                f"{entry.label}: training MEND, at most {steps} steps", "", "", "", f"{seconds:.0f}"
            )
            notes.append(
                f"{entry.label}: without the time of edits with MEND, whose networks are trained first"
            )
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
    for note in notes:
        console.print(note, soft_wrap=True)
    if totals[3]:
        how = "from earlier runs in this folder" if measured else "from a short measurement"
        console.print(
            f"About {duration(totals[3])}, {how}; edited models often generate longer answers.",
            soft_wrap=True,
        )


def _show_memory(plan: Plan, console: Console) -> dict[str, int]:
    """Print the memory that each series, and evaluating, needs; label of a model -> bytes of its weights."""
    tables: dict[torch.device, Table] = {}
    found: dict[str, int] = {}
    for entry in plan.config.models:
        with logging_only(logging.ERROR, "harness_rect"):
            lm = skeleton(entry, **plan.config.prompts)
            found[entry.label] = weights_of(lm)
            # Orders and seeds need the same.
            mine = {t.label: t for t in plan.trajectories if t.model is entry}
            for device, part in parts_of(lm, entry, device_of(entry, plan.config)).items():
                table = tables.setdefault(device, _memory_table(device))
                for label, trajectory in mine.items():
                    need = needed(lm, trajectory, plan.config, device, part)
                    parts = (need.weights, need.copies, need.moments, need.step, need.total)
                    table.add_row(f"{entry.label} {label}", *map(_size, parts))
                batch = int(size) if (size := str(plan.config.batch_size)).isdecimal() else 1
                evaluating = _size(scored_token(lm, part) * TOKENS * batch)
                table.add_row(f"{entry.label}, evaluating {batch} x {TOKENS} tokens", *"   ", evaluating, "")
                table.add_section()
    for device, table in tables.items():
        free = free_on(device)
        told = ("", "", "", "", "not known" if free is None else _size(free))
        table.add_row(f"free on {device}{', which is not here' if free is None else ''}", *told)
        console.print(table)
    return found


def _memory_table(device: torch.device) -> Table:
    table = Table(title=f"memory on {device}; the totals are those of editing")
    headings = ("weights", "copies of edited weights", "second moments, keys", "largest step", "total")
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _check_room(entry: ModelEntry, weights: int, device: torch.device) -> None:
    """Refuse to load a model that does not fit in memory: a process that tries may be killed."""
    if entry.arguments.get("parallelize") and not torch.cuda.is_available():
        raise UserError("parallelize puts it on the GPUs of a machine, and this one has none")
    where, free = str(device), free_on(device)
    if {"parallelize", "device_map"} & entry.arguments.keys():
        where, free = "all devices", sum(get_max_memory().values())
    if free is not None and weights > free:
        raise UserError(f"{entry.pretrained} takes {_size(weights)}, and {_size(free)} are free on {where}")


class Probe:
    """Measures seconds per request and per edit, once each, on a few of them."""

    def __init__(self, plan: Plan, entry: ModelEntry, lm: EditedHF, evaluator: Evaluator) -> None:
        self._plan, self._entry, self._lm, self._evaluator = plan, entry, lm, evaluator
        networks = plan.config.networks(entry)
        self.untrained = networks is not None and not are_trained(networks)
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
        """From one step of the method, without the work that a run does only once."""
        if self.untrained and trajectory.config.method == "mend":
            return 0.0
        if trajectory.label not in self._edit:
            size = trajectory.config.edit_batch_size
            session = make_session(self._lm, trajectory, size)
            try:
                step = session.run(on_step=lambda done: None)["steps"][0]
            finally:
                session.revert()
            self._edit[trajectory.label] = (step["seconds"] + step["measuring_seconds"]) / size
        return self._edit[trajectory.label]
