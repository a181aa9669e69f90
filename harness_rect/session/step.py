"""One step of a stream: the method proposes, the regularizer trims, the session adds and measures."""

from __future__ import annotations

import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness_rect.config import EditConfig
from harness_rect.edits import Edit
from harness_rect.fingerprint import digest
from harness_rect.generated import Answers, measure_generated
from harness_rect.io.resume import State
from harness_rect.measure import Baseline, EditProbes, measure
from harness_rect.methods import Context, Method
from harness_rect.models import EditableLM
from harness_rect.regularizers import Regularizer, WeightState
from harness_rect.session.history import History, KeptStep, KeptUpdate
from harness_rect.session.weights import EditedWeights
from harness_rect.updates import Update

#: Before the names of saved tensors that are no weights: a method's or a regularizer's memory, and updates.
MEMORY, UPDATE = "memory:", "update:"
#: What can be wrong with an edit, and how the warning says it.
FLAGS = {
    "skipped": "were skipped by the method",
    "not_finite": "had a non-finite update, which was not applied",
    "no_change": "changed no weight",
    "no_gain": "did not make their target more probable",
}


@dataclass
class Editing:
    """A stream that is being edited: what every step works on, and what the steps so far did.

    Attributes:
        unedited_answers: what the unedited model generates; None where generated answers are not measured.
        memory: the context's state after the last whole step; a method may add to that early in a step.
        history: the updates of the steps so far.
        committing: whether the weights are ahead of the records, so that no state can be saved now.
    """

    lm: EditableLM
    method: Method
    hparams: Any
    config: EditConfig
    context: Context
    weights: EditedWeights
    probed: dict[str, EditProbes]
    baseline: Baseline
    unedited_answers: Answers | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=History)
    committing: bool = False

    def measured(self, edits: Sequence[Edit]) -> dict[str, dict[str, float]]:
        """Edit id -> metrics of the model as it is now."""
        found = measure(self.lm, self.probed, self.baseline, [edit.id for edit in edits])
        if self.unedited_answers is not None:
            generated = measure_generated(self.lm, edits, self.unedited_answers)
            found = {id: scores | generated[id] for id, scores in found.items()}
        return found

    def saved(self) -> State:
        """(float32 weights, the context's state and the updates, records) after the last whole step."""
        others = {MEMORY + name: tensor for name, tensor in self.memory.items()}
        others |= {UPDATE + name: tensor for name, tensor in self.history.tensors().items()}
        records = {"steps": self.steps, "edits": self.edits, "history": self.history.described()}
        return self.weights.masters | others, records

    def resume(self, saved: State) -> None:
        """Continue from what :meth:`saved` returned."""
        tensors, records = saved
        self.memory, updates = (
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            for prefix in (MEMORY, UPDATE)
        )
        self.history = History.restored(records["history"], updates)
        self.context.state.update(self.memory)
        self.weights.resume({name: tensors[name] for name in self.weights.masters})
        self.steps, self.edits = records["steps"], records["edits"]


def take_step(editing: Editing, edits: Sequence[Edit]) -> None:
    """Edit one batch of facts, measure it before and after, and record both.

    The method proposes an update for each weight, the regularizer trims it relative to the weight as it is
    just before the step, and the result is added to a float32 copy that is rounded once to the model's dtype.
    """
    lm, context, weights = editing.lm, editing.context, editing.weights
    started = time.perf_counter()
    ids = [edit.id for edit in edits]
    before = measure(lm, editing.probed, editing.baseline, ids)
    measured_before = time.perf_counter()
    remembered = dict(context.state)  # of whole steps: what is not finite must not get into any memory
    proposal = editing.method.propose(lm, edits, editing.hparams, context)
    conditions = context.take_conditions()
    trimmed: dict[str, Tensor] = {}
    kept: dict[str, KeptUpdate] = {}
    statistics: dict[str, dict[str, Any]] = {}
    for position, (name, update) in enumerate(proposal.updates.items()):
        trimmed[name], statistics[name] = _trimmed(editing, position, name, update.contiguous(), kept)
    # All or nothing: half an edit would be neither the method's result nor the model before it.
    editing.committing = True
    if applied := bool(statistics) and all(of["finite"] for of in statistics.values()):
        for name, result in trimmed.items():
            statistics[name]["changed"] = weights.add(name, result)
        done = [edit for i, edit in enumerate(edits) if i not in proposal.skipped]
        editing.method.after_step(lm, done, editing.hparams, context)
    else:
        context.state.clear()
        context.state.update(remembered)
    edited = time.perf_counter()
    after = editing.measured(edits)
    step = {
        "edits": ids,
        "applied": applied,
        "weights": statistics,
        "conditions": conditions,
        "seconds": round(edited - measured_before, 4),
        "measuring_seconds": round(time.perf_counter() - edited + measured_before - started, 4),
    }
    records = [
        {
            "id": edit.id,
            "subject": edit.subject,
            "target": edit.target_new,
            "before": before[edit.id],
            "after": after[edit.id],
            "search": proposal.details[i],
            "flags": ["skipped"]
            if i in proposal.skipped
            else _flags(before[edit.id], after[edit.id], statistics),
        }
        for i, edit in enumerate(edits)
    ]
    editing.steps.append(step)
    editing.edits += records
    editing.history.add(KeptStep(len(edits), kept if applied else {}))
    editing.memory = dict(context.state)
    editing.committing = False


