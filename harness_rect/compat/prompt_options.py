"""How the evaluation that is running puts prompts to the model.

lm-eval makes the model before it says so, and tells the tasks alone. The arguments of ``simple_evaluate`` and
``evaluate`` are therefore read from the frames of their calls.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import NamedTuple

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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in _CALLS:
        frame = frame.f_back
    if frame is None:
        return None
    given = frame.f_locals
    return PromptOptions(given["apply_chat_template"] or False, given["system_instruction"] or None)
