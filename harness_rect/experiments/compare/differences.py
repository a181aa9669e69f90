"""What makes scores of two evaluations incomparable: other versions, rows, prompts, limits or seeds."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from harness_rect.evaluation.catalogue import TASKS, is_editing
from harness_rect.experiments.compare.pairing import document_difference
from harness_rect.experiments.results import Results

SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
#: Stands for what a file does not have; it differs from nothing.
_UNKNOWN = "?"


def find_differences(
    base: Results, other: Results, names: Sequence[str], expected: Collection[str] = ()
) -> list[str]:
    """What makes the scores of these tasks and groups mean different things, one line each.

    Tasks that differ in the same way share a line. An entry that one file lacks is no difference, and neither
    is one that is ``expected`` to differ ("edit_seed").
    """
    lines = [
        f"{what} {_word(a)} and {_word(b)}"
        for what, a, b in _of_the_run(base, other)
        if a is not _UNKNOWN and b is not _UNKNOWN and a != b and what not in expected
    ]
    tasks = list(dict.fromkeys(leaf for name in names for leaf in base.leaves(name)))
    per_task: dict[tuple[str, str], list[str]] = {}
    for name in [*tasks, *(name for name in names if name in base.groups)]:
        a, b = (_number(one.file.versions.get(name, _UNKNOWN)) for one in (base, other))
        if _UNKNOWN not in (a, b) and a != b:
            per_task.setdefault(("version", f"{a} and {b}"), []).append(name)
    for task in tasks:
        for what, a, b in _of_the_task(base, other, task):
            if a is not _UNKNOWN and b is not _UNKNOWN and a != b:
                per_task.setdefault((what, f"{_word(a)} and {_word(b)}"), []).append(task)
        if (difference := document_difference(base, other, task)) is not None:
            per_task.setdefault(difference, []).append(task)
    return lines + [f"{what} of {', '.join(of)}: {how}" for (what, how), of in per_task.items()]


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _number(value: Any) -> Any:
    """1.0 for 1, "1" and "1.0": lm-eval writes versions of groups as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _of_the_run(base: Results, other: Results) -> list[tuple[str, Any, Any]]:
    configs = base.file.config, other.file.config
    found = [("limit", *(_number(config.get("limit", _UNKNOWN)) for config in configs))]
    found += [(seed, *(config.get(seed, _UNKNOWN) for config in configs)) for seed in SEEDS]
    found += [
        ("edit_seed", *(_edit_field(one, "edit_seed") for one in (base, other))),
        ("chat template", base.file.chat_template_sha, other.file.chat_template_sha),
        ("system instruction", base.file.system_instruction_sha, other.file.system_instruction_sha),
    ]
    return found


def _of_the_task(base: Results, other: Results, task: str) -> list[tuple[str, Any, Any]]:
    sides = base, other
    rows = [one.effective_rows(task) for one in sides]
    found = [
        ("num_fewshot", *(one.file.n_shot.get(task, _UNKNOWN) for one in sides)),
        ("number of documents", *(_UNKNOWN if n is None else n for n in rows)),
    ]
    if not is_editing(task):
        found.append(("data", *(_data(one, task) for one in sides)))
    elif any(one.samples(task) is None for one in sides):  # else the documents themselves are compared
        hashes = [_edit_field(one, "edits_sha256") for one in sides]
        specs = [one.metadata(task).get("edits") or _UNKNOWN for one in sides]
        found.append(("edits", *(specs if _UNKNOWN in hashes else hashes)))
    return found


def _data(results: Results, task: str) -> Any:
    """Where a task's rows came from, where the file has it."""
    config = results.file.configs.get(task)
    if config is None:
        return _UNKNOWN
    if task in TASKS:
        spec = results.metadata(task).get("data") or "hub"
        return spec if spec in ("hub", "tiny") else os.path.realpath(os.path.expanduser(str(spec)))
    split = config.get("test_split") or config.get("validation_split")
    return " ".join(
        str(part) for part in (config.get("dataset_path"), config.get("dataset_name"), split) if part
    )


def _edit_field(results: Results, name: str) -> Any:
    value = getattr(results.edit, name, None)
    return _UNKNOWN if value is None else value
