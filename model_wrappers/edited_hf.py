"""``--model edited_hf``: lm-eval's Hugging Face model, edited before it is evaluated.

Everything ``HFLM`` takes works here too. The class knows nothing of editing methods: it validates the
arguments, hands the model to an :class:`~harness_rect.session.EditSession`, and reports what was done.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import get_max_memory
from lm_eval.models.huggingface import HFLM
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harness_rect import embedded
from harness_rect.compat.lm_eval_command import call_after_saving
from harness_rect.compat.lm_eval_model import KeyedAnswers
from harness_rect.compat.prompt_options import (
    PromptOptions,
    limit_of_evaluation,
    options_of_evaluation,
    output_path_of_evaluation,
    results_of_evaluation,
)
from harness_rect.config import (
    Argument,
    EditConfig,
    ModelArguments,
    declared_arguments,
    refuse_settings,
)
from harness_rect.edits import EditStream, load_edits
from harness_rect.errors import UserError, closest, inside_lm_eval_command, one_line_errors
from harness_rect.fingerprint import computation_digest, digest, model_fingerprint, state_digest
from harness_rect.io.files import check_output, check_parent, expanded
from harness_rect.io.progress import logging_only
from harness_rect.machine import computed_on
from harness_rect.methods import METHODS, check_edits
from harness_rect.model_wrappers.unedited import ComparingLM
from harness_rect.models.architecture import check_editable, refuse_config
from harness_rect.models.load import check_device, load_errors
from harness_rect.models.prompt_format import ChatTemplate, PromptFormat
from harness_rect.moments.layout import layout_name
from harness_rect.processes import Processes
from harness_rect.session import self_checks
from harness_rect.session.base_model import base_arguments
from harness_rect.session.checkpoint import save_checkpoint
from harness_rect.session.provenance import UNKNOWN, add_differences, as_written, described, report_beside
from harness_rect.session.report import UNEDITED, EditReport
from harness_rect.session.runs import EditCache
from harness_rect.session.stream import EditSession
from harness_rect.session.weights import sha256_of
from harness_rect.validation import validated

log = logging.getLogger("harness_rect.edited_hf")

#: Names and paths among the arguments of lm-eval's class; its command reads 0.4 as a number.
TEXTS = frozenset(
    (
        *("tokenizer", "backend", "device", "dtype", "peft", "delta", "gguf_file", "attn_implementation"),
        *("device_map", "offload_folder", "torch_dtype"),
    )
)
#: What prints the scores before and after the edits; named, because experiments are above this package.
SUMMARY = EntryPoint("summary", "harness_rect.experiments.summary:after_evaluation", "harness_rect")
QUANTISING = ("load_in_8bit", "load_in_4bit", "autogptq", "gptqmodel")


class CheckingPrompts(KeyedAnswers):
    """A model class that checks, before it answers, that prompts are put as they were in editing."""

    def _check_prompts(self) -> None:
        """Raise what :func:`check_prompts` raises."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._check_prompts()
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **given: Any) -> Any:  # of all other requests
        self._check_prompts()
        return super()._loglikelihood_tokens(requests, *args, **given)


