"""Repeated evaluation of one model, each with the results of a stock ``lm_eval --model edited_hf``.

lm-eval builds all tasks and requests for each evaluation. Here they are built once per model; before each
further evaluation only the answers are removed from the requests. The editing tasks are about other edits
each time: their requests are rebuilt, from token ids that are kept.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import harness_rect
from harness_rect._autoload import tasks_folder
from harness_rect.compat.lm_eval import Finished, KeptTasks, build_arguments, evaluate, sample_size
from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.evaluation.editing.task import EditingTask
from harness_rect.experiments.sweep.plan import Evaluation, SweepConfig
from harness_rect.fingerprint import digest
from harness_rect.io.checksums import Damaged, check_sums, listed, set_aside
from harness_rect.io.progress import logging_only
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.models.prompt_format import PromptFormat


class QuietHF(EditedHF):
    """edited_hf without a progress bar for each task of each evaluation."""

    quiet = True


def prompt_format(model: EditedHF, config: SweepConfig) -> PromptFormat:
    """How prompts are put to a model in editing and evaluation."""
    return PromptFormat.of(model.tokenizer, **config.prompts, arguments=model.chat_template_args)


class Evaluator:
    """The tasks of a sweep, loaded for one model.

    Args:
        model: evaluated in the state that it has at the time of each evaluation.
        config: the sweep.
        model_args: of the unedited model; they reach the tasks as metadata.

    Raises:
        UserError: a task is unknown or cannot be loaded.
    """

    def __init__(self, model: EditedHF, config: SweepConfig, model_args: dict[str, Any]) -> None:
        self.model, self.config = model, config
        # lm-eval warns of every task that reads metadata.
        with logging_only(logging.ERROR, "lm_eval.api.task"):
            self._load_tasks(model_args)

    def _load_tasks(self, model_args: dict[str, Any]) -> None:
        config = self.config
        given: dict[str, Any] = {"include_path": tasks_folder(), "metadata": model_args}
        # lm-eval's own tasks are thousands of files, which take seconds to read.
        ours = all(task.startswith("rect_") for task in config.tasks)
        self._manager = KeptTasks(**given, include_defaults=not ours)
        try:
            self._names = list(dict.fromkeys(n for task in config.tasks for n in self._match(task)))
            self.tasks: dict[str, Any] = dict(self._manager.load(self._names)["tasks"])
        except (ValueError, KeyError) as error:  # lm-eval's, for a task named twice
            if isinstance(error, UserError):
                raise
            raise UserError(f"tasks: {str(error).splitlines()[0]}") from None
        self._metadata = {name: dict(task.config.metadata or {}) for name, task in self.tasks.items()}
        self.editing = [task for task in self.tasks.values() if isinstance(task, EditingTask)]
        for task in self.tasks.values():
            if not isinstance(task, EditingTask):
                _build_once(task)

    def _match(self, pattern: str) -> Sequence[str]:
        matches = self._manager.match_tasks([pattern])
        if not matches:
            raise UserError(f"tasks: there is no task {pattern!r}; `lm_eval ls tasks` lists them")
        return matches

    def build(self) -> None:
        """Build all requests that do not depend on the edits, with the arguments of simple_evaluate."""
        for task in self.tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.config.seed[3])
            if not isinstance(task, EditingTask):
                self._build(task)

    def _build(self, task: Any) -> None:
        limit = sample_size(task, self.config.limit)
        task.build_all_requests(**build_arguments(self.model, limit, **self.config.prompts))

    def requests(self, edits: Sequence[Edit]) -> int:
        """The number of requests of one evaluation whose editing tasks are about ``edits``."""
        for task in self.editing:
            task.score_edits(edits)
            self._build(task)
        return sum(len(task.instances) for task in self.tasks.values())

    def identity(self) -> dict[str, Any]:
        """Everything except the model and the edits that determines the scores of these tasks."""
        tasks = {}
        for name, task in self.tasks.items():
            tasks[name] = {"version": task.VERSION, "n-shot": task.get_config("num_fewshot")}
            if not isinstance(task, EditingTask):  # edits are part of the trajectory's identity
                requests = [[i.doc_id, i.idx, i.request_type, i.args, i.doc] for i in task.instances]
                tasks[name]["requests_sha256"] = digest({"requests": requests})
        config = self.config
        return {
            **prompt_format(self.model, config).describe(),
            "limit": config.limit,
            "batch_size": config.batch_size,
            "seed": list(config.seed),
            "log_samples": config.log_samples,
            "versions": {
                "harness_rect": harness_rect.__version__,
                **{name: version(name) for name in ("lm_eval", "torch", "transformers")},
            },
            "tasks": tasks,
        }

    def evaluate(
        self, evaluation: Evaluation, report: dict[str, Any] | None, originals: Mapping[str, Tensor]
    ) -> Finished:
        """Score the model as it is now.

        Args:
            evaluation: what is evaluated, for the results file.
            report: what was done to the model; None for the unedited one.
            originals: the weights that were edited, as they were before.
        """
        for task in self.editing:
            task.score_edits(evaluation.edits)
        for name, task in self.tasks.items():
            task.config.metadata = self._metadata[name] | evaluation.model_args
        self.model.describe(report, originals)
        config = self.config
        return evaluate(
            self.model,
            "edited_hf",
            model_args=evaluation.model_args,
            tasks=self._names,
            batch_size=str(config.batch_size),  # recorded only, as the command line's text
            gen_kwargs={},
            device=config.device,
            limit=config.limit,
            **config.prompts,
            log_samples=config.log_samples,
            task_manager=self._manager,
            random_seed=config.seed[0],
            numpy_random_seed=config.seed[1],
            torch_random_seed=config.seed[2],
            fewshot_random_seed=config.seed[3],
        )


def read_results(path: Path) -> dict[str, Any] | None:
    """A results file of a sweep, or None where there is none or it, or its samples, are damaged.

    Damaged ones are set aside.

    Raises:
        UserError: the file is something else.
    """
    if not path.is_file():
        return None
    results, sums = None, listed(path.parent)
    with contextlib.suppress(OSError, ValueError, RecursionError):
        results = json.loads(path.read_text(encoding="utf-8"))
    ours = isinstance(results, dict) and isinstance(results.get("sweep"), dict)
    if ours or sums:
        try:
            check_sums(path.parent, sorted({path.name, *sums}))
        except Damaged as problem:
            set_aside(path, "the evaluation", problem)
            return None
    if ours:
        return results
    raise UserError(f"{path}: not written by a sweep; remove it, or give another output folder")


def _build_once(task: Any) -> None:
    """Make ``task`` build its requests on the first call only, and remove their answers on later ones."""
    build: Callable[..., None] = task.build_all_requests
    built_for: list[dict[str, Any]] = []

    @functools.wraps(build)
    def build_or_clear(**kwargs: Any) -> None:
        if built_for != [kwargs]:
            build(**kwargs)
            built_for[:] = [kwargs]
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    task.build_all_requests = build_or_clear
