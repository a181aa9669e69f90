"""Names of lm-eval that tasks and sweeps use and that are not documented as stable, for 0.4.13 to 0.5.

``tests/contracts`` checks each name. Models are in :mod:`.lm_eval_model`, which imports lm-eval's own.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lm_eval import evaluator
from lm_eval.api import metrics as _metrics
from lm_eval.api import task as _task
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_aggregation
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers import utils as _loggers
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from torch.utils import collect_env

from harness_rect.errors import Failed
from harness_rect.io.checksums import SUMS, write_sums
from harness_rect.io.files import temporary_folder, written_whole
from harness_rect.io.progress import logging_only

__all__ = [
    "COMPARE_IDS",
    "GENERATE",
    "GENERATE_BOTH",
    "GENERATE_SEEDED",
    "GENERATE_UNEDITED",
    "SCORE_IDS",
    "Finished",
    "IdRequest",
    "Instance",
    "KeptTasks",
    "YamlTask",
    "build_arguments",
    "describe_machine",
    "evaluate",
    "is_json",
    "parsed_arguments",
    "request_fields",
    "sample_size",
]

#: Whether tasks are scored by lm-eval 0.5's scorers.
SCORERS = hasattr(_task, "GenerateTask")
_Base: Any = _task.GenerateTask if SCORERS else _task.ConfigurableTask


class YamlTask(_Base):
    """A task from a YAML file whose metrics come from ``process_results`` alone.

    lm-eval 0.4 looks metrics up on the hub where the YAML gives no ``process_results``, and 0.5 refuses a
    metric that shares its name with one of its own (acc, f1) unless the task has that one's output type, and
    prefers the YAML's aggregation to :meth:`aggregation`. Here neither happens.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        config = {key: value for key, value in config.items() if key != "class"}
        if not SCORERS:
            config.setdefault("process_results", "process_results")  # with any value 0.4 does not ask the hub
        super().__init__(config=config)

    def _build_scorers(self) -> list[Any]:
        from lm_eval.api.metrics import Metric

        def no_metric(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("values of this task's metrics come from process_results")

        metrics = [
            # Without an aggregation of its own a metric takes the one of `aggregation`.
            Metric(one["metric"], no_metric, higher_is_better=one.get("higher_is_better", True))
            for one in self.config.metric_list
        ]
        listed = self.config.filter_list
        self.config.filter_list = [{**entry, "metric_list": metrics} for entry in listed]
        try:
            return super()._build_scorers()
        finally:
            self.config.filter_list = listed

    def download(self, *args: Any, **given: Any) -> None:
        """Without lm-eval's warning that rows made by a function can be given metadata: ours are."""
        with logging_only(logging.ERROR, "lm_eval.api.task"):
            super().download(*args, **given)

    #: False under ``--predict_only``, where lm-eval wants the answers alone.
    scored = True

    def override_metric(self, metric_name: str) -> None:
        """Give every document no value under lm-eval's placeholder for metrics."""
        super().override_metric(metric_name)
        self.scored = False
        self.process_results = lambda doc, results: {metric_name: None}
        for name in ("aggregation", "higher_is_better"):
            setattr(self, name, getattr(super(), name))

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        """metric -> how the values of all documents become one."""
        if not SCORERS:
            return super().aggregation()
        listed = {one["metric"]: one.get("aggregation", "mean") for one in self.config.metric_list}
        return {name: get_aggregation(how) if isinstance(how, str) else how for name, how in listed.items()}

    def aggregate(self, *args: Any, **given: Any) -> Any:
        """Of lm-eval 0.5: standard errors of means alone, as in 0.4, where it would bootstrap all others."""
        with mock.patch.object(_metrics, "stderr_for_metric", _stderr_of_means):
            return super().aggregate(*args, **given)

    def apply_filters(self) -> None:
        """Without the answers to copies of a request, which lm-eval adds to give processes equal numbers."""
        for request in self._instances:
            del request.resps[request.repeats or 1 :]
        super().apply_filters()


def _stderr_of_means(metric: Any, bootstrap_iters: int) -> Callable[[Sequence[Any]], float] | None:
    return _metrics.mean_stderr if metric is _metrics.mean and bootstrap_iters > 0 else None


#: The lm-eval method that scores token ids; every model class built on its TemplateLM has it.
SCORE_IDS = "_loglikelihood_tokens"


#: The lm-eval method that generates.
GENERATE = "generate_until"
#: Methods of ours that take the same requests: (edited model's answer, unedited model's answer) of each, and
#: the unedited model's answer alone. A model class that knows the unedited model overrides them.
GENERATE_BOTH, GENERATE_UNEDITED = "generate_both", "generate_unedited"
#: The same for requests of token ids: (KL(unedited || edited) in nats, number of places at which
#: another token is likeliest, log-likelihood by the unedited model), each summed over the last ids.
COMPARE_IDS = "compare_ids"


def _unknown(self: LM, requests: Sequence[Instance]) -> list[None]:
    """The answers of a model class that does not know the unedited model."""
    return [None] * len(requests)


for _name in (GENERATE_BOTH, GENERATE_UNEDITED, COMPARE_IDS):
    setattr(LM, _name, _unknown)

#: A method of ours that samples; other model classes do it as they always do.
GENERATE_SEEDED = "generate_seeded"
setattr(LM, GENERATE_SEEDED, lambda self, requests: self.generate_until(requests))


class IdRequest(Instance):
    """A request for the log-likelihood of some token ids after others, the last two of its arguments.

    lm-eval passes requests unchanged to the method named ``request_type``; this one reads each as a triple
    (cache key, context ids, continuation ids).
    """

    def _triple(self) -> tuple[None, list[int], list[int]]:
        return (None, *self.arguments[-2:])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._triple())

    def __getitem__(self, index: int) -> Any:
        return self._triple()[index]

    def __len__(self) -> int:
        return 3


