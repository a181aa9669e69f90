"""What only lm-eval knows of a running evaluation: how it puts prompts to the model, and its scores.

lm-eval makes the model before it says how prompts are put, and tells the tasks alone; it asks the model for
what to report after it has the scores, without them. Both are therefore read from the frames of the calls of
``simple_evaluate`` and ``evaluate``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

from lm_eval import evaluator

#: The functions whose calls are looked for.
_CALLS = frozenset(
    inspect.unwrap(function).__code__ for function in (evaluator.simple_evaluate, evaluator.evaluate)
)


class PromptOptions(NamedTuple):
    """lm-eval's options of these names."""

    apply_chat_template: bool | str
    system_instruction: str | None


def options_of_evaluation() -> PromptOptions | None:
    """Those of the innermost evaluation of which the caller is part, None outside of one."""
    given = _locals()
    if given is None:
        return None
    return PromptOptions(given["apply_chat_template"] or False, given["system_instruction"] or None)


def results_of_evaluation() -> Mapping[str, Any] | None:
    """The results of the innermost evaluation of which the caller is part; None where it has none yet."""
    found = (_locals() or {}).get("results")
    return found if isinstance(found, Mapping) else None


def output_path_of_evaluation() -> str | None:
    """Where the innermost evaluation of which the caller is part will write its results; None if nowhere."""
    tracker = (_locals() or {}).get("evaluation_tracker")
    return getattr(tracker, "output_path", None)


def limit_of_evaluation() -> float | None:
    """How many rows, or what share of them, the innermost evaluation takes of each task; None for all."""
    return (_locals() or {}).get("limit")


def _locals() -> Mapping[str, Any] | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in _CALLS:
        frame = frame.f_back
    return None if frame is None else frame.f_locals