def _trimmed(
    editing: Editing, position: int, name: str, update: Update, kept: dict[str, KeptUpdate]
) -> tuple[Tensor, dict[str, Any]]:
    """The dense update of a weight after the regularizer, and its statistics; adds to ``kept``.

    An update that is not finite is not trimmed, and neither of the two is applied.
    """
    master, original = editing.weights.masters[name], editing.weights.originals[name]
    result = update.dense().to(master)
    norm, finite = float(result.norm()), bool(torch.isfinite(result).all())
    expected = editing.config.regularizer.elements_left(result) if finite else None
    if finite:
        del result  # so that the regularizer's copies are the only ones
        left = trim(
            editing.config.regularizer,
            update,
            master,
            original,
            state=editing.context.state,
            weight=name,
            place=(editing.config.edit_seed, len(editing.steps), position),
            transposed=editing.lm.is_transposed(name),
        )
        if editing.history.steps is not None:
            kept[name] = KeptUpdate.of(update, left)
        result = left.dense().to(master)
        # After rounding: in float16 a finite sum can become infinite.
        finite = bool(torch.isfinite((master + result).to(original.dtype)).all())
    left_over = int(torch.count_nonzero(result))
    counts = {} if expected is None else {"kept_elements": left_over, "expected_elements": expected}
    return result, {
        "update_norm": norm,
        "applied_norm": float(result.norm()) if finite else None,
        "weight_norm": float(master.norm()),
        "kept": left_over / result.numel() if finite else None,
        "changed": 0.0,
        "finite": finite,
        **counts,
    }


def _flags(
    before: dict[str, float], after: dict[str, float], statistics: dict[str, dict[str, Any]]
) -> list[str]:
    if not all(of["finite"] for of in statistics.values()):
        return ["not_finite"]
    if all(of["changed"] == 0 for of in statistics.values()):
        return ["no_change"]
    if not after["target_probability"] > before["target_probability"]:
        return ["no_gain"]
    return []


def trim(
    regularizer: Regularizer,
    update: Update,
    master: Tensor,
    original: Tensor,
    *,
    state: MutableMapping[str, Tensor],
    weight: str,
    place: tuple[int, int, int],
    transposed: bool,
) -> Update:
    """What a regularizer leaves of the update of one weight in one step; ``update`` itself if it leaves all.

    Args:
        master, original: the weight before this step, float32, and before all edits.
        state: of the stream; holds this weight's memory under the name ``weight``.
        place: seed, number of the step and position of the weight in it, for everything random.
        transposed: whether the weight is stored as (inputs, outputs).
    """
    prefix = f"regularizer:{weight}:"
    memory = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    found = regularizer.trim(update, master, original, WeightState(memory, _generator(*place), transposed))
    state.update({prefix + key: tensor for key, tensor in memory.items()})
    return found if found is update else found.contiguous()


def _generator(seed: int, step: int, position: int) -> torch.Generator:
    """Randomness of one weight in one step, the same whether or not the run was interrupted before it."""
    text = digest({"seed": seed, "step": step, "weight": position})
    return torch.Generator().manual_seed(int(text[:15], 16))
