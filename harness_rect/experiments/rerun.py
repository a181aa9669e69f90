"""Repeating the evaluation of a results file, and comparing what comes out.

The file may be somebody else's: only arguments that are known to run no code and to write nothing are taken
from it, and tasks only by the names of those that are installed. What is left out is said.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from pydantic import BaseModel, Field
from tabulate import tabulate

from harness_rect._autoload import tasks_folder
from harness_rect.compat.lm_eval import Finished, KeptTasks, evaluate
from harness_rect.config import ModelArguments, declared_arguments
from harness_rect.errors import UserError
from harness_rect.experiments.results import Results
from harness_rect.fingerprint import digest
from harness_rect.model_wrappers.edited_hf import QUANTISING, THEIRS, Theirs, check_prefix, checked_theirs
from harness_rect.models.load import load_errors
from harness_rect.session.report import UNEDITED
from harness_rect.validation import validated

#: ``--model`` -> the class that evaluates.
CLASSES = {
    "hf": "harness_rect.compat.lm_eval_model:CheckedHF",
    "edited_hf": "harness_rect.model_wrappers.edited_hf:EditedHF",
    "edited_vllm": "harness_rect.model_wrappers.edited_vllm:EditedVLLM",
}
#: Arguments that write somewhere, ask another machine, or can load code.
REFUSED = {
    *("self", "kwargs", "batch_size", "max_batch_size", "device", "offload_folder", "trust_remote_code"),
    *("save_edited", "edit_cache", "judge", "judge_model"),
}
OF_VLLM = {
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization"),
    *("max_model_len", "max_gen_toks", "enforce_eager", "swap_space", "max_num_seqs"),
}
ARGUMENTS = {*declared_arguments(ModelArguments), *THEIRS, *QUANTISING, *OF_VLLM, "torch_dtype"} - REFUSED
#: Others can name a repository of kernels.
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
#: Of ``--metadata``.
METADATA = {"edits", "data", "tokenizer", "prompt_context", "max_length", "measure"}
#: Threads that a file may ask for, for each processor of this machine.
THREADS_EACH = 4
SEED = Field(default=1234, ge=0, lt=2**32)


class _Settings(BaseModel):
    """The settings of an evaluation that a results file has under ``config``."""

    model: Literal["hf", "edited_hf", "edited_vllm"]
    batch_size: int | str | None = None
    device: str | None = None
    limit: float | None = Field(default=None, gt=0, le=10**9)
    random_seed: int | None = Field(default=0, ge=0, lt=2**32)
    numpy_seed: int | None = SEED
    torch_seed: int | None = SEED
    fewshot_seed: int | None = SEED


Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(ge=-1000, le=1000)]
Whole = Annotated[int, Field(ge=0, le=10**6)]


class _Generation(BaseModel):
    """What is taken of ``--gen_kwargs``; of the right kind, since lm-eval uses it as it is."""

    do_sample: bool | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Share | None = None
    top_k: Whole | None = None
    min_p: Share | None = None
    num_beams: Annotated[int, Field(ge=1, le=100)] | None = None
    max_gen_toks: Annotated[Whole, Field(ge=1)] | None = None
    until: str | list[str] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0)] | None = None
    length_penalty: Finite | None = None
    no_repeat_ngram_size: Whole | None = None


@dataclass(frozen=True)
class Repetition:
    """What is done again.

    given: arguments of the model class. metadata: of the tasks. settings: arguments of ``simple_evaluate``.
    n_shot: task -> its number of examples. threads: None where the file does not say it. not_repeated: what
    the file asks for and is not done, a line each.
    """

    model: str
    given: dict[str, Any]
    tasks: list[str]
    metadata: dict[str, Any]
    settings: dict[str, Any]
    n_shot: dict[str, int]
    threads: int | None
    not_repeated: list[str]


class Difference(NamedTuple):
    """Something that the file says otherwise than the repetition; "-" for what one of them lacks."""

    what: str
    then: str
    now: str


def read(then: Results, trust_remote_code: bool = False) -> Repetition:
    """What a results file says about its evaluation.

    Raises:
        UserError: another model class evaluated, or a setting cannot be read.
    """
    file, left_out = then.file, list[str]()
    wanted = {key: value for key, value in file.config.items() if key in _Settings.model_fields}
    settings = validated(_Settings, wanted | {"model": then.model_class}, str(then.path))
    given = {key: value for key, value in then.model_args.items() if _kept(key, value, left_out)}
    metadata = {key: value for key, value in _metadata(then).items() if _plain(value)}
    try:
        theirs = {name: given[name] for name in THEIRS & given.keys()}
        given |= checked_theirs(theirs | {"batch_size": settings.batch_size})
        lengths = {name: metadata[name] for name in Theirs.model_fields if name in metadata}
        metadata |= validated(Theirs, lengths, "metadata").model_dump(exclude_unset=True)
        generation = _generation(file.config.get("gen_kwargs"), left_out)
    except UserError as error:
        raise UserError(f"{then.path}: {error}") from None
    if settings.model != "hf":
        given["edit_cache"] = "off"  # what was kept would be no repetition
    if str(then.model_args.get("trust_remote_code", False)).lower() not in ("false", "0", "none"):
        if trust_remote_code:
            given["trust_remote_code"] = True
        else:
            left_out.append("trust_remote_code: code from the hub is run only with --trust-remote-code")
    # lm-eval writes cuda:0 where no device was given, there or not; ours say on which they computed.
    on = then.file.config.get("computed_on")
    device = settings.device
    if (
        isinstance(on, dict)
        and isinstance(on.get("device"), str)
        and not (device or "").startswith(on["device"])
    ):
        device = on["device"] if on["device"] in ("cpu", "cuda", "mps") else device
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        left_out.append(f"device={device}: there is none here; computed on the CPU")
        device = "cpu"
    chat = file.chat_template is not None
    if chat:
        named = given.pop("apply_chat_template", True)
        given["apply_chat_template"] = named if isinstance(named, str) else True
    instruction = file.system_instruction if isinstance(file.system_instruction, str) else None
    if instruction and settings.model != "hf":
        given["system_instruction"] = instruction
    of_lm_eval = {
        "batch_size": settings.batch_size,
        "device": device,
        "limit": settings.limit,
        "random_seed": settings.random_seed,
        "numpy_random_seed": settings.numpy_seed,
        "torch_random_seed": settings.torch_seed,
        "fewshot_random_seed": settings.fewshot_seed,
        "apply_chat_template": given.get("apply_chat_template", False),
        "system_instruction": instruction,
        "gen_kwargs": generation,
    }
    if settings.model == "hf":
        given.pop("apply_chat_template", None)
    if isinstance(file.fewshot_as_multiturn, bool):
        of_lm_eval["fewshot_as_multiturn"] = file.fewshot_as_multiturn
    for task, counted in file.n_samples.items():
        if settings.limit is None and counted.get("effective") != counted.get("original"):
            left_out.append(f"--samples: the documents of {task} that were chosen are not in the file")
    return Repetition(
        settings.model,
        given,
        then.roots,
        metadata,
        of_lm_eval,
        {task: n for task, n in file.n_shot.items() if isinstance(n, int) and 0 <= n <= 1000},
        _threads(then, left_out),
        left_out,
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _kept(name: str, value: Any, left_out: list[str]) -> bool:
    """Whether an argument of the model is repeated; a line for those that change what is computed."""
    plain = _plain(value) or (
        name == "chat_template_args" and isinstance(value, dict) and all(map(_plain, value.values()))
    )
    if plain and (name in ARGUMENTS or (name == "attn_implementation" and value in ATTENTION)):
        return True
    if name not in {"save_edited", "edit_cache", "trust_remote_code", "offload_folder"}:
        left_out.append(f"{name}={value}: an argument that is not taken from a file")
    return False


def _generation(given: Any, left_out: list[str]) -> dict[str, Any] | None:
    found = given if isinstance(given, dict) else {}
    if given and not found:
        left_out.append(f"gen_kwargs={given}: cannot be read")
    known = _Generation.model_fields
    left_out += [f"gen_kwargs {name}: not taken from a file" for name in found if name not in known]
    taken = validated(_Generation, {n: v for n, v in found.items() if n in known}, "gen_kwargs")
    return taken.model_dump(exclude_none=True) or None


def _metadata(then: Results) -> dict[str, Any]:
    """What ``--metadata`` gave the tasks beside or instead of the model's arguments."""
    given: dict[str, Any] = {}
    for config in then.file.configs.values():
        own = config.get("metadata")
        given |= own if isinstance(own, dict) else {}
    # lm-eval's command reads numbers in either, and gives the tasks the model's arguments too.
    names = sorted(METADATA & given.keys())
    return {name: given[name] for name in names if str(given[name]) != str(then.model_args.get(name, ""))}


