"""Scores of a model: the eight tasks, recall of facts, single ROME edits, a sequence of edits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness_rect._autoload  # noqa: F401  (tells lm-eval about our tasks)
from harness_rect.config import EditConfig
from harness_rect.edits import Edit, load_edits
from harness_rect.measure import teacher_force
from harness_rect.models import EditableLM
from harness_rect.session import EditSession
from tools.tiny_world.world import World

Scores = dict[str, Any]


def mean_and_error(values: Sequence[float]) -> list[float]:
    """[mean, standard error of the mean]."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / max(1, n - 1)
    return [round(mean, 4), round(math.sqrt(variance / n), 4)]


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def task_scores(model: Any, data: Path, limit: int | None = None) -> Scores:
    """[score, standard error] of each task through lm-eval; ``model`` is a folder or an HFLM instance."""
    import lm_eval

    arguments = (
        {}
        if not isinstance(model, (str, Path))
        else {"model_args": {"pretrained": str(model), "device": "cpu"}}
    )
    results = lm_eval.simple_evaluate(
        model="hf" if arguments else model,
        **arguments,
        tasks=["rect_general"],
        batch_size=32,
        limit=limit,
        metadata={"data": str(data)},
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    scores: Scores = {}
    for name, samples in results["samples"].items():
        values = results["results"][name]
        if name == "rect_ner":  # a ratio of sums: the error is that of the jackknife over documents
            scores[name] = [round(values["f1,none"], 4), round(_jackknife_f1([s["f1"] for s in samples]), 4)]
        else:
            scores[name] = mean_and_error([s["score"] for s in samples])
    scores["mean"] = round(sum(s[0] for s in scores.values()) / len(scores), 4)
    return scores


def _jackknife_f1(counts: Sequence[tuple[int, int, int]]) -> float:
    from harness_rect.evaluation.aggregations import entity_f1

    # The four questions about a sentence are left out together: they are not independent.
    sentences = [counts[i : i + 4] for i in range(0, len(counts), 4)]
    left_out = [
        entity_f1(c for j, s in enumerate(sentences) if j != i for c in s) for i in range(len(sentences))
    ]
    n, mean = len(left_out), sum(left_out) / len(left_out)
    return math.sqrt((n - 1) / n * sum((v - mean) ** 2 for v in left_out))


def recalled(lm: EditableLM, prompts: Iterable[tuple[str, str]]) -> list[float]:
    """For each (prompt, answer) 1.0 if every token of the answer is the argmax."""
    pairs = [lm.encoder.continuation(prompt, f" {answer}") for prompt, answer in prompts]
    return [float(forced.argmax == forced.target) for forced in teacher_force(lm, pairs)]


def fact_scores(lm: EditableLM, world: World) -> Scores:
    return {
        "facts at wordings trained with them": mean_and_error(
            recalled(lm, [(f.prompt(i), f.object) for f in world.facts for i in f.trained])
        ),
        "facts at held-out wordings": mean_and_error(
            recalled(lm, [(f.prompt(i), f.object) for f in world.facts for i in f.held_out])
        ),
    }


def same_subject_probes(path: Path) -> dict[str, list[tuple[str, str]]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {str(row["case_id"]): [(p["prompt"], p["answer"]) for p in row["same_subject"]] for row in rows}


def single_edits(folder: Path, edits_file: Path, count: int, hparams: str | None, start: int = 0) -> Scores:
    """Each edit alone on the unedited model, ROME, no regularizer."""
    model, tokenizer = load(folder)
    lm = EditableLM(model, tokenizer)
    probes = same_subject_probes(edits_file)
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        known = {id: recalled(lm, p) for id, p in probes.items()}
    for edit in load_edits(f"{edits_file}[{start}:{start + count}]"):
        session = EditSession(
            model, tokenizer, EditConfig(method="rome", edits="one", hparams=hparams), [edit]
        )
        report = session.run()
        values = dict(report["right_after_each_edit"])
        values["same_subject"] = _mean(
            [
                after
                for after, before in zip(recalled(lm, probes[edit.id]), known[edit.id], strict=True)
                if before
            ]
        )
        session.revert()
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: mean_and_error(values) for name, values in found.items()}


def stream(
    folder: Path, edits: Sequence[Edit], data: Path, checkpoints: Sequence[int], hparams: str | None
) -> list[Scores]:
    """The tasks after growing parts of one stream of plain ROME edits."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(folder)
    results: list[Scores] = []
    done = 0
    for count in checkpoints:
        if count > done:
            part = list(edits[done:count])
            report = EditSession(
                model, tokenizer, EditConfig(method="rome", edits="stream", hparams=hparams), part
            ).run()
            done = count
            editing = report["right_after_each_edit"]
        else:
            editing = {}
        scores = task_scores(HFLM(pretrained=model, tokenizer=tokenizer), data)
        results.append({"edits": count, **scores, "right_after": editing})
    return results


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0
