"""Scores of a model: general tasks, recall of facts, single ROME edits. Each is [mean, standard error]."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lm_eval
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness_rect._autoload  # noqa: F401  (tells lm-eval about our tasks)
from harness_rect.config import EditConfig
from harness_rect.edits import load_edits
from harness_rect.evaluation.aggregations import MEAN, Aggregation
from harness_rect.evaluation.catalogue import TASKS
from harness_rect.measure import teacher_force
from harness_rect.models import EditableLM
from harness_rect.session import EditSession
from tools.tiny_world.world import World

Scores = dict[str, list[float]]


def load(folder: Path) -> EditableLM:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return EditableLM(model, AutoTokenizer.from_pretrained(folder))


def mean_and_error(values: Sequence[float]) -> list[float]:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return [round(fmean(values), 4), round(error, 4)]


def task_scores(folder: Path, data: Path) -> Scores:
    """The score of each general task through lm-eval, on the CPU."""
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu"},
        tasks=["rect_general", "rect_glue"],
        batch_size=32,
        metadata={"data": str(data)},
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    scores: Scores = {}
    for name, samples in results["samples"].items():
        values, how = [sample["score"] for sample in samples], TASKS[name].headline.aggregation
        if how is MEAN:
            scores[name] = mean_and_error(values)
        else:  # the four documents of a sentence are not independent
            scores[name] = _jackknifed(how, values, together=4 if name == "rect_ner" else 1)
    return scores


def _jackknifed(aggregation: Aggregation, values: Sequence[Any], together: int) -> list[float]:
    """The metric, and the error from leaving out each run of ``together`` documents."""
    left_out = [aggregation([*values[:i], *values[i + together :]]) for i in range(0, len(values), together)]
    mean = fmean(left_out)
    error = math.sqrt((len(left_out) - 1) * fmean((value - mean) ** 2 for value in left_out))
    return [round(aggregation(values), 4), round(error, 4)]


def recalled(lm: EditableLM, prompts: Iterable[tuple[str, str]]) -> list[float]:
    """For each (prompt, answer) 1.0 if every token of the answer is the argmax."""
    pairs = [lm.encoder.continuation(prompt, f" {answer}") for prompt, answer in prompts]
    return [float(forced.argmax == forced.target) for forced in teacher_force(lm, pairs)]


def fact_scores(lm: EditableLM, world: World) -> Scores:
    trained = [(fact.prompt(i), fact.object) for fact in world.facts for i in fact.trained]
    held_out = [(fact.prompt(i), fact.object) for fact in world.facts for i in fact.held_out]
    return {
        "facts at wordings trained with them": mean_and_error(recalled(lm, trained)),
        "facts at held-out wordings": mean_and_error(recalled(lm, held_out)),
    }


def consequence_scores(folder: Path, data: Path, rows: Sequence[dict[str, Any]]) -> Scores:
    """How the unedited model does on what follows from facts that it knows: "task metric" -> score."""
    with tempfile.TemporaryDirectory() as temporary:
        edits = Path(temporary) / "facts.jsonl"
        edits.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        results = lm_eval.simple_evaluate(
            model="edited_hf",
            model_args={"pretrained": str(folder), "method": "none", "edits": str(edits), "data": str(data)},
            tasks=["rect_portability", "rect_ripple", "rect_multihop"],
            device="cpu",
            batch_size=32,
            bootstrap_iters=0,
        )
    scores: Scores = {}
    for task, samples in results["samples"].items():
        for metric in TASKS[task].metrics:
            values = [sample[metric.name] for sample in samples if sample.get(metric.name) is not None]
            if values and metric.aggregation is MEAN:
                scores[f"{task} {metric.name}"] = mean_and_error(values)
    return scores


def single_edits(folder: Path, edits_file: Path, which: slice) -> Scores:
    """Metrics right after each of some ROME edits, each alone on the unedited model, no regularizer.

    ``same_subject``: the share of other facts of the subject that were recalled before and still are.
    """
    lm = load(folder)
    rows = [json.loads(line) for line in edits_file.read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[float]] = defaultdict(list)
    for row, edit in zip(rows[which], load_edits(str(edits_file))[which], strict=True):
        probes = [(probe["prompt"], probe["answer"]) for probe in row["same_subject"]]
        before = recalled(lm, probes)
        session = EditSession(lm.model, lm.encoder.tokenizer, EditConfig(method="rome", edits="one"), [edit])
        for name, value in session.run()["right_after_each_edit"].items():
            found[name].append(value)
        after = recalled(lm, probes)
        still = [now for now, known in zip(after, before, strict=True) if known]
        found["same_subject"].append(fmean(still) if still else 1.0)
        session.revert()
    return {name: mean_and_error(values) for name, values in found.items()}