def _threads(then: Results, left_out: list[str]) -> int | None:
    wanted = _computed_on(then).get("threads")
    if not isinstance(wanted, int) or wanted < 1:
        return None
    if wanted > THREADS_EACH * (os.cpu_count() or 1):
        left_out.append(f"{wanted} threads: too many for this machine")
        return None
    return wanted


def _computed_on(one: Results) -> Mapping[str, Any]:
    found = one.file.config.get("computed_on")
    of_edits = (one.edit or UNEDITED).computed_on
    return of_edits or (found if isinstance(found, dict) else {})


# ------------------------------------------------------------------------------------------------- doing it


def run(this: Repetition, log_samples: bool) -> Finished:
    """Load, edit and evaluate again. What cannot be done as it was is added to ``this.not_repeated``.

    Raises:
        UserError: a task is not installed, or the model cannot be loaded or edited.
    """
    ours = all(task.startswith("rect_") for task in this.tasks)
    # What EditedHF takes for the embedded default, the tasks have to take too.
    arguments = {name: value for name, value in this.given.items() if name != "edit_cache"}
    metadata = arguments | this.metadata
    manager = KeptTasks(include_path=tasks_folder(), metadata=metadata, include_defaults=not ours)
    if unknown := sorted(set(this.tasks) - set(manager.all_tasks)):
        raise UserError(f"{', '.join(unknown)}: lm-eval has no such task here")
    with _with_threads(this.threads):
        model = _load(this)
        if isinstance(model, HFLM):
            check_prefix(model)
        tasks = manager.load(this.tasks)["tasks"]
        shots = _n_shot(this, {name: task.get_config("num_fewshot") or 0 for name, task in tasks.items()})
        return evaluate(
            model,
            this.model,
            model_args=this.given,
            tasks=this.tasks,
            task_manager=manager,
            num_fewshot=shots,
            log_samples=log_samples,
            **this.settings,
        )


