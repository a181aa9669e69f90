"""A kept run put onto its base model again: its updates trimmed, added and rounded as they were, no search.

The same bits come back because everything is done in the order, the precision and with the number of threads
of the run; the hashes of the edited weights tell whether they did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from harness_rect.config import make_regularizer
from harness_rect.errors import UserError
from harness_rect.fingerprint import digest
from harness_rect.machine import computed_on
from harness_rect.models import EditableLM
from harness_rect.regularizers import Regularizer
from harness_rect.session.history import KeptStep
from harness_rect.session.report import EditReport
from harness_rect.session.runs import KeptRun
from harness_rect.session.step import trim
from harness_rect.session.weights import EditedWeights
from harness_rect.updates import Update


class Differs(Exception):
    """The edited weights are not those of the run; ``str(error)`` says which, in one line."""


class RoundsDifferently(Differs):
    """The same, on another processor than that of the run, which rounds differently."""


def regularizer_of(run: KeptRun) -> Regularizer:
    """The regularizer that the run was made with."""
    given = {name: value for name, value in run.report.settings.items() if value is not None}
    return make_regularizer(run.report.regularizer, given)


def put(
    run: KeptRun, weights: EditedWeights, upto: int | None = None, regularizer: Regularizer | None = None
) -> EditReport:
    """Put a run, a part of it, or its first step with another regularizer into its base model.

    Returns:
        the report of that.

    Raises:
        Differs, UserError: see :func:`replay` and :func:`replay_first`; also where another regularizer is
            asked for beyond the first step.
    """
    if regularizer is None or regularizer == regularizer_of(run):
        replay(run, weights, upto)
        return report_of(run, weights, upto)
    steps = run.history.steps
    first = steps[0].edits if steps else run.report.n_edits
    if (run.report.n_edits if upto is None else upto) != first:
        raise UserError(
            f"regularizer {regularizer.name} instead of {run.report.regularizer}: what {run.report.method}"
            " proposes in later steps depends on what was added in earlier ones, so only the first step can"
            f" have another one: add --upto {first}, or edit anew"
        )
    replay_first(run, weights, regularizer)
    return report_of(run, weights, first, regularizer)


def replay(run: KeptRun, weights: EditedWeights, upto: int | None = None) -> None:
    """Put the weights of a run into its base model: those at its end, or after the first ``upto`` edits.

    All steps are done in any case, so that the hashes can be compared.

    Raises:
        Differs: the weights at the end are not those of the run; the model is unchanged then.
        RoundsDifferently: and the run is of another processor.
        UserError: ``upto`` is not the end of a step, or the run does not have its steps.
    """
    steps = _steps_upto(run, upto)
    weights.start()
    try:
        wanted: dict[str, Tensor] = {}
        if run.history.steps is None:
            weights.resume(run.masters)
        else:
            for number, _ in enumerate(replayed(run, weights, regularizer_of(run)), start=1):
                if number == steps:
                    wanted = {name: master.clone() for name, master in weights.masters.items()}
            weights.install(weights.masters)
        now = weights.hashes()
        wrong = sorted(n for n in now.keys() | run.hashes.keys() if now.get(n) != run.hashes.get(n))
        if wrong:
            here = computed_on(weights.lm.input_device)["processor"]
            elsewhere = (run.report.computed_on or {}).get("processor", here) != here
            raise (RoundsDifferently if elsewhere else Differs)(
                f"{len(wrong)} of {len(run.hashes)} edited weights, {wrong[0]} among them, do not come out as"
                f" the run had them ({_machine(run)}): another machine or release rounds differently"
            )
        if wanted:
            weights.resume(wanted)
    except BaseException:
        weights.revert()
        raise


def replay_first(run: KeptRun, weights: EditedWeights, regularizer: Regularizer) -> None:
    """Put the first step of a run into its base model, trimmed by another regularizer.

    What a method proposes in its first step does not depend on the regularizer, what it proposes in later
    ones does.

    Raises:
        UserError: the first step was not applied, its updates are not kept, or the result is not finite.
    """
    if not run.history.steps or not run.history.steps[0].updates:
        reason = "has no first step that was applied" if run.history.steps else "keeps no updates"
        raise UserError(f"the run {reason}, so no other regularizer can be put in")
    weights.start()
    next(replayed(run, weights, regularizer, again=True))
    weights.install(weights.masters)
    for name in weights.masters:
        if not torch.isfinite(weights.lm.weight(name)).all():
            weights.revert()
            raise UserError(f"{name} is not finite with regularizer {regularizer.name}")


def replayed(
    run: KeptRun, weights: EditedWeights, regularizer: Regularizer, again: bool = False
) -> Iterator[dict[str, Update]]:
    """Add the updates of each step to the float32 weights; yields what was added, once a step is done.

    Args:
        again: trim what was kept trimmed, too.
    """
    steps: Sequence[KeptStep] = run.history.steps or ()
    # The regularizer's memory of a weight has to see all of its updates, or none.
    afresh = {n for step in steps for n, update in step.updates.items() if again or update.trimmed is None}
    state: dict[str, Tensor] = {}
    for number, step in enumerate(steps):
        added: dict[str, Update] = {}
        with _threads(run):
            for position, (name, kept) in enumerate(step.updates.items()):
                master = weights.masters[name]
                if name in afresh or kept.trimmed is None:
                    left = trim(
                        regularizer,
                        _to(kept.proposed, master),
                        master,
                        weights.originals[name],
                        state=state,
                        weight=name,
                        place=(run.report.edit_seed or 0, number, position),
                        transposed=weights.lm.is_transposed(name),
                    )
                else:
                    left = _to(kept.trimmed, master)
                master += left.dense().to(master)
                added[name] = left
        yield added


def report_of(
    run: KeptRun, weights: EditedWeights, upto: int | None, regularizer: Regularizer | None = None
) -> EditReport:
    """The report of what was replayed: the run's own, or one without metrics after editing."""
    whole = run.report.model_copy(update={"from_cache": True})
    if upto in (None, whole.n_edits) and regularizer is None:
        return whole
    n = whole.n_edits if upto is None else upto
    records = [record.model_dump(exclude={"end"}) for record in whole.edits[:n]]
    steps = [step.model_dump() for step in whole.steps[: _steps_upto(run, n)]]
    part: dict[str, Any] = {"replay_of": whole.run, "n_edits": n, "edit_ids": whole.edit_ids[:n]}
    if regularizer is not None:
        settings = regularizer.model_dump(mode="json")
        part |= {"regularizer": regularizer.name, "regularizer_settings": settings}
        part |= {name: settings.get(name) for name in ("keep", "rect_convention")}
        records = [record | {"after": {}, "flags": []} for record in records]
        steps = [step | {"weights": {}} for step in steps]
    flagged: dict[str, list[str]] = {}
    for record in records:
        for flag in record["flags"]:
            flagged.setdefault(flag, []).append(record["id"])
    part |= {"run": digest(part), "edits": records, "steps": steps, "flagged": flagged}
    of_the_whole = {"edits_sha256", "token_ids_sha256", "at_the_end", "right_after_each_edit"}
    of_the_whole |= {"before_each_edit", "seconds_per_edit", "prompts_too_long"}
    kept = whole.model_dump(exclude=of_the_whole, exclude_unset=True)
    return EditReport.model_validate(kept | part | {"weights": weights.changes()})