class EditedHF(CheckingPrompts, ComparingLM):
    """A causal language model into which a stream of edits goes before evaluation.

    Args:
        pretrained: as in HFLM; without it the embedded model.
        **arguments: those of :class:`~harness_rect.config.ModelArguments`, listed below, and HFLM's own.

    Raises:
        UserError: something asked for cannot be done; under the ``lm_eval`` command one line and exit
            status 2. What can be checked without weights is checked before the model is loaded.
    """

    def __init__(
        self, pretrained: str | transformers.PreTrainedModel | None = None, **arguments: Any
    ) -> None:
        with one_line_errors():
            share_logging()
            if not pretrained:
                pretrained = embedded.NAME
                embedded.unnamed.add(self)
            if isinstance(pretrained, int | float):  # lm-eval reads 0.4 as a number
                pretrained = str(pretrained)
            if isinstance(pretrained, str):
                pretrained = expanded(pretrained)
            ours = {name: arguments.pop(name) for name in _ours() if name in arguments}
            config = _resolve(pretrained, _with_options(ours, options_of_evaluation()))
            self._edit_report, self._unedited_key = UNEDITED, None
            self._answering = {name: arguments[name] for name in arguments.keys() - _SAME_ANSWERS}
            editing = config.method != "none"
            # self.rank is known once the model is loaded.
            is_first = os.environ.get("RANK", "0") == "0"
            output = Path(config.save_edited) if config.save_edited and is_first else None
            if config.save_edited and (adapter := arguments.get("peft")):
                raise UserError(
                    f"save_edited: of a model with peft={adapter} the adapter alone would be written, without"
                    " the edits; merge it into the model first"
                )
            if output is not None:
                check_output(output)
            if (
                results := output_path_of_evaluation()
            ) and is_first:  # lm-eval only logs that it cannot write
                place = Path(results)
                check_parent(place if place.suffix == ".json" else place / "results.json")
            if (limit := limit_of_evaluation()) is not None and limit <= 0:
                raise UserError(f"--limit {limit:g}: expected a number of rows from 1 on, or a share below 1")
            arguments |= checked_theirs(arguments)
            cache = EditCache.to_write(config.edit_cache) if editing else None
            stream = load_edits(config.edits) if editing and config.edits else None
            if stream is not None:
                check_edits(METHODS[config.method], stream)
            name = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "")
            if (size := embedded.batch_size(pretrained, arguments.get("batch_size"))) is not None:
                arguments["batch_size"] = size
            pretrained = embedded.resolve_model(pretrained)
            _check_before_loading(pretrained, editing, arguments)
            if arguments.get("device") is None:  # HFLM's own default is a GPU, there or not
                arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            if arguments.get("parallelize") and not torch.cuda.is_available():
                arguments |= _without_gpus(arguments)
            beside = _reports_beside(pretrained, arguments)
            what, loading = _base_of(pretrained, beside["pretrained"], arguments)
            self._loaded_by = _loaded_by(pretrained, beside["pretrained"], arguments)
            if isinstance(pretrained, str) and _on_cpu(arguments):
                Processes.launched(cuda=False)  # accelerate does so on CPUs only if it is told to use them
            with load_errors(what):
                super().__init__(**loading)
                check_prefix(self)
                self._provenance = self._loaded_from(pretrained, beside, arguments)
            if chosen := config.apply_chat_template:  # HFLM applies the default, whichever is named
                template = ChatTemplate.of(self.tokenizer, chosen, self.chat_template_args)
                self.chat_template_args: dict[str, Any] = dict(template.arguments)
            if stream is not None:
                check_editable(self.model)
                self._edit(config, stream, layout_name(name), cache)
            self._as_edited = _state(self.model) if editing else UNKNOWN
            found = self._edit_report.model_fingerprint or _fingerprint(self.model)
            self._provenance = {"model_fingerprint": found, **self._provenance}
            if not editing and found != UNKNOWN:
                computation = computation_digest(self.model, self.tokenizer)
                self._unedited_key = f"unedited:{digest({'weights': found, 'computation': computation})}"
            if output is not None:
                report = self._edit_report
                if any(beside.values()):
                    report = report.model_copy(update={"provenance": self._provenance})
                save_checkpoint(output, self.model, self.tokenizer, report)
            if inside_lm_eval_command():
                call_after_saving(SUMMARY)

    def _loaded_from(
        self, pretrained: Any, beside: Mapping[str, EditReport | None], arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the reports beside the weights say of them; differences are added to their base model."""
        own = beside["pretrained"]
        if own is not None and own.delta_of is not None:
            where = {name: arguments[name] for name in _WHERE if name in arguments}
            written = add_differences(self.model, pretrained, own, **where)
        else:
            written = as_written(self.model, own)
        if written is False:
            log.warning(
                "pretrained=%s: the edited weights are not those that edit_report.json is of", pretrained
            )
        found: dict[str, Any] = {name: described(report) for name, report in beside.items()}
        if own is not None:
            found["pretrained"]["as_written"] = written
        return found

    def _edit(self, config: EditConfig, stream: EditStream, model_name: str, cache: EditCache | None) -> None:
        """Edit on the first process, with the help of all others, and give them the same weights.

        Raises:
            UserError: what was asked cannot be done, or the processes end with different models. Where there
                are several, the first prints it and all exit with status 2.
        """
        processes = Processes.joined()
        quiet = () if processes.is_main else ("harness_rect",)  # the main process says it
        with processes.failing_together(), logging_only(logging.ERROR, *quiet):
            session = EditSession(
                self.model,
                self.tokenizer,
                config,
                stream,
                model_name,
                add_special_tokens=self.add_bos_token,
                chat_template_args=self.chat_template_args,
                processes=processes,
                loaded_by=self._loaded_by,
            )
        with processes.failing_together():
            if processes.is_main:
                try:
                    session.run(cache)
                finally:
                    processes.dismiss()
                originals = session.originals
            else:
                originals = {n: session.lm.weight(n).detach().clone() for n in session.weight_names}
                session.help()
        with processes.failing_together():
            self._edit_report = processes.from_main(session.report)
            self.edited_from({name: originals[name] for name in self._edit_report.weights})
            for name in self._edit_report.weights:
                processes.as_main_(self.model.get_parameter(name).data)
            if processes.number > 1:
                problem = (
                    "the processes hold different models; load the same checkpoint, in the same way, on all"
                )
                processes.check_equal(model_fingerprint(self.model), problem)

    def _check_prompts(self) -> None:
        check_prompts(self._edit_report, self.tokenizer, self.chat_template_args)

    def describe(self, edit_report: dict[str, Any] | None, originals: Mapping[str, Tensor]) -> None:
        """Say what another session did to the model; None: the model is unedited.

        For a sweep, which edits one model in many ways. Not together with lm-eval's ``--use_cache``.

        Args:
            originals: parameter name -> weight before editing.
        """
        self._edit_report = UNEDITED if edit_report is None else EditReport.read(edit_report)
        self._as_edited = UNKNOWN if edit_report is None else _state(self.model)
        self.edited_from(originals)

    @property
    def edit_report(self) -> EditReport:
        """What was done to the model."""
        return self._edit_report

    @property
    def run_key(self) -> str | None:
        """Names the model in lm-eval's ``--use_cache`` file, whose keys are the texts of requests alone.

        Arguments of lm-eval's class belong to it: ``max_length`` cuts prompts.
        """
        key = self._edit_report.run or self._unedited_key
        return f"{key}:{digest(self._answering)}" if key and self._answering else key

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's information, what was done to the model, also before its loading, computed with and checked.

        lm-eval asks for it after the evaluation.
        """
        found = {
            **super().get_model_info(),
            "edit": self._edit_report.to_dict(),
            "provenance": self._provenance,
            "computed_on": {
                **computed_on(self.device),
                "batch_size": self.batch_size,  # lm-eval says what was asked for
                **({} if self.world_size == 1 else {"processes": self.world_size}),
            },
        }
        if self._edit_report.method == "none":
            return found
        return {**found, "self_checks": self_checks.made(self._checks())}

    def _checks(self) -> dict[str, self_checks.Check]:
        report = self._edit_report

        def now() -> dict[str, str]:
            return {name: sha256_of(self.model.get_parameter(name)) for name in report.weights}

        evaluated, unchanged = now(), _state(self.model) == self._as_edited
        with self.unedited():
            revert = self_checks.of_revert(report, now())
        if now() != evaluated:
            revert = self_checks.Check(passed=False, about="the edited weights did not come back after it")
        same = self.mixed_precision_dtype is None
        return {
            "weights": self_checks.of_weights(report, evaluated, unchanged),
            "revert": revert,
            "rect_counts": self_checks.of_counts(report),
            "reliability": self_checks.of_reliability(report, results_of_evaluation(), same),
        }


def check_prompts(
    report: EditReport, tokenizer: PreTrainedTokenizerBase, chat_template_args: Mapping[str, Any]
) -> None:
    """Refuse an evaluation that puts prompts to the model in another way than editing did."""
    options = options_of_evaluation()
    if options is None or report.method == "none":
        return
    with one_line_errors():
        now = PromptFormat.of(tokenizer, *options, chat_template_args).describe()
        for name, value in now.items():
            if value != (before := getattr(report, name)):
                raise UserError(
                    f"the model was edited with {name} {before} and is evaluated with {value}: edits and"
                    " evaluation must see prompts alike; give the model class the evaluation's"
                    " apply_chat_template and system_instruction"
                )


def share_logging() -> None:
    """Let our log lines come out with lm-eval's, which are not passed to the root logger."""
    ours, theirs = logging.getLogger("harness_rect"), logging.getLogger("lm_eval")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), theirs.propagate
        ours.setLevel(theirs.level)