def _load(this: Repetition) -> Any:
    place = CLASSES[this.model]
    if isinstance(place, str):
        module, _, name = place.partition(":")
        place = getattr(importlib.import_module(module), name)
    machine = {"batch_size": this.settings["batch_size"], "device": this.settings["device"]}
    if this.model != "hf":  # which tells what is wrong by itself
        return place.create_from_arg_obj(dict(this.given), machine)
    with load_errors(f"pretrained={this.given.get('pretrained')}"):
        return place.create_from_arg_obj(dict(this.given), machine)


def _n_shot(this: Repetition, usual: Mapping[str, int]) -> int | None:
    """``num_fewshot``, where the file has another than the tasks' own."""
    other = {this.n_shot[name] for name, own in usual.items() if this.n_shot.get(name, own) != own}
    if len(other) > 1:
        this.not_repeated.append("num_fewshot: the tasks have numbers of their own that are not those here")
    return other.pop() if len(other) == 1 else None


@contextmanager
def _with_threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- comparing


def compared(then: Results, now: Results) -> tuple[list[Difference], int]:
    """Where scores, measurements of the edits and hashes of the edited weights differ, and how many agree."""
    return _unlike(_outcome(then), _outcome(now))


def circumstances(then: Results, now: Results) -> list[Difference]:
    """What differs in the inputs, the code, the versions and the machine."""
    return _unlike(_made_with(then), _made_with(now))[0]


def _unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[Difference], int]:
    names = list(dict.fromkeys([*then, *now]))
    unlike = [name for name in names if not _equal(then.get(name), now.get(name))]
    found = [Difference(name, _word(then.get(name)), _word(now.get(name))) for name in unlike]
    return found, len(names) - len(unlike)


def _equal(one: Any, other: Any) -> bool:
    both_nan = all(isinstance(value, float) and math.isnan(value) for value in (one, other))
    return both_nan or one == other


def _word(value: Any) -> str:
    return "-" if value is None else str(value)


def _outcome(one: Results) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, scores in (one.tasks | one.groups).items():
        for key, score in scores.items():
            filtered = "" if key.filter == "none" else f" ({key.filter})"
            found[f"{name} {key.metric}{filtered}"] = score.value
    edit = one.edit or UNEDITED
    for when in ("before", "after", "end"):
        averages = edit.averages(when)
        found |= {f"edits, {when}: {metric}": value for metric, value in averages.items()}
    for name, totals in edit.weights.items():
        found[f"{name} |dW|"] = totals.frobenius_distance
        if totals.sha256 is not None:
            found[f"{name} sha256"] = totals.sha256
    return found


#: Lines of lm-eval's description of the machine.
_LINES = ("OS", "Python version", "PyTorch version", "CUDA used to build PyTorch", "Model name")


def _made_with(one: Results) -> dict[str, Any]:
    edit, file = one.edit or UNEDITED, one.file
    text = file.pretty_env_info if isinstance(file.pretty_env_info, str) else ""
    lines = (re.search(rf"^{line}:\s*(.+)$", text, flags=re.MULTILINE) for line in _LINES)
    machine = {name: line[1].strip() for name, line in zip(_LINES, lines, strict=True) if line}
    where = _computed_on(one)
    digests = {
        "hyper-parameters": edit.hparams or None,
        "second moments": edit.second_moments,
        "regularizer": edit.settings or None,
    }
    found = {
        "edits": edit.edits_sha256,
        "token ids of the edits": edit.token_ids_sha256,
        "unedited model": edit.model_fingerprint,
        **{what: None if value is None else digest({"": value}) for what, value in digests.items()},
        "editing code": edit.code_sha256,
        "processes": edit.processes,
        "device": where.get("device"),
        "threads": where.get("threads"),
        "dtype": file.config.get("model_dtype"),
        "chat template": file.chat_template_sha,
        "system instruction": file.system_instruction_sha,
        "lm_eval": file.lm_eval_version,
        **edit.versions,
        "transformers": edit.versions.get("transformers") or file.transformers_version,
        **machine,
    }
    versions = {f"version of {name}": str(version) for name, version in file.versions.items()}
    return {name: str(value) for name, value in (found | versions).items() if value is not None}


def table(rows: Sequence[Difference]) -> str:
    """The differences as columns; hashes are shortened."""
    short = [
        [json.dumps(re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", cell))[1:-1] for cell in row]
        for row in rows
    ]
    return tabulate([["", "then", "now"], *short], tablefmt="plain", disable_numparse=True)
