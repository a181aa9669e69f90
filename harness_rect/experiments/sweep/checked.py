"""The evaluations of a sweep that are done, and everything that determines the results of each."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness_rect.edits import EditStream, fingerprint
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.evaluate import Evaluator, QuietHF, read_results
from harness_rect.experiments.sweep.memory import device_of
from harness_rect.experiments.sweep.networks import are_trained
from harness_rect.experiments.sweep.plan import Evaluation, ModelEntry, Plan, SweepConfig, Trajectory
from harness_rect.fingerprint import computation_digest, model_fingerprint
from harness_rect.machine import computed_on
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.models.load import check_device
from harness_rect.moments.layout import layout_name
from harness_rect.session import EditSession

log = logging.getLogger("harness_rect.sweep")
#: In ``made_of``: where a result was computed. Other threads can give other weights, but a sweep may run on
#: several machines, so that this makes no result another one.
MACHINE = "computed_on"


class Checked:
    """The evaluations of one model, done and to do.

    Attributes:
        made_of: folder of an evaluation -> everything that determines its results, as plain JSON.

    Args:
        planning: do not load or compute second moments.

    Raises:
        UserError: an existing results file was made with other settings, data, code or versions.
    """

    def __init__(
        self, plan: Plan, entry: ModelEntry, lm: EditedHF, evaluator: Evaluator, planning: bool = False
    ) -> None:
        self.done: list[Evaluation] = []
        self.todo: list[Evaluation] = []
        self.made_of: dict[Path, dict[str, Any]] = {}
        self._tasks = evaluator.identity()
        computation = computation_digest(lm.model, lm.tokenizer)
        self._model = {"model_fingerprint": model_fingerprint(lm.model), "computation": computation}
        self._machine = computed_on(lm.device)
        elsewhere: Counter[str] = Counter()
        session: EditSession | None = None
        networks = plan.config.networks(entry)
        untrained = planning and networks is not None and not are_trained(networks)
        of: Trajectory | None = None
        read: set[tuple[Any, ...]] = set()
        for evaluation in plan.of_model(entry):
            if untrained and evaluation.trajectory and evaluation.trajectory.config.method == "mend":
                self.todo.append(evaluation)
                continue
            if evaluation.trajectory is not None and evaluation.trajectory is not of:
                of = evaluation.trajectory
                session = make_session(lm, of)  # also checks its hyper-parameters
                moments = (of.config.method, of.config.hparams, of.config.stats)
                if moments not in read and not planning:  # what is missing is an error now, not after hours
                    session.prepare()
                    read.add(moments)
            results = read_results(evaluation.file)
            if evaluation.trajectory is None or results is not None:
                self.made_of[evaluation.folder] = self.identity(evaluation, session)
            if results is None:
                self.todo.append(evaluation)
                continue
            there = results["sweep"].get("made_of")
            if isinstance(there, dict) and (machine := there.pop(MACHINE, self._machine)) != self._machine:
                elsewhere[json.dumps(machine)] += 1
            here = self.made_of[evaluation.folder]
            difference = _difference(there, {key: value for key, value in here.items() if key != MACHINE})
            if difference:
                raise UserError(
                    f"{evaluation.file}: made with {difference}; remove {evaluation.folder},"
                    " or give another output folder"
                )
            self.done.append(evaluation)
        for machine, number in elsewhere.items():
            log.warning(
                "%d evaluations that are done were computed on %s, and this process computes on %s: the same"
                " edits can give other weights there (docs/numerics.md)",
                *(number, machine, json.dumps(self._machine)),
            )

    def identity(self, evaluation: Evaluation, session: EditSession | None) -> dict[str, Any]:
        """Everything that determines the results of ``evaluation``, as plain JSON."""
        if evaluation.trajectory is None or session is None:
            edited: dict[str, Any] = self._model | {"edits_sha256": fingerprint(evaluation.edits)}
        else:
            edited = session.identity(evaluation.n_edits)
        made_of = {
            "model_args": evaluation.model_args,
            "edited": edited,
            **self._tasks,
            MACHINE: self._machine,
        }
        return json.loads(json.dumps(made_of, default=str))


def load_model(entry: ModelEntry, config: SweepConfig) -> QuietHF:
    """The unedited model, as lm-eval would load it.

    Raises:
        UserError: it cannot be loaded.
    """
    check_device(device := device_of(entry, config), f"device={device}")  # lm-eval takes a CPU for cuda:0
    settings = {"batch_size": str(config.batch_size), "device": str(device), "method": "none"}
    try:
        return QuietHF.create_from_arg_obj(entry.arguments | settings | config.prompts)
    except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"models: {entry.pretrained} cannot be loaded as asked: {reason}") from None


def make_session(lm: EditedHF, trajectory: Trajectory, n_edits: int | None = None) -> EditSession:
    """The session of a trajectory: all its edits, or the first ``n_edits``.

    Raises:
        UserError: the model cannot be edited in this way.
    """
    edits = EditStream(trajectory.edits[:n_edits], trajectory.config.edits or "")
    return EditSession(
        lm.model,
        lm.tokenizer,
        trajectory.config,
        edits,
        layout_name(trajectory.model.pretrained),
        add_special_tokens=lm.add_bos_token,
        chat_template_args=lm.chat_template_args,
    )


def coordinates(evaluation: Evaluation) -> dict[str, Any]:
    """The place of an evaluation in its sweep, as written into its results file."""
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


def row_name(plan: Plan, evaluation: Evaluation) -> str:
    """The name of an evaluation's row in tables: the folder above ``edits_NNN``, or the unedited model's."""
    folder = evaluation.folder.parent if evaluation.trajectory else evaluation.folder
    return folder.relative_to(plan.output).as_posix()


def by_row(plan: Plan, evaluations: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    grouped: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        grouped.setdefault(row_name(plan, evaluation), []).append(evaluation)
    return grouped


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