#: Arguments of lm-eval's class that change no answers, beside the model's name, which its weights replace.
_SAME_ANSWERS = {"pretrained", "device", "batch_size", "max_batch_size", "trust_remote_code"}
#: Arguments of lm-eval's class.
THEIRS = frozenset(inspect.signature(HFLM.__init__).parameters)


def _ours() -> dict[str, Argument]:
    return {name: one for name, one in declared_arguments(ModelArguments).items() if name not in THEIRS}


def _resolve(pretrained: Any, ours: Mapping[str, Any]) -> ModelArguments:
    """The arguments given, with what an embedded model adds; the log has the result."""
    given = dict(ours)
    if "method" in given and given["method"] is None:  # lm-eval reads none as None
        given["method"] = "none"
    given |= embedded.defaults(pretrained, given)
    if embedded.is_embedded(pretrained):
        resolved = {"pretrained": pretrained, "method": "rome", **given}
        log.info(
            "embedded model: %s; RECT %g%% is the default as long as no argument says how to edit",
            ",".join(f"{name}={value}" for name, value in resolved.items()),
            100 * embedded.DEFAULT_RECT,
        )
    config = ModelArguments.from_args(**given)
    refuse_settings(type(config.regularizer), THEIRS)
    return config


def _with_options(given: Mapping[str, Any], evaluation: PromptOptions | None) -> Mapping[str, Any]:
    """The arguments given, and the options of the evaluation for which the model is made."""
    options = evaluation._asdict() if evaluation else {}
    for name, value in options.items():
        if name in given and given[name] not in (value, str(value)):
            raise UserError(
                f"model_args: {name}={given[name]}, but the evaluation has {name}={value}; leave it out of"
                " model_args"
            )
    return {name: value for name, value in options.items() if value} | dict(given)


