"""Results files as lm-eval writes them, made by hand: with samples or without, of any model class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DATE = "2026-01-02T03-04-05.678901"


def without_groups(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results with tasks named as lm-eval 0.4 does: 0.5 puts the group before a task's name."""
    return {
        part: {name.rpartition("::")[2]: entry for name, entry in found.items()}
        if isinstance(found, dict)
        else found
        for part, found in results.items()
    }


def mean_task(metric: str, values: Iterable[float], **more: Any) -> dict[str, Any]:
    """A task with one metric that is a mean of documents."""
    values = [float(v) for v in values]
    stderr = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"metric": metric, "value": float(np.mean(values)), "stderr": stderr, "values": values} | more


def with_metrics(task: dict[str, Any], **metrics: Sequence[Any] | float) -> dict[str, Any]:
    """The task with more metrics: a value, or a value for each document (None: it lacks the metric)."""
    values = {name: given for name, given in metrics.items() if isinstance(given, Sequence)}
    reported = {
        name: float(np.mean([v for v in values[name] if v is not None])) if name in values else given
        for name, given in metrics.items()
    }
    more = {f"{name},none": value for name, value in reported.items()}
    return task | {"more": task.get("more", {}) | more, "also": task.get("also", {}) | values}


def content(tasks: Mapping[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The JSON of a results file. Entries of ``config`` given in ``more`` are added to the usual ones."""
    config = {
        "model": "hf",
        "model_args": {"pretrained": "gpt2-xl"},
        "limit": None,
        "random_seed": 0,
        "numpy_seed": 1234,
        "torch_seed": 1234,
        "fewshot_seed": 1234,
    } | more.pop("config", {})
    made: dict[str, Any] = {
        "results": {},
        "groups": {},
        "group_subtasks": {},
        "configs": {},
        "versions": {},
        "n-shot": {},
        "n-samples": {},
        "higher_is_better": {},
        "config": config,
        "date": 1767323045.0,
        "lm_eval_version": "0.4.13",
    }
    for name, task in tasks.items():
        metric, filtered = task["metric"], task.get("filter", "none")
        stderr = task["stderr"] if task["stderr"] is not None else "N/A"
        made["results"][name] = {
            "name": name,
            "alias": name,
            "sample_len": len(task["values"]),
            f"{metric},{filtered}": task["value"],
            f"{metric}_stderr,{filtered}": stderr,
        } | task.get("more", {})
        made["configs"][name] = {
            "task": name,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": task.get("version", 1.0)} | task.get("metadata", {}),
        }
        made["versions"][name] = task.get("version", 1.0)
        made["n-shot"][name] = task.get("shots", 0)
        made["n-samples"][name] = {"original": len(task["values"]), "effective": len(task["values"])}
        made["higher_is_better"][name] = {metric: task.get("higher_is_better", True)}
    return made | more


def with_group(made: dict[str, Any], group: str, members: Sequence[str], score: Any) -> dict[str, Any]:
    """Add a group with the metric ``score`` to a results file's JSON."""
    entry = {"alias": group, "score,none": score, "score_stderr,none": "N/A"}
    made["results"][group] = made["groups"][group] = entry
    made["group_subtasks"][group] = list(members)
    made["versions"][group] = "1.0"
    return made


def write(
    folder: Path, made: dict[str, Any], tasks: Mapping[str, dict[str, Any]], samples: bool = True
) -> Path:
    """Write a results file, and the samples of ``tasks`` beside it; returns the results file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{DATE}.json"
    path.write_text(json.dumps(made, indent=2))
    for name, task in tasks.items() if samples else ():
        lines = [
            {
                "doc_id": i,
                "doc": task["docs"][i] if "docs" in task else {"question": f"{name} {i}"},
                "filter": task.get("filter", "none"),
                "metrics": [
                    *(task["metric"], *task.get("also", {})),
                    *(["score"] if "score,none" in task.get("more", {}) else []),
                ],
                "doc_hash": f"{name}-{i}",
                "prompt_hash": f"prompt-{name}-{i}",
                "target_hash": "t",
                "resps": [["a\u2028b"]],
                task["metric"]: value,
            }
            | ({"score": value} if "score,none" in task.get("more", {}) else {})
            | {name: values[i] for name, values in task.get("also", {}).items()}
            for i, value in enumerate(task["values"])
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"samples_{name}_{DATE}.jsonl").write_text(text, encoding="utf-8")
    return path
