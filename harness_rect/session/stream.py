"""EditSession: a stream of edits goes into a model, step by step, measured on the way and revertible.

    session = EditSession(model, tokenizer, EditConfig(method="rome", edits="zsre[0:5]", ...))
    report = session.run()      # edits the model in place
    session.revert()            # bit for bit the model as it was

One step edits ``edit_batch_size`` facts: see :mod:`harness_rect.session.step`. Kept and interrupted runs:
see :mod:`harness_rect.session.runs`.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import harness_rect
from harness_rect import embedded
from harness_rect.code_digest import code_digest
from harness_rect.config import EditConfig
from harness_rect.edits import Edit, EditStream, fingerprint, load_edits
from harness_rect.errors import UserError
from harness_rect.fingerprint import computation_digest, digest, foreign_hook, model_fingerprint
from harness_rect.generated import unedited_answers
from harness_rect.hparams import resolve_hparams
from harness_rect.io import resume
from harness_rect.io.checksums import set_aside
from harness_rect.io.progress import progress_bar
from harness_rect.machine import as_loaded, computed_on
from harness_rect.measure import averages, measure_baseline, probes
from harness_rect.methods import METHODS, Context, Proposal, check_edits
from harness_rect.methods.value_search import search_share
from harness_rect.models import EditableLM
from harness_rect.models.prompt_format import PromptFormat
from harness_rect.moments import MomentProvider, SecondMoment
from harness_rect.processes import ALONE, Processes
from harness_rect.session.base_model import base_arguments
from harness_rect.session.history import History
from harness_rect.session.replay import Differs, RoundsDifferently, replay
from harness_rect.session.report import SCHEMA_VERSION, UNEDITED, EditReport
from harness_rect.session.runs import NOTHING_KEPT, EditCache, KeptRun, edits_as_json
from harness_rect.session.step import FLAGS, Editing, take_step
from harness_rect.session.weights import EditedWeights

log = logging.getLogger(__name__)

#: What decides the weights and what is measured, given the inputs.
CODE = (
    *("answers", "compat.transformers", "edits.edit", "generated", "measure", "methods", "models"),
    *(
        "moments.second_moment",
        "precision",
        "processes",
        "regularizers",
        "session.step",
        "session.weights",
        "updates",
    ),
    "weight_change",
)


class EditSession:
    """Applies a stream of edits to a model.

    Args:
        model: a transformers causal LM; edited in place by :meth:`run`.
        tokenizer: its tokenizer.
        config: the validated description of the run; ``config.method`` must not be ``none``.
        edits: the facts, if they are loaded already; else ``config.edits`` is read.
        model_name: for finding second moments in the public folder layout.
        add_special_tokens: see :class:`~harness_rect.models.lm.TextEncoder`.
        chat_template_args: further arguments of the chat template, such as ``enable_thinking``.
        processes: those that hold the same model; while the main one is in :meth:`run`, the others must be in
            :meth:`help`.
        loaded_by: arguments of lm-eval's class by which the model was loaded, ``pretrained`` among them; a
            kept run records those that decide which model it is. None: ``from_pretrained`` with the name
            alone gives it.

    Attributes:
        report: the report of the last run.

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
        chat_template_args: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
        loaded_by: Mapping[str, Any] | None = None,
    ) -> None:
        _check_kinds(model, tokenizer, config)
        if config.method == "none":
            raise UserError("method=none edits nothing; an EditSession needs an editing method")
        self.config = config
        instruction = config.system_instruction
        format = PromptFormat.of(tokenizer, config.apply_chat_template, instruction, chat_template_args)
        if instruction and not format.system_instruction:
            log.warning("the chat template has no system's turn: system_instruction has no effect")
        self.lm = EditableLM(model, tokenizer, add_special_tokens, format)
        stream = load_edits(config.edits or "") if edits is None else edits
        self.edits: tuple[Edit, ...] = tuple(stream)
        self.edit_warnings: tuple[str, ...] = stream.warnings if isinstance(stream, EditStream) else ()
        self.method = METHODS[config.method]
        check_edits(self.method, self.edits)
        self.hparams = resolve_hparams(self.method, config.hparams, self.lm)
        self.weight_names = self.method.weights(self.lm, self.hparams.values)
        _refuse_shared({name: self.lm.weight(name) for name in self.weight_names})
        self.lm.processes, self.lm.changing = processes, self.weight_names
        self.report = UNEDITED
        self._model_name, self._loaded_by = model_name, loaded_by
        self._model_is: tuple[str, str] | None = None
        self._weights = EditedWeights(self.lm, self.weight_names)
        self._moments: MomentProvider | None = None
        self._code = ""
        self._prepared = self._running = False

    def run(
        self,
        cache: EditCache | None = None,
        checkpoints: Collection[int] = (),
        on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Apply the whole stream and measure it.

        Args:
            cache: finished runs are taken from it and kept in it; an interrupted run is continued. None
                keeps nothing.
            checkpoints: numbers of edits (full steps) after which ``on_checkpoint`` is called with the
                report of the stream up to there, the model being in that state. With a cache the state is
                saved before each call, so that a run interrupted in it comes back to the same checkpoint.
            on_step: called with the number of edits in the model, at the start and after each step; without
                it a progress bar is shown.

        Returns:
            the report as it stands in the results file: :meth:`EditReport.to_dict`.

        Raises:
            UserError: see the class. The model is unchanged if it, or anything else, is raised.
        """
        if self._weights.originals:
            raise UserError("this session has edited its model already; revert() first")
        _check_checkpoints(checkpoints, len(self.edits), self.config.edit_batch_size)
        started = time.perf_counter()
        cache = cache or NOTHING_KEPT
        if cache.keeps and (hooked := foreign_hook(self.lm.model)):
            log.warning(
                "%s has a hook, of which the key of a kept run knows nothing: this run is not kept", hooked
            )
            cache = NOTHING_KEPT
        with torch.inference_mode(False), as_loaded(self.lm.input_device), self.lm.frozen():
            self._running = True
            try:
                self._look()
                key = self.key()
                with cache.lock(key):
                    # A finished run has no weights of an earlier checkpoint.
                    at_the_end = all(n >= len(self.edits) for n in checkpoints)
                    report = self._take_kept_run(cache, key) if at_the_end else None
                    if report is None:
                        report = self._edit(cache, key, checkpoints, on_checkpoint, on_step)
                    else:
                        if on_step is not None:
                            on_step(len(self.edits))
                        if on_checkpoint is not None and checkpoints:
                            on_checkpoint(report.to_dict())
            except BaseException:
                self._weights.revert()
                raise
            finally:
                self._running = False
        report.seconds = round(time.perf_counter() - started, 4)
        self.report = report
        for flag, ids in report.flagged.items():
            log.warning("%d of %d edits %s: %s", len(ids), report.n_edits, FLAGS[flag], ", ".join(ids))
        if n := report.prompts_too_long:
            log.warning("%d prompts are longer than the model can read and were left out", n)
        return report.to_dict()

    def help(self) -> None:
        """Take part in the value searches of the main process until it has ended its run."""
        with torch.inference_mode(False), as_loaded(self.lm.input_device), self.lm.frozen():
            self.lm.processes.help(partial(search_share, self.lm))

    def revert(self) -> None:
        """Put the original weights back, bit for bit. Does nothing on an unedited model.

        Raises:
            UserError: the session is editing, or another one edited the model later and is not reverted.
        """
        if self._running:
            raise UserError("revert(): the session is still editing; call it after run()")
        self._weights.revert()

    def propose(self, edits: Sequence[Edit]) -> Proposal:
        """What the method proposes for one batch of facts in the model as it is, which stays as it is."""
        self.prepare()
        with torch.inference_mode(False), as_loaded(self.lm.input_device), self.lm.frozen():
            return self.method.propose(self.lm, edits, self.hparams.values, self._context())

    @property
    def originals(self) -> dict[str, Tensor]:
        """The weights that are edited now, by name, as they were before; empty on an unedited model."""
        return dict(self._weights.originals)

    def _take_kept_run(self, cache: EditCache, key: str) -> EditReport | None:
        """Put the weights of a finished run into the model, if the cache has it."""
        found = cache.load(key)
        if found is None:
            return None
        try:
            self._check_report(found.report)
            replay(found, self._weights)
        except torch.OutOfMemoryError:
            raise  # of the GPU: that says nothing about the run
        except RoundsDifferently as problem:
            log.warning(
                "the kept edit run %s stays as it is and the edits are made again: %s",
                found.key[:12],
                problem,
            )
            return None
        except (Differs, UserError, LookupError, RuntimeError) as problem:
            set_aside(cache.path(key), "the kept edit run", problem)
            self._weights.revert()
            return None
        log.info("edits taken from the cache: %s", cache.path(key))
        # The same edits and numbers may have been read from other files then.
        return found.report.model_copy(update=self._origins() | {"from_cache": True})

    def _check_report(self, report: EditReport) -> None:
        """Check that a kept report is of this version and says of the run what identifies it.

        Raises:
            Differs: it does not.
        """
        known = {"schema_version": SCHEMA_VERSION, "n_edits": len(self.edits)}
        wanted, said = json.loads(json.dumps(self.identity() | known)), report.to_dict()
        compared = wanted.keys() & EditReport.model_fields.keys() - {"hparams"}  # those have templates, too
        if wrong := sorted(name for name in compared if said.get(name) != wanted[name]):
            raise Differs(f"its report has another {', '.join(wrong)}")

    def _edit(
        self,
        cache: EditCache,
        key: str,
        checkpoints: Collection[int],
        on_checkpoint: Callable[[dict[str, Any]], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> EditReport:
        """Edit and measure, from the start or from where an interrupted run was saved."""
        editing = self._start()
        editing.history = History(kept=cache.keeps)
        partial = cache.load_partial(key)
        if partial is not None and all(len(partial[1]["edits"]) <= n for n in checkpoints):
            editing.resume(partial)
            log.info("resuming an interrupted run after %d of %d edits", len(editing.edits), len(self.edits))
        total, size, saved = len(self.edits), self.config.edit_batch_size, time.monotonic()
        try:
            with progress_bar(shown=on_step is None) as progress:
                bar = progress.add_task("harness-rect: editing", total=total)
                for n in [*range(len(editing.edits), total, size), total]:
                    progress.update(bar, completed=n)
                    if on_step is not None:
                        on_step(n)
                    if n == total or n in checkpoints:
                        report = self._report(editing)
                    if on_checkpoint is not None and n in checkpoints:
                        on_checkpoint(report.to_dict())
                    if n < total:
                        take_step(editing, self.edits[n : n + size])
                        due = time.monotonic() - saved > resume.SAVE_SECONDS
                        if due or len(editing.edits) in checkpoints:
                            cache.save_partial(key, editing.saved())
                            saved = time.monotonic()
            if cache.keeps:
                cache.save(self._kept_run(key, editing, report))
            return report
        except KeyboardInterrupt:
            if editing.steps and not editing.committing:
                cache.save_partial(key, editing.saved())
            raise

    def _kept_run(self, key: str, editing: Editing, report: EditReport) -> KeptRun:
        dtype = next(self.lm.model.parameters()).dtype
        base: dict[str, Any] = {"model": self.lm.model.name_or_path or ""}
        base["dtype"] = str(dtype).removeprefix("torch.")
        if self._loaded_by is not None:
            base |= {"model": self._loaded_by["pretrained"], "arguments": base_arguments(self._loaded_by)}
        masters = self._weights.masters if editing.history.steps is None else {}
        hashes = {name: totals.sha256 for name, totals in report.weights.items() if totals.sha256}
        return KeptRun(key, base, report, edits_as_json(self.edits), hashes, editing.history, masters)

    def _start(self) -> Editing:
        """Sample the templates, tokenize what is measured, measure the unedited model, copy its weights."""
        context = self._context()
        flat = [t for group in context.templates for t in ([group] if isinstance(group, str) else group)]
        probed = {edit.id: probes(self.lm, edit, flat) for edit in self.edits}
        baseline = measure_baseline(self.lm, probed)
        answers = unedited_answers(self.lm, self.edits) if self.config.measure == "generated" else None
        self._weights.start()
        hparams = self.hparams.values
        return Editing(
            self.lm, self.method, hparams, self.config, context, self._weights, probed, baseline, answers
        )

    def _context(self) -> Context:
        """What the method is given at the start of a stream."""
        templates = self.method.contexts(self.lm, self.hparams.values, self.config.edit_seed)
        moments, originals = self._moments.get if self._moments else _no_moments, self._weights.originals
        used: dict[int, SecondMoment] = {}

        def second_moment(layer: int) -> SecondMoment:
            used[layer] = moments(layer)
            return used[layer]

        return Context(
            templates,
            second_moment,
            original=lambda name: originals.get(name, self.lm.weight(name).detach()),
            used=used,
        )

    def _report(self, editing: Editing) -> EditReport:
        """The report of the stream up to here, with every edit so far measured again."""
        records = editing.edits
        ids = [record["id"] for record in records]
        end = editing.measured(self.edits[: len(records)])
        records = [record | {"end": end[record["id"]]} for record in records]
        identity = self.identity(len(records))
        flagged: dict[str, list[str]] = {}
        for record in records:
            for flag in record["flags"]:
                flagged.setdefault(flag, []).append(record["id"])
        return EditReport.model_validate(
            {
                "schema_version": SCHEMA_VERSION,
                **identity,
                "hparams": identity["hparams"] | {"context_templates": editing.context.templates},
                **self._origins(),
                "computed_on": computed_on(self.lm.input_device),
                "run": self.key(len(records)),
                "from_cache": False,
                "n_edits": len(records),
                "flagged": flagged,
                "prompts_too_long": sum(editing.probed[id].unreadable for id in ids),
                "right_after_each_edit": averages([record["after"] for record in records]),
                "at_the_end": averages([record["end"] for record in records]),
                "before_each_edit": averages([record["before"] for record in records]),
                "conditions": _largest(step["conditions"] for step in editing.steps),
                "weights": self._weights.changes(),
                "seconds_per_edit": sum(step["seconds"] for step in editing.steps) / max(1, len(records)),
                "edits": records,
                "steps": editing.steps,
                "versions": {
                    "harness_rect": harness_rect.__version__,
                    "torch": str(torch.__version__),
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
            }
        )

    # -- what a run is made of --------------------------------------------------------------------

    def _look(self) -> tuple[str, str]:
        """As :meth:`_unedited`, of the model as it is now; what was prepared for another one is forgotten."""
        model = self.lm.model
        now = model_fingerprint(model), computation_digest(model, self.lm.encoder.tokenizer)
        if now != self._model_is:
            self._model_is, self._prepared = now, False
        return now

    def _unedited(self) -> tuple[str, str]:
        """Fingerprint of the unedited model, and digest of how it computes."""
        return self._model_is or self._look()

    def prepare(self) -> None:
        """Find or compute what this run needs of the unedited model, once; :meth:`run` does it by itself."""
        if self._prepared:
            return
        self._moments = self._load_moments()
        self._code = code_digest(CODE, self.method, type(self.config.regularizer))
        with torch.inference_mode(False):
            values, seed = self.hparams.values, self.config.edit_seed
            values = self.method.prepare(self.lm, values, self._model_name, seed)
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
        h: Any = self.hparams.values
        usual = type(h).model_fields
        asked = [n for n in ("mom2_dataset", "mom2_n_samples") if getattr(h, n) != usual[n].default]
        if asked and folder is None and embedded.is_embedded(self._model_name):
            log.warning(
                "%s has second moments of its own, which are used: %s of %s has no effect; stats=DIR gives"
                " others",
                *(self._model_name, " and ".join(asked), self.hparams.origin),
            )
        folder = folder or embedded.stats_folder(self._model_name)
        sample = (h.mom2_dataset, h.mom2_dtype, h.mom2_n_samples)
        provider = MomentProvider(self.lm, folder, self._model_name, self._unedited()[0], *sample)
        provider.load(layers)
        return provider

    def identity(self, n_edits: int | None = None) -> dict[str, Any]:
        """Everything that determines weights and report after the first ``n_edits``, the machine excepted.

        Templates that are sampled are None: model, method and seed fix them.
        """
        self.prepare()
        config, settings = self.config, self.config.regularizer.model_dump(mode="json")
        edits = self.edits[:n_edits]
        return {
            "method": config.method,
            "hparams": self.hparams.values.model_dump(mode="json"),
            "edits_sha256": fingerprint(edits),
            "edit_ids": [edit.id for edit in edits],
            "edit_batch_size": config.edit_batch_size,
            "regularizer": config.regularizer.name,
            "keep": settings.get("keep"),
            "rect_convention": settings.get("rect_convention"),
            "regularizer_settings": settings,
            "edit_seed": config.edit_seed,
            "measure": config.measure,
            "model_fingerprint": self._unedited()[0],
            "computation": self._unedited()[1],
            **self.lm.encoder.format.describe(),
            # Another tokenizer, or BOS or not, makes other edits of the same text.
            "token_ids_sha256": digest(
                {edit.id: self.lm.encoder.joined(edit.text, edit.target) for edit in edits}
            ),
            "second_moments": self._moments.hashes() if self._moments else None,
            "harness_rect": harness_rect.__version__,
            # Values that are searched in other batches differ in their last bits.
            **({} if (number := self.lm.processes.number) == 1 else {"processes": number}),
            "code_sha256": self._code,
        }

    def key(self, n_edits: int | None = None) -> str:
        """Names the run of the first ``n_edits``: a digest of its identity, and of device and threads.

        Sums are split over the threads, so another number of them gives other bits. So do other processors,
        but an interrupted run may go on on one.
        """
        where = computed_on(self.lm.input_device)
        return digest(
            self.identity(n_edits) | {"computed_on": {k: v for k, v in where.items() if k != "processor"}}
        )

    def _origins(self) -> dict[str, Any]:
        """Where the inputs were read from: the only part of the report that does not determine the result."""
        return {
            "model": self._model_name,
            "hparams_origin": self.hparams.origin,
            "edits_spec": self.config.edits,
            "edit_warnings": list(self.edit_warnings),
            "second_moments_origin": self._moments.provenance() if self._moments else None,
        }


def _check_kinds(model: object, tokenizer: object, config: object) -> None:
    """Raise UserError for an argument of another kind."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UserError(
            f"model: expected a causal language model of transformers, found {type(model).__name__}"
            " (of a DataParallel, give its module)"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer: expected one of transformers, found {type(tokenizer).__name__}")
    if not isinstance(config, EditConfig):
        raise UserError(f"config: expected an EditConfig, found {type(config).__name__}")


def _refuse_shared(weights: Mapping[str, Tensor]) -> None:
    """Raise UserError where two names are one matrix: each update would undo the other's."""
    first: dict[int, str] = {}
    for name, weight in weights.items():
        if (other := first.setdefault(id(weight), name)) != name:
            raise UserError(
                f"{other} and {name} are one matrix, shared by their layers: edit one of them (layers)"
            )


def _check_checkpoints(checkpoints: Collection[int], total: int, size: int) -> None:
    """Raise UserError for a number of edits that no step ends at."""
    for n in checkpoints:
        if not (n == total or (0 <= n < total and n % size == 0)):
            steps = f", a multiple of {size}" if size > 1 else ""
            raise UserError(f"checkpoints: {n}: expected a number from 0 to {total}{steps}, or {total}")


def _largest(conditions: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Name -> its largest value, NaN aside."""
    found: dict[str, float] = {}
    for each in conditions:
        found |= {name: value for name, value in each.items() if value > found.get(name, 0.0)}
    return found


def _no_moments(layer: int) -> SecondMoment:
    raise UserError(f"second moments of layer {layer} were not loaded")
