"""EditSession: a stream of edits goes into a model, step by step, measured on the way and revertible.

    session = EditSession(model, tokenizer, EditConfig(method="rome", edits="zsre[0:5]", ...))
    report = session.run()      # edits the model in place
    session.revert()            # bit for bit the model as it was

One step edits ``edit_batch_size`` facts: the method proposes an update for each weight, the regularizer trims
it relative to the weight as it is just before the step, and the result is added to a float32 master copy that
is rounded once to the model's dtype.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import harness_rect
from harness_rect import embedded
from harness_rect.config import EditConfig
from harness_rect.edit_cache import EditCache
from harness_rect.edits import Edit, EditStream, fingerprint, load_edits
from harness_rect.errors import UserError
from harness_rect.fingerprint import digest, model_fingerprint
from harness_rect.hparams import resolve_hparams
from harness_rect.measure import Baseline, EditProbes, averages, measure, measure_baseline, probes
from harness_rect.methods import METHODS, Context, Dense, LowRank
from harness_rect.models import EditableLM
from harness_rect.precision import in_double
from harness_rect.progress import progress_bar
from harness_rect.regularizers import largest_singular_value, make_regularizer, prune_factors, sphere_factors
from harness_rect.statistics import MomentProvider, SecondMoment
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
        self._originals: dict[str, Tensor] = {}
        self._templates: list[Any] = []
        self._moments: MomentProvider | None = None
        self._moments_loaded = False
        self._committing = False
        self.report: dict[str, Any] | None = None

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
        if self._originals:
            raise UserError("this session has edited its model already; revert() first")
        with torch.inference_mode(False), self.lm.frozen():
            self.load_moments()
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
        return state

    def _from_cache(
        self,
        key: str,
        cache: EditCache | None,
        checkpoints: Collection[int],
        on_checkpoint: Callable[[dict[str, Any]], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> dict[str, Any] | None:
        """A finished run, if one is kept and no checkpoint lies before its end."""
        earlier = any(n < len(self.edits) for n in checkpoints)
        found = None if cache is None or earlier else cache.load(key, self.weight_names)
        if cache is None or found is None:
            return None
        log.info("edits taken from the cache: %s", cache.path(key))
        weights, state = found
        # The same edits and numbers may have been read from other files then.
        state |= self._origins() | {"from_cache": True}
        self._install(weights)
        try:
            if on_step is not None:
                on_step(len(self.edits))
            if on_checkpoint is not None and checkpoints:
                on_checkpoint(state)
        except BaseException:
            self.revert()
            raise
        return state

    def _apply(
        self,
        key: str,
        cache: EditCache | None,
        checkpoints: Collection[int],
        on_checkpoint: Callable[[dict[str, Any]], None] | None,
        on_step: Callable[[int], None] | None,
    ) -> dict[str, Any]:
        """Edit and measure; the model is restored if anything goes wrong."""
        templates = [t for group in self._templates for t in ([group] if isinstance(group, str) else group)]
        probed = {edit.id: probes(self.lm, edit, templates) for edit in self.edits}
        baseline = measure_baseline(self.lm, probed)
        context = Context(self._templates, self._moments.get if self._moments else _no_moments)
        memory: dict[str, Tensor] = {}
        masters = {name: self._master(name) for name in self.weight_names}
        steps: list[dict[str, Any]] = []
        per_edit: list[dict[str, Any]] = []
        try:
            partial = cache.load_partial(key, self.weight_names) if cache else None
            # A state beyond a checkpoint is of no use: there is no way back to it.
            if partial is not None and all(len(partial[2]["edits"]) <= n for n in checkpoints):
                weights, remembered, saved_state = partial
                context.state.update(remembered)
                steps, per_edit = saved_state["steps"], saved_state["edits"]
                for name, weight in weights.items():
                    masters[name] = weight.to(masters[name])
                self._install(masters)
                log.info(
                    "going on with an interrupted run after %d of %d edits", len(per_edit), len(self.edits)
                )
            size = self.config.edit_batch_size
            batches = [self.edits[i : i + size] for i in range(0, len(self.edits), size)]
            saved = time.monotonic()
            memory = dict(context.state)  # after the last whole step; a method may add to it early in a step
            state: dict[str, Any] | None = None

            def reach_checkpoint() -> None:
                nonlocal state
                if on_checkpoint is not None and len(per_edit) in checkpoints:
                    state = self._state(steps, per_edit, probed, baseline, masters)
                    on_checkpoint(state)

            with _shown(on_step, len(self.edits)) as show:
                show(len(per_edit))
                if per_edit:  # interrupted there
                    reach_checkpoint()
                for index in range(len(steps), len(batches)):
                    state = None
                    step, edits = self._step(index, batches[index], masters, context, probed, baseline)
                    steps.append(step)
                    per_edit += edits
                    memory = dict(context.state)
                    self._committing = False
                    show(len(per_edit))
                    due = len(per_edit) in checkpoints or time.monotonic() - saved > SAVE_SECONDS
                    if cache and due:
                        cache.save_partial(key, masters, memory, {"steps": steps, "edits": per_edit})
                        saved = time.monotonic()
                    reach_checkpoint()
            if state is None:
                state = self._state(steps, per_edit, probed, baseline, masters)
            if cache:
                cache.save(key, masters, state)
            return state
        except BaseException as error:
            # In the middle of a commit weights and records do not belong together.
            if cache and isinstance(error, KeyboardInterrupt) and steps and not self._committing:
                cache.save_partial(key, masters, memory, {"steps": steps, "edits": per_edit})
            self.revert()
            raise

    def _step(
        self,
        index: int,
        edits: Sequence[Edit],
        masters: dict[str, Tensor],
        context: Context,
        probed: dict[str, EditProbes],
        baseline: Baseline,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One update: propose, trim, add, round, measure."""
        started = time.perf_counter()
        ids = [edit.id for edit in edits]
        before = measure(self.lm, probed, baseline, ids)
        proposed_at = time.perf_counter()
        proposal = self.method.propose(self.lm, edits, self.hparams.values, context)
        remembered = dict(context.state)
        weights: dict[str, dict[str, Any]] = {}
        updates: dict[str, Tensor] = {}
        for position, (name, update) in enumerate(proposal.updates.items()):
            dense = update.dense().to(masters[name])
            regularize = make_regularizer(
                self.config.regularizer,
                self.config.keep,
                self.config.rect_convention,
                _generator(self.config.edit_seed, index, position),
                transposed=self.lm.is_transposed(name),
            )
            trimmed = dense
            finite = bool(torch.isfinite(dense).all())
            if finite:
                factors = self._pruned_factors(name, update, context.state)
                if factors is not None:
                    accumulated = (factors[0] @ factors[1].T).to(dense)
                    trimmed = accumulated - (masters[name] - self._originals[name].float())
                elif self.config.regularizer == "sphere" and isinstance(update, LowRank):
                    left, right = sphere_factors(
                        update.left, update.right, masters[name], transposed=self.lm.is_transposed(name)
                    )
                    trimmed = (left @ right.T).to(dense)
                elif regularize is not None:
                    trimmed = regularize(dense, masters[name], self._originals[name])
                # After rounding: in float16 a finite sum can become infinite.
                finite = bool(torch.isfinite((masters[name] + trimmed).to(self._originals[name].dtype)).all())
            updates[name] = trimmed
            weights[name] = {
                "update_norm": float(dense.norm()),
                "applied_norm": float(trimmed.norm()) if finite else None,
                "weight_norm": float(masters[name].norm()),
                "kept": int(torch.count_nonzero(trimmed)) / trimmed.numel() if finite else None,
                "changed": 0.0,
                "finite": finite,
            }
        # All or nothing: half an edit would be neither the method's result nor the model before it.
        self._committing = True
        if finite_step := all(w["finite"] for w in weights.values()):
            for name, trimmed in updates.items():
                stored = self.lm.weight(name).detach().clone()
                masters[name] += trimmed
                self._install({name: masters[name]})
                # After rounding: in 16 bits a small update can vanish.
                weights[name]["changed"] = int((self.lm.weight(name) != stored).sum()) / stored.numel()
            if self.method.after_step is not None:
                self.method.after_step(self.lm, edits, self.hparams.values, context)
        else:
            context.state.clear()
            context.state.update(remembered)
        done_at = time.perf_counter()
        after = measure(self.lm, probed, baseline, ids)
        step = {
            "edits": ids,
            "applied": finite_step,
            "weights": weights,
            "seconds": round(done_at - proposed_at, 4),
            "measuring_seconds": round(time.perf_counter() - done_at + proposed_at - started, 4),
        }
        records = [
            {
                "id": edit.id,
                "subject": edit.subject,
                "target": edit.target_new,
                "before": before[edit.id],
                "after": after[edit.id],
                "search": proposal.details[i],
                "flags": _flags(before[edit.id], after[edit.id], weights),
            }
            for i, edit in enumerate(edits)
        ]
        return step, records

    def _pruned_factors(
        self, name: str, update: LowRank | Dense, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """PRUNE's accumulated update of a weight in factors, kept in ``state``; None where it is not low-
        rank.
        """
        keys, dense = (f"prune.{name}.left", f"prune.{name}.right"), f"prune.{name}.dense"
        if self.config.regularizer != "prune" or dense in state:
            return None
        parts: list[Tensor] = []
        if isinstance(update, LowRank):
            parts = [in_double(update.left), in_double(update.right)]
            if keys[0] in state:
                before = [state[key].to(parts[0].device) for key in keys]
                parts = [torch.cat([old, new], 1) for old, new in zip(before, parts, strict=True)]
        if not parts or 2 * parts[0].shape[1] > min(len(part) for part in parts):
            for key in keys:  # from here on the dense form is as cheap
                state.pop(key, None)
            state[dense] = torch.ones(1)
            return None
        limit = largest_singular_value(self._originals[name])
        factors = prune_factors(parts[0], parts[1], limit)
        state.update(zip(keys, (factor.cpu() for factor in factors), strict=True))
        return factors

    # -- weights ----------------------------------------------------------------------------------

    def _master(self, name: str) -> Tensor:
        """A float32 copy to add updates to; remembers the original for :meth:`revert`."""
        weight = self.lm.weight(name)
        self._originals.setdefault(name, weight.detach().clone())
        return weight.detach().float().clone()

    @torch.no_grad()
    def _install(self, masters: dict[str, Tensor]) -> None:
        """Round master copies into the model."""
        for name, master in masters.items():
            weight = self.lm.weight(name)
            self._originals.setdefault(name, weight.detach().clone())
            weight.copy_(master)

    @torch.no_grad()
    def revert(self) -> None:
        """Put the original weights back, bit for bit. Does nothing on an unedited model."""
        for name, original in self._originals.items():
            self.lm.weight(name).copy_(original)
        self._originals.clear()

    # -- what the run consists of -----------------------------------------------------------------

    def load_moments(self) -> None:
        """Find or compute the second moments this run needs, once; :meth:`run` does it by itself."""
        if not self._moments_loaded:
            self._moments = self._load_moments()
            self._moments_loaded = True

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
        self.load_moments()
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
            "regularizer": config.regularizer,
            "keep": config.keep,
            "rect_convention": config.rect_convention if config.regularizer == "rect" else None,
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
        probed: dict[str, EditProbes],
        baseline: Baseline,
        masters: dict[str, Tensor],
    ) -> dict[str, Any]:
        """The report of the stream up to here, with every edit so far measured again."""
        description = self._description(self.edits[: len(per_edit)])
        end = measure(self.lm, probed, baseline, [record["id"] for record in per_edit])
        per_edit = [record | {"end": end[record["id"]]} for record in per_edit]
        seconds = [step["seconds"] for step in steps]
        flagged: dict[str, list[str]] = {}
        for record in per_edit:
            for flag in record["flags"]:
                flagged.setdefault(flag, []).append(record["id"])
        state = {
            **description,
            **self._origins(),
            "run": digest(description),
            "from_cache": False,
            "n_edits": len(per_edit),
            "flagged": flagged,
            "prompts_too_long": sum(probed[record["id"]].unreadable for record in per_edit),
            "right_after_each_edit": averages([record["after"] for record in per_edit]),
            "at_the_end": averages([record["end"] for record in per_edit]),
            "before_each_edit": averages([record["before"] for record in per_edit]),
            "weights": {name: self._totals(name, master) for name, master in masters.items()},
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
        return _finite(state)

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
        return weight_change(master, self._originals[name].float()) | stored

    def _warn_about_failures(self, state: dict[str, Any]) -> None:
        for flag, ids in state["flagged"].items():
            log.warning("%d of %d edits %s: %s", len(ids), state["n_edits"], FLAGS[flag], ", ".join(ids))
        if state["prompts_too_long"]:
            log.warning(
                "%d prompts are longer than the model can read and were left out", state["prompts_too_long"]
            )

    def report_json(self) -> str:
        """The report as JSON text."""
        return as_json(self.report)


def check_edits(config: EditConfig, edits: Sequence[Edit]) -> None:
    """Refuse edits that the method cannot use; needs no model."""
    check = METHODS[config.method].check
    if check is not None:
        check(edits)


def as_json(report: dict[str, Any] | None) -> str:
    """A report as the text of ``edit_report.json``."""
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


FLAGS = {
    "not_finite": "had a non-finite update, which was not applied",
    "no_change": "changed no weight",
    "no_gain": "did not make their target more probable",
}


def _flags(
    before: dict[str, float], after: dict[str, float], weights: dict[str, dict[str, Any]]
) -> list[str]:
    if not all(w["finite"] for w in weights.values()):
        return ["not_finite"]
    if all(w["changed"] == 0 for w in weights.values()):
        return ["no_change"]
    if not after["target_probability"] > before["target_probability"]:
        return ["no_gain"]
    return []


def _finite(value: Any) -> Any:
    """``value``, a JSON tree, with None for numbers that JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _generator(seed: int, step: int, position: int) -> torch.Generator:
    """Randomness of one weight in one step, the same whether or not the run was interrupted before it."""
    text = digest({"seed": seed, "step": step, "weight": position})
    return torch.Generator().manual_seed(int(text[:15], 16))


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


def save_checkpoint(
    folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any]
) -> None:
    """Write a Hugging Face checkpoint and ``edit_report.json``; the folder appears only when complete.

    Raises:
        UserError: if the folder exists and is not empty.
    """
    import shutil
    import tempfile

    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "edit_report.json").write_text(as_json(report), encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for path in temporary.iterdir():  # safetensors writes files only their owner can read
            if path.is_file():
                path.chmod(0o666 & ~umask)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds something already. Called before long work starts."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give another folder or remove it")
    check_parent(folder)


def check_parent(path: Path) -> None:
    """Refuse a path that cannot be created where it is."""
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise UserError(f"{path}: cannot be created; {ancestor} is not a folder that can be written")