def request_fields(task: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Which document a request belongs to, from what lm-eval gives ``construct_requests``."""
    if SCORERS:
        return {"task_name": task.task_name, "doc_id": given["doc_id"]}
    return {"metadata": given["metadata"]}


def parsed_arguments(text: str) -> dict[str, Any]:
    """``NAME=VALUE,...`` with numbers and booleans, as lm-eval's command reads ``--model_args``."""
    return dict(simple_parse_args_string(text))


def sample_size(task: Any, limit: float | None) -> int | None:
    """The number of documents for ``--limit``, which is a number of them or, below 1, a share."""
    if limit is None:
        return None
    return math.ceil(len(task.eval_docs) * limit) if limit < 1 else int(limit)


class KeptTasks(TaskManager):
    """Loads tasks once: asked for the same names again, it returns the same objects."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._kept: dict[tuple[str, ...], Any] = {}

    def load(self, specs: Any, *args: Any, **given: Any) -> Any:
        names = tuple(specs)
        if names not in self._kept:
            self._kept[names] = super().load(list(names), *args, **given)
        return self._kept[names]


# lm-eval asks git for the commit of the current folder; where that is none, git would say so on stderr.
_unheard = functools.partial(subprocess.check_output, stderr=subprocess.DEVNULL)
vars(_loggers)["subprocess"] = SimpleNamespace(**vars(subprocess) | {"check_output": _unheard})

# Descriptions of the machine and the working directory, for which lm-eval starts a dozen programs.
_environment = functools.cache(collect_env.get_pretty_env_info)
_commit = functools.cache(evaluator.get_git_commit_hash)


def describe_machine() -> None:
    """Compute what results files record of the machine and of the current working directory."""
    _environment()
    _commit.cache_clear()
    _commit()


class Finished:
    """Results that are not on disk yet."""

    def __init__(self, tracker: EvaluationTracker, results: dict[str, Any]) -> None:
        self._tracker, self.results = tracker, results

    def write(self, folder: Path, **more: Any) -> None:
        """Write the files that the ``lm_eval`` command writes, and their checksums.

        ``results.json`` is written last, so that it means done.

        Args:
            more: goes into the results.
        """
        samples = self.results.pop("samples", None)
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder, "results") as temporary:
            self._tracker.output_path = str(temporary / "results.json")
            self._tracker.save_results_aggregated(self.results | more, samples)
            for task in self.results["configs"] if samples is not None else ():
                self._tracker.save_results_samples(task, samples[task])
            ending = f"_{self._tracker.date_id}"
            written = sorted(temporary.iterdir(), key=lambda path: path.name.startswith("results"))
            lines = sum(path.read_bytes().count(b"\n") for path in written[:-1])
            complete = written and lines == sum(map(len, (samples or {}).values())) and is_json(written[-1])
            if not complete or len(written) != 1 + len(samples or ()):  # its writer only logs failures
                raise Failed(f"{folder}: lm-eval could not write the results; is the disk full?")
            *names, last = [path.rename(temporary / path.name.replace(ending, "")).name for path in written]
            write_sums(temporary)
            for name in (*names, SUMS, last):
                with written_whole(folder / name) as whole:
                    (temporary / name).replace(whole)


def is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return False


def evaluate(model: LM, name: str, **given: Any) -> Finished:
    """``simple_evaluate`` of a model that is loaded, as the command line would record it.

    Args:
        name: what ``--model`` would be. given: the arguments of ``simple_evaluate``.
    """
    tracker = EvaluationTracker(output_path="results.json")
    with (
        mock.patch.object(collect_env, "get_pretty_env_info", _environment),
        mock.patch.object(evaluator, "get_git_commit_hash", _commit),
    ):
        given.setdefault("fewshot_as_multiturn", _multiturn(given.get("apply_chat_template")))
        results = evaluator.simple_evaluate(model=model, evaluation_tracker=tracker, **given)
    if results is None:
        raise RuntimeError("lm-eval returned no results")
    # It was given a model, not the name of one.
    results["config"]["model"] = tracker.general_config_tracker.model_source = name
    return Finished(tracker, dict(results))


def _multiturn(chat: bool | str | None) -> bool | None:
    """``fewshot_as_multiturn`` where the command line does not give it."""
    return True if chat else None


def build_arguments(
    model: LM, limit: int | None, apply_chat_template: bool | str, system_instruction: str | None
) -> dict[str, Any]:
    """What ``evaluate`` passes to ``build_all_requests`` in one process."""
    chat = bool(apply_chat_template)
    return {
        "limit": limit,
        "samples": None,
        "rank": 0,
        "world_size": 1,
        "cache_requests": False,
        "rewrite_requests_cache": False,
        "system_instruction": system_instruction,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": _multiturn(chat),
        "chat_template": model.apply_chat_template if chat else None,
        "tokenizer_name": model.tokenizer_name if chat else "",
    }
