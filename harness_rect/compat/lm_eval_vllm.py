"""The parts of lm-eval's vLLM class that the model class overrides and that are not documented as stable."""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from harness_rect.answers import Answer
from harness_rect.compat.lm_eval_model import CheckedLM, SeededLM, prompt_seed
from harness_rect.errors import UserError, one_line_errors

with one_line_errors():
    if find_spec("vllm") is None:
        raise UserError("edited_vllm needs vLLM, which is not installed: pip install 'harness-rect[vllm]'")

from lm_eval.models.vllm_causallms import VLLM
from vllm import LLM, EngineArgs

#: Arguments of lm-eval's class, and of vLLM's engine, to which the class passes all others. It gives the
#: engine the model itself.
ENGINE = frozenset(
    inspect.signature(VLLM.__init__).parameters.keys()
    | inspect.signature(LLM.__init__).parameters.keys()
    | {field.name for field in fields(EngineArgs)}
) - {"self", "kwargs", "model"}


class AnsweringVLLM(SeededLM, CheckedLM, VLLM):
    """lm-eval's vLLM class with answers that say how they ended, and samples seeded by their prompts.

    The samples are not those of HFLM, whose random numbers are others.
    """

    @property
    def longest_answer(self) -> int:
        # A token is left for generating, and the first one that vLLM reads has no probability.
        return self.max_length - 2

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
    ) -> Any:
        if self._seeded:
            for ids, sampling in zip(requests, sampling_params, strict=True):
                sampling.seed = prompt_seed(ids)
        outputs = super()._model_generate(requests, generate, sampling_params)
        for found in (output.outputs[0] for output in outputs if generate):
            found.text = Answer(found.text, ended=found.finish_reason == "stop")
        return outputs
