"""Evaluating one model again and again, as a stock ``lm_eval --model edited_hf`` would each time.

lm-eval builds every task and every request anew for each evaluation. Here the tasks are loaded once for a
model and their requests are built once; before each further evaluation the requests only lose the answers
they were given. The two editing tasks ask about other edits each time, so theirs are built anew, from
token ids that are kept.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from torch.utils import collect_env

import harness_rect
from harness_rect._autoload import tasks_folder
from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.evaluation.editing import EditingTask
from harness_rect.experiments.sweep.plan import Evaluation, SweepConfig
from harness_rect.fingerprint import digest
from harness_rect.io.files import temporary_folder, written_whole
from harness_rect.io.progress import logging_only
from harness_rect.model_wrappers.edited_hf import EditedHF


class QuietHF(EditedHF):
    """edited_hf without a progress bar for each task of each evaluation."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)


class Evaluator:
    """The tasks of a sweep, loaded for one model.

    Args:
        model: the model that will be evaluated, in whatever state it is then.
        config: the sweep.
        model_args: of the unedited model; they reach the tasks as metadata.

    Raises:
        UserError: a task is unknown or cannot be loaded.
    """

    def __init__(self, model: EditedHF, config: SweepConfig, model_args: dict[str, Any]) -> None:
        self.model, self.config = model, config
        # It takes every task that reads metadata for a mistake.
        with logging_only(logging.ERROR, "lm_eval.api.task"):
            self._load_tasks(model_args)

    def _load_tasks(self, model_args: dict[str, Any]) -> None:
        config = self.config
        self._manager = TaskManager(include_path=tasks_folder(), metadata=model_args)
        try:
            names = list(dict.fromkeys(n for task in config.tasks for n in self._match(task)))
            self._chosen: list[Task | Group] = list(self._load(names))
            loaded = self._manager.load(list(self._chosen))["tasks"]
        except (ValueError, KeyError) as error:  # lm-eval's, for a task named twice
            if isinstance(error, UserError):
                raise
            raise UserError(f"tasks: {str(error).splitlines()[0]}") from None
        self.tasks: dict[str, Task] = dict(loaded)
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

    def _load(self, names: Sequence[str]) -> Iterator[Task | Group]:
        for name in names:
            loaded = self._manager.load([name])
            if name in loaded["groups"]:
                yield loaded["groups"][name]
            else:  # one task, or those of a tag
                yield from loaded["tasks"].values()

    def build(self) -> None:
        """Build all requests that do not depend on the edits, as simple_evaluate will ask for them."""
        for task in self.tasks.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.config.seed[3])
            if not isinstance(task, EditingTask):
                task.build_all_requests(**_defaults(get_sample_size(task, self.config.limit)))

    def requests(self, edits: Sequence[Edit]) -> int:
        """How many requests one evaluation makes, where ``edits`` are those asked about."""
        for task in self.editing:
            task.score_edits(edits)
            task.build_all_requests(**_defaults(get_sample_size(task, self.config.limit)))
        return sum(len(task.instances) for task in self.tasks.values())

    def identity(self) -> dict[str, Any]:
        """What the scores of these tasks depend on, beside the model and the edits."""
        tasks = {}
        for name, task in self.tasks.items():
            tasks[name] = {"version": task.VERSION, "n-shot": task.get_config("num_fewshot")}
            if not isinstance(task, EditingTask):  # edits are part of the trajectory's identity
                asked = [[i.doc_id, i.idx, i.request_type, i.args, i.doc] for i in task.instances]
                tasks[name]["requests_sha256"] = digest({"requests": asked})
        config = self.config
        return {
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

    def evaluate(self, evaluation: Evaluation, report: dict[str, Any] | None) -> _Finished:
        """Score the model as it is now.

        Args:
            evaluation: what is evaluated, for the results file.
            report: what was done to the model; None for the unedited one.
        """
        for task in self.editing:
            task.score_edits(evaluation.edits)
        for name, task in self.tasks.items():
            task.config.metadata = self._metadata[name] | evaluation.model_args
        self.model.describe(report)
        config = self.config
        tracker = EvaluationTracker(output_path="results.json")
        with (
            mock.patch.object(collect_env, "get_pretty_env_info", _environment),
            mock.patch.object(evaluator, "get_git_commit_hash", _commit),
        ):
            results = evaluator.simple_evaluate(
                model=self.model,
                model_args=evaluation.model_args,
                tasks=list(self._chosen),
                batch_size=str(config.batch_size),  # recorded only, as the command line's text
                gen_kwargs={},
                device=config.device,
                limit=config.limit,
                log_samples=config.log_samples,
                evaluation_tracker=tracker,
                fewshot_as_multiturn=None,
                task_manager=self._manager,
                random_seed=config.seed[0],
                numpy_random_seed=config.seed[1],
                torch_random_seed=config.seed[2],
                fewshot_random_seed=config.seed[3],
            )
        if results is None:
            raise RuntimeError("lm-eval returned no results")
        # It was handed a model, not the name of one.
        results["config"]["model"] = tracker.general_config_tracker.model_source = "edited_hf"
        return _Finished(tracker, dict(results))


class _Finished:
    """Results that are not on disk yet."""

    def __init__(self, tracker: EvaluationTracker, results: dict[str, Any]) -> None:
        self._tracker, self.results = tracker, results

    def write(self, folder: Path, sweep: dict[str, Any]) -> None:
        """Write the results with lm-eval's own writer; ``results.json`` last, so that it means done.

        Args:
            sweep: goes into the results under ``sweep``.
        """
        samples = self.results.pop("samples", None)
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder, "results") as temporary:
            self._tracker.output_path = str(temporary / "results.json")
            self._tracker.save_results_aggregated(self.results | {"sweep": sweep}, samples)
            for task in self.results["configs"] if samples is not None else ():
                self._tracker.save_results_samples(task, samples[task])
            ending = f"_{self._tracker.date_id}"
            written = sorted(temporary.iterdir(), key=lambda path: path.name.startswith("results"))
            lines = sum(path.read_bytes().count(b"\n") for path in written[:-1])
            complete = written and lines == sum(map(len, (samples or {}).values()))
            if not complete or len(written) != 1 + len(samples or ()):  # its writer only logs what fails
                raise RuntimeError(f"lm-eval could not write the results of {folder}")
            for path in written:
                with written_whole(folder / path.name.replace(ending, "")) as whole:
                    path.replace(whole)


def read_results(path: Path) -> dict[str, Any] | None:
    """A results file of a sweep, or None where there is none.

    Raises:
        UserError: the file is something else.
    """
    if not path.is_file():
        return None
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(results, dict) and isinstance(results.get("sweep"), dict):
            return results
    raise UserError(f"{path}: not written by a sweep; remove it, or give another output folder")


def _defaults(limit: int | None) -> dict[str, Any]:
    """What lm-eval's evaluate passes to build_all_requests in one process without a chat template."""
    return {
        "limit": limit,
        "samples": None,
        "rank": 0,
        "world_size": 1,
        "cache_requests": False,
        "rewrite_requests_cache": False,
        "system_instruction": None,
        "apply_chat_template": False,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "tokenizer_name": "",
    }


def _build_once(task: Task) -> None:
    """Let ``task`` build its requests on the first call, and clear their answers on later ones."""
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


# What lm-eval says of the machine and the working directory. It starts a dozen programs for that, which
# is too much for every evaluation.
_environment = functools.cache(collect_env.get_pretty_env_info)
_commit = functools.cache(evaluator.get_git_commit_hash)


def describe_machine() -> None:
    """Find out what every results file will say of this machine."""
    _environment()
    _commit()
