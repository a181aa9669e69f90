"""EditSession: a stream of edits goes into a model, step by step, measured on the way and revertible.

    session = EditSession(model, tokenizer, EditConfig(method="rome", edits="zsre[0:5]", ...))
    report = session.run()      # edits the model in place
    session.revert()            # bit for bit the model as it was

One step edits ``edit_batch_size`` facts: the method proposes an update for each weight, the regularizer trims
it relative to the weight as it is just before the step, and the result is added to a float32 master copy that
is rounded once to the model's dtype.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import harness_rect
from harness_rect import embedded
from harness_rect.config import EditConfig
from harness_rect.edits import Edit, EditStream, fingerprint, load_edits
from harness_rect.errors import UserError
from harness_rect.fingerprint import digest, model_fingerprint
from harness_rect.hparams import resolve_hparams
from harness_rect.io.progress import progress_bar
from harness_rect.measure import averages, measure, measure_baseline, probes
from harness_rect.methods import METHODS, Context
from harness_rect.models import EditableLM
from harness_rect.moments import MomentProvider, SecondMoment
from harness_rect.regularizers import Regularizer
from harness_rect.session.report import SCHEMA_VERSION, UNEDITED, EditReport
from harness_rect.session.runs import EditCache
from harness_rect.session.step import FLAGS, Editing, take_step
from harness_rect.session.weights import EditedWeights
from harness_rect.weight_change import weight_change

log = logging.getLogger(__name__)

#: An unfinished stream is saved when this many seconds have passed since the last save.
SAVE_SECONDS = 30.0


class EditSession:
    """Applies a stream of edits to a model.

    Args:
        model: a transformers causal LM; edited in place by :meth:`run`.
        tokenizer: its tokenizer.
        config: the validated description of the run; ``config.method`` must not be ``none``.
        edits: the facts, if they are loaded already; else ``config.edits`` is read.
        model_name: for finding second moments in the public folder layout.
        add_special_tokens: see :class:`~harness_rect.models.lm.TextEncoder`.

    Raises:
        UserError: the model cannot be edited, or a hyper-parameter, statistics file or edit is wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EditConfig,
        edits: EditStream | Sequence[Edit] | None = None,
        model_name: str = "",
        add_special_tokens: bool | None = None,
    ) -> None:
        if config.method == "none":
            raise UserError("method=none edits nothing; an EditSession needs an editing method")
        self.config = config
        self.lm = EditableLM(model, tokenizer, add_special_tokens)
        stream = load_edits(config.edits or "") if edits is None else edits
        self.edits: tuple[Edit, ...] = tuple(stream)
        self.edit_warnings: tuple[str, ...] = stream.warnings if isinstance(stream, EditStream) else ()
        self.method = METHODS[config.method]
        check_edits(config, self.edits)
        self.hparams = resolve_hparams(self.method, config.hparams, self.lm)
        self.weight_names = self.method.weights(self.lm, self.hparams.values)
        for name in self.weight_names:
            self.lm.weight(name)
        self._model_name = model_name
        self._model_fingerprint = model_fingerprint(model)
        self._weights = EditedWeights(self.lm, self.weight_names)
        self._templates: list[Any] = []
        self._moments: MomentProvider | None = None
        self._prepared = False
        self.report: EditReport = UNEDITED

    # -- running ----------------------------------------------------------------------------------

    def run(
        self,
        cache: EditCache | None = None,
        checkpoints: Collection[int] = (),
        on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Apply the whole stream and measure it; returns the report that goes into the results file.

        Args:
            cache: finished runs are taken from it and kept in it; an interrupted run is continued. None
                keeps nothing.
            checkpoints: numbers of edits (full steps) after which ``on_checkpoint`` is called with the
                report of the stream up to there, the model being in that state. With a cache the state is
                saved before each call, so that a run interrupted in it comes back to the same checkpoint.
            on_step: called with the number of edits in the model, at the start and after each step; without
                it a progress bar is shown.

        Raises:
            UserError: see the class. The model is unchanged if it, or anything else, is raised.
        """
        if self._weights.originals:
            raise UserError("this session has edited its model already; revert() first")
        with torch.inference_mode(False), self.lm.frozen():
            self.prepare()
            self._templates = self.method.contexts(self.lm, self.hparams.values, self.config.edit_seed)
            key = digest(self._description(self.edits))
            arguments = (cache, checkpoints, on_checkpoint, on_step)
            if cache is None:
                state = self._apply(key, *arguments)
            else:
                with cache.lock(key):
                    state = self._from_cache(key, *arguments) or self._apply(key, *arguments)
        self.report = state
        self._warn_about_failures(state)
        return state.to_dict()

    def _from_cache(
        self,
        key: str,
        cache: EditCache | None,
        checkpoints: Collection[int],
        on_checkpoint: Callable[[dict[str, Any]], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> EditReport | None:
        """A finished run, if one is kept and no checkpoint lies before its end."""
        earlier = any(n < len(self.edits) for n in checkpoints)
        found = None if cache is None or earlier else cache.load(key, self.weight_names)
        if cache is None or found is None:
            return None
        log.info("edits taken from the cache: %s", cache.path(key))
        weights, state = found
        # The same edits and numbers may have been read from other files then.
        report = EditReport.read(state | self._origins() | {"from_cache": True})
        self._weights.install(weights)
        try:
            if on_step is not None:
                on_step(len(self.edits))
            if on_checkpoint is not None and checkpoints:
                on_checkpoint(report.to_dict())
        except BaseException:
            self.revert()
            raise
        return report

    def _apply(
        self,
        key: str,
        cache: EditCache | None,
        checkpoints: Collection[int],
        on_checkpoint: Callable[[dict[str, Any]], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> EditReport:
        """Edit and measure; the model is restored if anything goes wrong."""
        templates = [t for group in self._templates for t in ([group] if isinstance(group, str) else group)]
        probed = {edit.id: probes(self.lm, edit, templates) for edit in self.edits}
        baseline = measure_baseline(self.lm, probed)
        context = Context(self._templates, self._moments.get if self._moments else _no_moments)
        memory: dict[str, Tensor] = {}
        weights = self._weights
        weights.start()
        editing = Editing(
            self.lm, self.method, self.hparams.values, self.config, context, weights, probed, baseline
        )
        steps: list[dict[str, Any]] = []
        per_edit: list[dict[str, Any]] = []
        try:
            partial = cache.load_partial(key, self.weight_names) if cache else None
            # A state beyond a checkpoint is of no use: there is no way back to it.
            if partial is not None and all(len(partial[2]["edits"]) <= n for n in checkpoints):
                saved_weights, remembered, saved_state = partial
                context.state.update(remembered)
                steps, per_edit = saved_state["steps"], saved_state["edits"]
                for name, weight in saved_weights.items():
                    weights.masters[name] = weight.to(weights.masters[name])
                weights.install(weights.masters)
                log.info(
                    "going on with an interrupted run after %d of %d edits", len(per_edit), len(self.edits)
                )
            size = self.config.edit_batch_size
            batches = [self.edits[i : i + size] for i in range(0, len(self.edits), size)]
            saved = time.monotonic()
            memory = dict(context.state)  # after the last whole step; a method may add to it early in a step
            state: EditReport | None = None

            def reach_checkpoint() -> None:
                nonlocal state
                if on_checkpoint is not None and len(per_edit) in checkpoints:
                    state = self._state(steps, per_edit, editing)
                    on_checkpoint(state.to_dict())

            with _shown(on_step, len(self.edits)) as show:
                show(len(per_edit))
                if per_edit:  # interrupted there
                    reach_checkpoint()
                for index in range(len(steps), len(batches)):
                    state = None
                    step, edits = take_step(editing, index, batches[index])
                    steps.append(step)
                    per_edit += edits
                    memory = dict(context.state)
                    editing.committing = False
                    show(len(per_edit))
                    due = len(per_edit) in checkpoints or time.monotonic() - saved > SAVE_SECONDS
                    if cache and due:
                        cache.save_partial(key, weights.masters, memory, {"steps": steps, "edits": per_edit})
                        saved = time.monotonic()
                    reach_checkpoint()
            if state is None:
                state = self._state(steps, per_edit, editing)
            if cache:
                cache.save(key, weights.masters, state.to_dict())
            return state
        except BaseException as error:
            # In the middle of a commit weights and records do not belong together.
            if cache and isinstance(error, KeyboardInterrupt) and steps and not editing.committing:
                cache.save_partial(key, weights.masters, memory, {"steps": steps, "edits": per_edit})
            self.revert()
            raise

    def revert(self) -> None:
        """Put the original weights back, bit for bit. Does nothing on an unedited model."""
        self._weights.revert()

    # -- what the run consists of -----------------------------------------------------------------

    def prepare(self) -> None:
        """Find or compute what this run needs of the unedited model, once; :meth:`run` does it by itself."""
        if self._prepared:
            return
        self._moments = self._load_moments()
        if self.method.prepare is not None:
            with torch.inference_mode(False):
                values = self.method.prepare(
                    self.lm, self.hparams.values, self._model_name, self.config.edit_seed
                )
            self.hparams = replace(self.hparams, values=values)
        self._prepared = True

    def _load_moments(self) -> MomentProvider | None:
        layers = self.method.needs_statistics(self.hparams.values)
        folder = self.config.stats
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"stats={folder}: no such folder")
        if not layers:
            if folder is not None:
                log.warning("stats=%s has no effect: %s uses no second moments", folder, self.hparams.origin)
            return None
        folder = folder or embedded.stats_folder(self._model_name)
        h: Any = self.hparams.values
        provider = MomentProvider(
            self.lm,
            folder,
            self._model_name,
            self._model_fingerprint,
            h.mom2_dataset,
            h.mom2_dtype,
            h.mom2_n_samples,
        )
        provider.load(layers)
        return provider

    def identity(self, n_edits: int) -> dict[str, Any]:
        """Everything that determines weights and report after the first ``n_edits``, known before the run.

        Templates that the hyper-parameters leave to sampling are None: model, method and seed fix them.
        """
        self.prepare()
        return self._description(self.edits[:n_edits]) | {
            "hparams": self.hparams.values.model_dump(mode="json")
        }

    def _description(self, edits: Sequence[Edit]) -> dict[str, Any]:
        """Everything that determines weights and report after ``edits``; its digest names the run."""
        config = self.config
        return {
            "method": config.method,
            "hparams": self.hparams.values.model_dump(mode="json") | {"context_templates": self._templates},
            "edits_sha256": fingerprint(edits),
            "edit_ids": [edit.id for edit in edits],
            "edit_batch_size": config.edit_batch_size,
            **regularizer_description(config.regularizer),
            "edit_seed": config.edit_seed,
            "model_fingerprint": self._model_fingerprint,
            # Another tokenizer, or BOS or not, makes other edits of the same text.
            "token_ids_sha256": digest(
                {edit.id: self.lm.encoder.ids(edit.text + edit.target) for edit in edits}
            ),
            "second_moments": self._moments.hashes() if self._moments else None,
            "harness_rect": harness_rect.__version__,
        }

    def _state(
        self,
        steps: list[dict[str, Any]],
        per_edit: list[dict[str, Any]],
        editing: Editing,
    ) -> EditReport:
        """The report of the stream up to here, with every edit so far measured again."""
        description = self._description(self.edits[: len(per_edit)])
        end = measure(self.lm, editing.probed, editing.baseline, [record["id"] for record in per_edit])
        per_edit = [record | {"end": end[record["id"]]} for record in per_edit]
        seconds = [step["seconds"] for step in steps]
        flagged: dict[str, list[str]] = {}
        for record in per_edit:
            for flag in record["flags"]:
                flagged.setdefault(flag, []).append(record["id"])
        return EditReport.model_validate(
            {
                "schema_version": SCHEMA_VERSION,
                **description,
                **self._origins(),
                "run": digest(description),
                "from_cache": False,
                "n_edits": len(per_edit),
                "flagged": flagged,
                "prompts_too_long": sum(editing.probed[record["id"]].unreadable for record in per_edit),
                "right_after_each_edit": averages([record["after"] for record in per_edit]),
                "at_the_end": averages([record["end"] for record in per_edit]),
                "before_each_edit": averages([record["before"] for record in per_edit]),
                "weights": {
                    name: self._totals(name, master) for name, master in editing.weights.masters.items()
                },
                "seconds_per_edit": sum(seconds) / max(1, len(per_edit)),
                "edits": per_edit,
                "steps": list(steps),
                "versions": {
                    "harness_rect": harness_rect.__version__,
                    "torch": str(torch.__version__),
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
            }
        )

    def _origins(self) -> dict[str, Any]:
        """Where this run's ingredients were read from; the report's only part that is no function of them."""
        return {
            "model": self._model_name,
            "hparams_origin": self.hparams.origin,
            "edits_spec": self.config.edits,
            "edit_warnings": list(self.edit_warnings),
            "second_moments_origin": self._moments.provenance() if self._moments else None,
        }

    def _totals(self, name: str, master: Tensor) -> dict[str, Any]:
        """What the whole stream did to a weight."""
        stored = {"dtype": str(self.lm.weight(name).dtype).removeprefix("torch.")}
        return weight_change(master, self._weights.originals[name].float()) | stored

    def _warn_about_failures(self, report: EditReport) -> None:
        for flag, ids in report.flagged.items():
            log.warning("%d of %d edits %s: %s", len(ids), report.n_edits, FLAGS[flag], ", ".join(ids))
        if report.prompts_too_long:
            log.warning(
                "%d prompts are longer than the model can read and were left out", report.prompts_too_long
            )


def regularizer_description(regularizer: Regularizer) -> dict[str, Any]:
    """A regularizer as the report names it: its name and all of its settings."""
    settings = regularizer.model_dump(mode="json")
    common = {name: settings.get(name) for name in ("keep", "rect_convention")}
    return {"regularizer": regularizer.name, **common, "regularizer_settings": settings}


def check_edits(config: EditConfig, edits: Sequence[Edit]) -> None:
    """Refuse edits that the method cannot use; needs no model."""
    check = METHODS[config.method].check
    if check is not None:
        check(edits)


@contextmanager
def _shown(on_step: Callable[[int], None] | None, total: int) -> Iterator[Callable[[int], None]]:
    """What is called with the number of edits done: ``on_step``, or else a progress bar."""
    if on_step is not None:
        yield on_step
        return
    with progress_bar() as progress:
        bar = progress.add_task("editing", total=total)
        yield lambda done: progress.update(bar, completed=done)


def _no_moments(layer: int) -> SecondMoment:
    raise UserError(f"second moments of layer {layer} were not loaded")