class Theirs(BaseModel):
    """Arguments that lm-eval's class uses as they are, only after loading."""

    max_length: int | None = Field(default=None, ge=1, le=10**9)
    prefix_token_id: int | None = Field(default=None, ge=0, le=10**9)
    truncation: bool | None = None
    add_bos_token: bool | None = None


def checked_theirs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :class:`Theirs` among the arguments of lm-eval's class, with values of their types.

    Raises:
        UserError: an argument cannot be used, or is a misspelled one of ours. HFLM passes arguments it does
            not know on to transformers, so only those close to ours are questioned.
    """
    for name in arguments.keys() - THEIRS:
        if close := closest(name, _ours(), cutoff=0.75):
            raise UserError(f"model_args: unknown argument {name!r}: did you mean {close!r}?")
    for name in TEXTS & arguments.keys():
        if isinstance(value := arguments[name], bool | int | float) or value == "":
            raise UserError(f"{name}={value}: expected a name or a path")
    for name in ("dtype", "softmax_dtype", "mixed_precision_dtype"):
        value = arguments.get(name)
        if not (value is None or value == "auto" or _is_floating(value)):
            raise UserError(f"{name}={value}: expected auto, float32, bfloat16, float16 or float64")
    for name in ("batch_size", "max_batch_size"):
        value = str(arguments.get(name, 1))
        whole = re.fullmatch(r"\d{1,9}", value) and int(value) > 0
        if not (whole or value == "None" or (name == "batch_size" and re.fullmatch(r"auto(:\d\d?)?", value))):
            or_auto = ", auto, or auto:N with an N up to 99" * (name[0] == "b")
            raise UserError(f"{name}={value[:100]}: expected a number from 1 on{or_auto}")
    device = arguments.get("device")
    if not (device == "cuda:0" and not torch.cuda.is_available()):  # the command's own default
        check_device(device, f"device={device}")
    later = {name: arguments[name] for name in Theirs.model_fields if name in arguments}
    return validated(Theirs, later, "model_args").model_dump(exclude_unset=True)


def check_prefix(lm: HFLM) -> None:
    """Refuse a ``prefix_token_id`` that the model does not have."""
    number = lm.custom_prefix_token_id
    if number is not None and number >= (tokens := len(lm.model.get_input_embeddings().weight)):
        raise UserError(f"prefix_token_id={number}: the model has {tokens} tokens, counted from 0")


def _on_cpu(arguments: Mapping[str, Any]) -> bool:
    """Whether HFLM will run on a CPU, each process with the whole model."""
    device = str(arguments["device"])
    without_gpu = device.startswith("cuda") and not torch.cuda.is_available()  # as the command's own default
    return arguments.get("tp_plan") is None and (device == "cpu" or without_gpu)


def _without_gpus(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``parallelize`` where there is no GPU: HFLM would leave main memory out."""
    room = arguments.get("max_cpu_memory") or get_max_memory()["cpu"]
    return {"device": "cpu", "max_cpu_memory": room}


