"""What makes scores of two evaluations incomparable: other weights, versions, rows, prompts or seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from harness_rect.evaluation.catalogue import TASKS, is_editing
from harness_rect.experiments.compare.pairing import document_difference
from harness_rect.experiments.results import Results, same_name

#: Settings that differ where only the limit does; for ``expected``.
LIMIT = ("limit", "number of documents", "documents", "requests")
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
#: Arguments of a model class that change what a model answers -> their defaults.
ANSWERING: dict[str, Any] = {
    **dict.fromkeys(("max_length", "max_model_len", "max_gen_toks", "prefix_token_id")),
    **dict.fromkeys(("softmax_dtype", "mixed_precision_dtype", "chat_template_args", "think_end_token")),
    **{"truncation": False, "enable_thinking": True},
}
#: What must agree -> its value, without what the file does not say.
Aspects = dict[str, Any]


def find_differences(
    base: Results, other: Results, names: Sequence[str], expected: Collection[str] = ()
) -> list[str]:
    """What makes the scores of these tasks and groups mean different things, one line each.

    Tasks that differ in the same way share a line. An entry that one file lacks is no difference, and neither
    is one that is ``expected`` to differ ("edit_seed", :data:`LIMIT`).
    """
    sides = base, other
    runs = [_of_run(one) for one in sides]
    if same_name(base, other):
        for run, one in zip(runs, sides, strict=True):
            run |= {f"weights of {one.model_name}": one.fingerprint[:12]} if one.fingerprint else {}
    lines = [f"{what} {how}" for what, how in _unlike(*runs) if what not in expected]
    tasks = list(dict.fromkeys(leaf for name in names for leaf in base.leaves(name)))
    found: dict[tuple[str, str], list[str]] = {}
    for name in [*tasks, *(name for name in names if name in base.groups)]:
        for difference in _unlike(*(_version(one, name) for one in sides)):
            found.setdefault(difference, []).append(name)
    for task in tasks:
        differences = [*_unlike(*(_of_task(one, task, sides) for one in sides))]
        if (of_documents := document_difference(base, other, task)) is not None:
            differences.append(of_documents)
        for difference in differences:
            if difference[0] not in expected:
                found.setdefault(difference, []).append(task)
    return lines + [f"{what} of {', '.join(of)}: {how}" for (what, how), of in found.items()]


def _unlike(base: Aspects, other: Aspects) -> Iterator[tuple[str, str]]:
    """What differs, and its two values in words."""
    for what, value in base.items():
        if what in other and other[what] != value:
            yield what, f"{_word(value)} and {_word(other[what])}"


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _number(value: Any) -> Any:
    """1.0 for 1, "1" and "1.0": lm-eval writes versions of groups as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _of_run(one: Results) -> Aspects:
    found = {name: one.file.config[name] for name in ("limit", *SEEDS) if name in one.file.config}
    if "limit" in found:
        found["limit"] = _number(found["limit"])
    if (seed := getattr(one.edit, "edit_seed", None)) is not None:
        found["edit_seed"] = seed
    if "model_args" in one.file.config:
        for name, default in ANSWERING.items():
            given = one.model_args.get(name)
            usual = given in (None, "", "None") or _option(given) == _option(default)
            found[name] = "its default" if usual else _option(given)
    found["chat template"] = one.file.chat_template_sha
    found["system instruction"] = one.file.system_instruction_sha
    return found


def _version(one: Results, name: str) -> Aspects:
    return {"version": _number(one.file.versions[name])} if name in one.file.versions else {}


def _of_task(one: Results, task: str, sides: Sequence[Results]) -> Aspects:
    found = {"num_fewshot": one.file.n_shot.get(task), "number of documents": one.effective_rows(task)}
    digests = [side.requests_digest(task) for side in sides]
    if None not in digests:
        found["requests"] = str(one.requests_digest(task))[:12]
    if one.file.configs.get(task, {}).get("output_type") in (None, "generate_until"):
        found["gen_kwargs"] = _generation(one)
    if one.file.chat_template_sha and found["num_fewshot"] != 0:
        found["fewshot_as_multiturn"] = one.file.fewshot_as_multiturn
    if not is_editing(task):
        # The same requests from another folder are the same data.
        found["data"] = _data(one, task) if None in digests or len(set(digests)) > 1 else None
        return {what: value for what, value in found.items() if value is not None}
    metadata = one.metadata(task)
    if task in one.file.configs:
        found["prompt_context"] = metadata.get("prompt_context") or "bare"
        found["judge"] = metadata.get("judge") or "none"
    if any(side.samples(task) is None for side in sides):  # else the documents themselves are compared
        hashed = all(getattr(side.edit, "edits_sha256", None) for side in sides)
        spec = one.metadata(task).get("edits") or None
        found["edits"] = one.edit.edits_sha256 if one.edit and hashed else spec
    return {what: value for what, value in found.items() if value is not None}


def _generation(one: Results) -> str | None:
    """``--gen_kwargs`` in words, "none" where nothing was given; None where the file does not say it.

    Older versions of lm-eval write a text, and None, "" and {} for nothing.
    """
    if "gen_kwargs" not in one.file.config:
        return None
    given = one.file.config["gen_kwargs"] or {}
    if isinstance(given, str):
        given = {name.strip(): value for name, _, value in (p.partition("=") for p in given.split(",") if p)}
    if not isinstance(given, dict):
        return str(given)
    return ",".join(f"{name}={_option(given[name])}" for name in sorted(given)) or "none"


def _option(value: Any) -> str:
    """``true`` and ``3.0`` for True, "True", 3 and "3.0"."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower()
    value = value if isinstance(value, bool) else _number(value)
    return value if isinstance(value, str) else json.dumps(value)


def _data(results: Results, task: str) -> Any:
    """Where a task's rows came from; None where the file does not have it."""
    config = results.file.configs.get(task)
    if config is None:
        return None
    if task in TASKS:
        spec = results.metadata(task).get("data") or "hub"
        return spec if spec in ("hub", "tiny") else os.path.realpath(os.path.expanduser(str(spec)))
    split = config.get("test_split") or config.get("validation_split")
    return " ".join(str(p) for p in (config.get("dataset_path"), config.get("dataset_name"), split) if p)
