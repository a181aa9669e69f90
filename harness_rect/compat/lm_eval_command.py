"""What the ``lm_eval`` command does with its results, of which nothing is documented as stable."""

from __future__ import annotations

import atexit
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker, evaluation_tracker
from lm_eval.utils import make_table

from harness_rect.compat.lm_eval import is_json
from harness_rect.errors import Failed, tell

log = logging.getLogger(__name__)


def call_after_saving(function: EntryPoint) -> None:
    """Call ``function(results, output_path)`` once after lm-eval has saved its results, on the main process.

    The function is loaded then. An error in it is not the evaluation's: it is logged for debugging only.

    lm-eval only logs that it could not save. Here the file is then removed, if it is not whole, and the
    command ends, after its tables, with a line and exit status 1.
    """
    aggregated = EvaluationTracker.save_results_aggregated
    of_task = EvaluationTracker.save_results_samples

    @functools.wraps(aggregated)
    def save(self: Any, results: dict[str, Any], samples: Mapping[str, Sequence[Any]] | None = None) -> None:
        EvaluationTracker.save_results_aggregated = aggregated
        left = set(results.get("configs", ()) if samples else ())
        lost: list[str] = []
        atexit.register(_say, lost)  # called after what the function registers

        @functools.wraps(of_task)
        def save_samples(self: Any, task_name: str, samples: Sequence[Any]) -> None:
            with _Reason() as reason:
                of_task(self, task_name=task_name, samples=samples)
            if self.output_path and _lines(path := _file(self, task_name)) != len(samples):
                lost.append(_given_up(path, reason))
            left.discard(task_name)
            if not left:
                EvaluationTracker.save_results_samples = of_task
                _end(results, lost)

        with _Reason() as reason:
            aggregated(self, results=results, samples=samples)
        if self.output_path and not is_json(path := _file(self)):
            lost.append(_given_up(path, reason))
        try:
            function.load()(results, self.output_path)
        except Exception:
            log.debug("%s failed", function.value, exc_info=True)
        if left and not lost:
            EvaluationTracker.save_results_samples = save_samples
        else:
            _end(results, lost)

    EvaluationTracker.save_results_aggregated = save


def _end(results: dict[str, Any], lost: Sequence[str]) -> None:
    """End the command here if something was lost: the tables are all that it would still do."""
    if lost:
        print(make_table(results))
        if "groups" in results:
            print(make_table(results, "groups"))
        raise SystemExit(1)


def _say(lost: Sequence[str]) -> None:
    if lost:
        sys.stdout.flush()
        what = f"{lost[0]} (and {len(lost) - 1} more)" if len(lost) > 1 else lost[0]
        tell(Failed(f"{what}; make room or give another --output_path, and give the command again"))


class _Reason:
    """Why lm-eval cannot save something within the block: the error that it handles when it logs that."""

    text = "is the disk full?"

    def __enter__(self) -> _Reason:
        evaluation_tracker.eval_logger.addFilter(self.filter)
        return self

    def __exit__(self, *error: object) -> None:
        evaluation_tracker.eval_logger.removeFilter(self.filter)

    def filter(self, record: logging.LogRecord) -> bool:
        if (error := sys.exc_info()[1]) is not None:
            self.text = getattr(error, "strerror", None) or str(error)
        return True


def _file(tracker: Any, task: str | None = None) -> Path:
    """Where lm-eval writes the results, or the samples of a task."""
    place, date = Path(tracker.output_path), getattr(tracker, "date_id", "")
    named = place.suffix == ".json"
    folder = place.parent if named else place / str(tracker.general_config_tracker.model_name_sanitized)
    name = place.stem if named else "results"
    return folder / (f"{name}_{date}.json" if task is None else f"samples_{task}_{date}.jsonl")


def _lines(path: Path) -> int | None:
    try:
        with path.open("rb") as lines:
            return sum(line.endswith(b"\n") for line in lines)
    except OSError:
        return None


def _given_up(path: Path, reason: _Reason) -> str:
    with suppress(OSError):
        path.unlink()
    return f"{path}: lm-eval could not write it: {reason.text}"
