"""``--model edited_vllm``: a model is edited by Hugging Face transformers and evaluated by vLLM.

The arguments are those of ``edited_hf`` and of lm-eval's ``vllm``. The edited model goes to vLLM as a
checkpoint. What a task asks of the unedited model is answered by transformers on the CPU, from that
checkpoint and the original weights; the model is loaded there when it is first asked.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness_rect import embedded
from harness_rect.compat.lm_eval import IdRequest
from harness_rect.compat.lm_eval_vllm import ENGINE, AnsweringVLLM
from harness_rect.compat.prompt_options import results_of_evaluation
from harness_rect.config import ModelArguments, declared_arguments
from harness_rect.errors import UserError, did_you_mean, one_line_errors
from harness_rect.io.files import expanded
from harness_rect.model_wrappers import edited_hf
from harness_rect.model_wrappers.edited_hf import CheckingPrompts, EditedHF, check_prompts, share_logging
from harness_rect.model_wrappers.unedited import ComparingLM, Comparison
from harness_rect.models.prompt_format import ChatTemplate
from harness_rect.session import self_checks
from harness_rect.session.checkpoint import checkpoint_hashes

log = logging.getLogger("harness_rect.edited_vllm")

#: Arguments of both of lm-eval's classes that hold for the edited checkpoint too.
SHARED = frozenset(
    (
        *("trust_remote_code", "prefix_token_id", "batch_size", "max_batch_size"),
        *("max_length", "think_end_token"),
    )
)
#: Arguments of lm-eval's hf that the model on the CPU gets, besides.
SCORING = SHARED - {"batch_size", "max_batch_size"}
#: Arguments of lm-eval's hf about its answers, which vLLM gives here.
OF_ANSWERS = ("truncation", "softmax_dtype", "mixed_precision_dtype")
#: Arguments of editing, of lm-eval's hf, and of vLLM.
KNOWN = frozenset(declared_arguments(ModelArguments)) | edited_hf.THEIRS | ENGINE


class EditedVLLM(CheckingPrompts, AnsweringVLLM):
    """A causal language model into which a stream of edits goes before vLLM evaluates it.

    Args:
        pretrained: as in :class:`~harness_rect.model_wrappers.edited_hf.EditedHF`.
        **arguments: those of EditedHF, by which the model is loaded and edited, and all others to lm-eval's
            VLLM and vLLM's engine (``tensor_parallel_size``, ``gpu_memory_utilization``, ...). vLLM computes
            in the dtype in which the model is edited.

    Raises:
        UserError: as EditedHF, or an argument is not known, before the model is loaded.
    """

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        with one_line_errors():
            share_logging()
            _check(arguments)
            engine = {name: arguments.pop(name) for name in [*arguments] if _of_vllm_alone(name)}
            if not pretrained:
                embedded.unnamed.add(self)
            if arguments.get("save_edited") is not None:
                arguments["save_edited"] = expanded(str(arguments["save_edited"]))
            else:
                self._temporary = TemporaryDirectory(prefix="harness-rect-")
                arguments["save_edited"] = str(Path(self._temporary.name, "edited"))
            edited = EditedHF(pretrained, **arguments)
        self._checkpoint = str(arguments["save_edited"])
        self._info, self._edit_report = edited.get_model_info(), edited.edit_report
        self._weights_key = edited.run_key
        del self._info["computed_on"]["batch_size"]  # that of the other engine
        self._originals = {name: weight.cpu() for name, weight in edited.originals.items()}
        self._scoring = {name: value for name, value in arguments.items() if name in SCORING}
        self._scoring["add_bos_token"] = engine["add_bos_token"] = edited.add_bos_token
        engine["dtype"] = str(edited.model.dtype).removeprefix("torch.")
        tokenizer, template_arguments = edited.tokenizer, edited.chat_template_args
        del edited
        _free_memory()
        shared = {name: value for name, value in arguments.items() if name in SHARED}
        super().__init__(self._checkpoint, **shared, **engine)
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, template_arguments)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return self._template(chat_history, add_generation_prompt)

    def _check_prompts(self) -> None:
        check_prompts(self._edit_report, self.tokenizer, self._template.arguments)

    # -- the unedited model ---------------------------------------------------------------------------

    def generate_both(self, requests: Sequence[Any]) -> list[tuple[str, str]]:
        """As EditedHF: both answers are those of transformers, whose rounding is not vLLM's."""
        return self._both_models.generate_both(requests)

    def generate_unedited(self, requests: Sequence[Any]) -> list[str]:
        return self._both_models.generate_unedited(requests)

    def compare_ids(self, requests: Sequence[IdRequest]) -> list[Comparison]:
        return self._both_models.compare_ids(requests)

    @cached_property
    def _both_models(self) -> ComparingLM:
        log.info("transformers answers on the CPU what the tasks ask of the unedited model")
        size = self.batch_size if isinstance(self.batch_size, int) else 16
        model = ComparingLM(
            pretrained=self._checkpoint,
            tokenizer=self.tokenizer,
            device="cpu",
            batch_size=size,
            **self._scoring,
        )
        model.edited_from(self._originals)
        return model

    # -- what is reported -----------------------------------------------------------------------------

    @property
    def run_key(self) -> str | None:
        """Names the weights, and vLLM, in lm-eval's ``--use_cache`` file."""
        return None if self._weights_key is None else f"vllm:{self._weights_key}"

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's information, and what was done to the model, computed with and checked, as of EditedHF."""
        report = self._edit_report
        if report.method == "none":
            return self._info
        evaluated = checkpoint_hashes(Path(self._checkpoint), report.weights)
        weights = self_checks.Check(passed=None, about="the checkpoint has other names for the weights")
        if evaluated.keys() == report.weights.keys():
            weights = self_checks.of_weights(report, evaluated)
        checks = {
            "weights": weights,
            "revert": self_checks.Check(passed=None, about="the model in vLLM is not reverted"),
            "rect_counts": self_checks.of_counts(report),
            "reliability": self_checks.of_reliability(report, results_of_evaluation(), same_arithmetic=False),
        }
        return {**self._info, "self_checks": self_checks.made(checks)}


def _of_vllm_alone(name: str) -> bool:
    return name in ENGINE and name not in edited_hf.THEIRS


def _check(arguments: Mapping[str, Any]) -> None:
    """Refuse what vLLM cannot do and names that nobody knows, before the model is loaded and edited."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "edited_vllm cannot run under accelerate launch or torchrun: vLLM starts its own processes;"
            " run lm_eval by itself with tensor_parallel_size=N or pipeline_parallel_size=N"
        )
    if arguments.get("peft"):
        raise UserError("peft: edited_vllm needs a whole model; merge the adapter into it first")
    for name in OF_ANSWERS:
        if arguments.get(name) not in (None, False):
            raise UserError(f"{name}: is about the answers of hf, and vLLM answers here; leave it out")
    for name in arguments.keys() - KNOWN:
        raise UserError(
            f"model_args: edited_vllm has no argument {name!r}: {did_you_mean(name, sorted(KNOWN))}"
        )


def _free_memory() -> None:
    """Give the memory of the model that was edited back to its device, where vLLM needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