def _is_floating(dtype: Any) -> bool:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return isinstance(found, torch.dtype) and found.is_floating_point


def _check_before_loading(pretrained: object, editing: bool, arguments: Mapping[str, Any]) -> None:
    """Everything that can be refused from the arguments and the configuration file alone."""
    if editing and (asked := [key for key in QUANTISING if arguments.get(key)]):
        raise UserError(f"{asked[0]}: a quantised model cannot be edited; leave it out, or use method=none")
    if editing and arguments.get("tp_plan") is not None:
        raise UserError("tp_plan: editing needs whole weight matrices; leave it out, or use method=none")
    if not editing or not isinstance(pretrained, str):
        return
    with load_errors(f"pretrained={pretrained}"):
        config = transformers.AutoConfig.from_pretrained(
            pretrained,
            revision=str(arguments.get("revision", "main")),
            subfolder=arguments.get("subfolder", ""),
            trust_remote_code=arguments.get("trust_remote_code", False),
            gguf_file=arguments.get("gguf_file"),
        )
    refuse_config(config)


#: Arguments of ``from_pretrained`` that say where in a repository a model is, and how it is read.
_WHERE = ("revision", "subfolder", "trust_remote_code")


def _reports_beside(pretrained: Any, arguments: Mapping[str, Any]) -> dict[str, EditReport | None]:
    """The edit reports beside ``pretrained``, ``peft`` and ``delta``, of those that are given."""
    given = {"pretrained": pretrained} | {n: arguments[n] for n in ("peft", "delta") if arguments.get(n)}
    found = {}
    for name, source in given.items():
        where = {n: str(arguments[n]) for n in ("revision", "subfolder") if arguments.get(n)}
        if name != "pretrained":
            where.pop("subfolder", None)
        found[name] = report_beside(source, **where) if isinstance(source, str) else None
    return found


def _base_of(
    pretrained: Any, report: EditReport | None, arguments: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What is loaded, for messages, and HFLM's arguments: of ``pretrained``, or of its base model."""
    what = f"pretrained={pretrained}"
    if report is None or report.delta_of is None:
        return what, {"pretrained": pretrained, **arguments}
    if clashing := [name for name in ("peft", "delta", *QUANTISING) if arguments.get(name)]:
        raise UserError(f"{what}: holds differences, which cannot be combined with {clashing[0]}")
    log.info("%s: holds differences from %s, to which they are added", what, report.delta_of)
    loading = {name: value for name, value in arguments.items() if name not in ("revision", "subfolder")}
    if report.delta_of_arguments is not None:
        loading = report.delta_of_arguments.given() | loading
    if arguments.get("dtype") in (None, "auto") and report.weights:
        loading["dtype"] = next(iter(report.weights.values())).dtype
    base = embedded.resolve_model(report.delta_of)
    return f"{what} (differences from {report.delta_of})", {"pretrained": base, **loading}


def _loaded_by(
    pretrained: Any, report: EditReport | None, arguments: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Arguments without which another model, or none, is loaded; None where the name alone says it."""
    of_differences = report is not None and report.delta_of is not None
    if not isinstance(pretrained, str) or not (base_arguments(arguments) or of_differences):
        return None
    return {"pretrained": pretrained, **arguments}


def _fingerprint(model: Any) -> str:
    """The digest of a model's weights; those that were quantised may have no such elements."""
    return UNKNOWN if _quantised(model) else model_fingerprint(model)


def _state(model: Any) -> str:
    """The digest of a model's weights, modules and hooks, likewise."""
    return UNKNOWN if _quantised(model) else state_digest(model)


def _quantised(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _describe() -> None:
    """Give the class a signature and a docstring that list its arguments."""
    parameter, keyword = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
    EditedHF.__signature__ = inspect.Signature(
        [
            parameter("pretrained", parameter.POSITIONAL_OR_KEYWORD, default=None),
            *(parameter(name, keyword, default=one.default) for name, one in _ours().items()),
            parameter("hflm", parameter.VAR_KEYWORD),
        ]
    )
    lines = [f"    {name}: {one.help}" for name, one in _ours().items()]
    EditedHF.__doc__ = "\n".join(
        [inspect.cleandoc(EditedHF.__doc__ or ""), "", "Arguments of editing:", *lines]
    )


_describe()