def weights_of(run: KeptRun, lm: EditableLM) -> EditedWeights:
    """The weights of a model that the run edits.

    Raises:
        UserError: the model does not have them, or of another shape.
    """
    shapes: dict[str, Sequence[int]] = {name: master.shape for name, master in run.masters.items()}
    for step in run.history.steps or ():
        shapes |= {name: update.proposed.shape for name, update in step.updates.items()}
    for name, sha256 in run.hashes.items():
        try:
            found = tuple(lm.weight(name).shape)
        except (KeyError, AttributeError):
            raise UserError(f"the model has no weight {name}, which the run edits ({sha256[:8]})") from None
        if found != tuple(shapes.get(name, found)):
            raise UserError(f"{name} has the shape {found} in the model and {tuple(shapes[name])} in the run")
    return EditedWeights(lm, list(run.hashes))


def _steps_upto(run: KeptRun, upto: int | None) -> int | None:
    """How many steps make the first ``upto`` edits; None for all."""
    total = run.report.n_edits
    if upto is None or upto == total:
        return None
    if run.history.steps is None:
        raise UserError("the updates of this run were too large to keep: only its end is there")
    ends = list(accumulate(step.edits for step in run.history.steps))
    if upto not in ends:
        size = run.report.edit_batch_size
        each = f" that ends a step of {size}" if size > 1 else ""
        raise UserError(f"--upto {upto}: expected a number of edits from 1 to {total}{each}")
    return ends.index(upto) + 1


def _machine(run: KeptRun) -> str:
    where, torch_version = run.report.computed_on or {}, run.report.versions.get("torch")
    processor = f", {where['processor']}" if "processor" in where else ""
    return f"{where.get('device')}, {where.get('threads')} threads, torch {torch_version}{processor}"


@contextmanager
def _threads(run: KeptRun) -> Iterator[None]:
    """As many threads as the run had: sums are split over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(int((run.report.computed_on or {}).get("threads") or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to(update: Update, like: Tensor) -> Update:
    """The update on the device of a tensor."""
    return type(update)(**{part: tensor.to(like.device) for part, tensor in vars(update).items()})
