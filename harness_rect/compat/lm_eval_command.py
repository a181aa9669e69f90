"""What the ``lm_eval`` command does with its results, of which nothing is documented as stable."""

from __future__ import annotations

import functools
import inspect
import logging
from importlib.metadata import EntryPoint
from typing import Any

from lm_eval.loggers import EvaluationTracker

log = logging.getLogger(__name__)


def call_after_saving(function: EntryPoint) -> None:
    """Call ``function(results, output_path)`` once after lm-eval has saved its results, on the main process.

    The function is loaded then. An error in it is not the evaluation's: it is logged for debugging only.
    """
    original = EvaluationTracker.save_results_aggregated
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(self: Any, *args: Any, **given: Any) -> None:
        EvaluationTracker.save_results_aggregated = original
        original(self, *args, **given)
        try:
            results = signature.bind(self, *args, **given).arguments["results"]
            function.load()(results, self.output_path)
        except Exception:
            log.debug("%s failed", function.value, exc_info=True)

    EvaluationTracker.save_results_aggregated = save
