"""The cost of evaluation by edited_hf, without editing, compared with lm-eval's own hf, in one process.

    python benchmarks/evaluation.py [--shape rect-tiny|gpt2] [--device cpu|cuda] [--limit ROWS] [--repeats N]

Both models are loaded from one folder and evaluated alternately by ``lm_eval.simple_evaluate`` on the same
tasks in the same batches. A ratio is the median over pairs of consecutive evaluations, edited_hf / hf, of
wall time and of CPU time, which depends less on other load. Loading is timed separately. Forward passes,
their sequences and tokens (padding included) are counted at the model. Results are written to
benchmarks/results/evaluation-<shape>-<device>.json with a description of the machine. The exit status is 1
if the CPU time is 2% or more above that of hf.

The work: ``rect_general``; the rows of rect_sentiment as lm-eval's own multiple_choice; ``rect_editing`` on
targets of one to four words. ``gpt2`` is a random model of GPT-2's shape with rect-tiny's tokenizer.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before lm_eval: nothing here is on the hub, and asking takes time

import lm_eval
import torch
import transformers
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from measuring import RESULTS, Row, describe, print_table, timed, write_results
from torch.utils import collect_env

from harness_rect._autoload import tasks_folder
from harness_rect.edits import load_edits
from harness_rect.embedded import resolve_model
from harness_rect.evaluation.data import sentiment
from harness_rect.model_wrappers.edited_hf import EditedHF

LIMIT = 0.02
CLASSES: dict[str, tuple[type[HFLM], dict[str, Any]]] = {
    "hf": (HFLM, {}),
    "edited_hf": (EditedHF, {"method": "none"}),
}
CHOICES = {
    "task": "sentiment_choices",
    "custom_dataset": lambda **_: sentiment(data="tiny"),
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "text: {{sentence}} answer:",
    "doc_to_choice": ["negative", "positive"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WORK: dict[str, list[Any]] = {
    "rect_general": ["rect_general"],
    "multiple_choice": [CHOICES],
    "rect_editing": ["rect_editing"],
}
#: Work that both classes do in the same way.
ALIKE = ("rect_general", "multiple_choice")


def model_folder(shape: str, scratch: Path) -> str:
    tiny = str(resolve_model("rect-tiny"))
    if shape == "rect-tiny":
        return tiny
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**ends)).save_pretrained(scratch / shape)
    tokenizer.save_pretrained(scratch / shape)
    return str(scratch / shape)


def edits_file(scratch: Path) -> str:
    """Twenty facts of the embedded world whose targets and answers are one to four of its words."""
    facts, rng = load_edits("tiny[0:20]"), random.Random(0)
    words = sorted({fact.target_new for fact in facts})

    def answer() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 4)))

    rows = [
        {
            "prompt": fact.text,
            "subject": fact.subject,
            "target_new": answer(),
            "ground_truth": answer(),
            "rephrase_prompt": fact.paraphrases[0],
            "locality_prompt": fact.neighborhood[0].prompt,
            "locality_ground_truth": answer(),
        }
        for fact in facts
    ]
    file = scratch / "edits.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.reset()
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def reset(self) -> None:
        self.passes = self.sequences = self.tokens = 0

    def _count(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.passes += 1
        self.sequences += ids.shape[0]
        self.tokens += ids.numel()


def in_turn(run: Callable[[str], Any], repeats: int) -> Row:
    """Medians of both classes and of the ratios edited_hf / hf; the order of the two alternates."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CLASSES}
    for name in CLASSES:
        run(name)  # warms up
    for repeat in range(repeats):
        for name in sorted(CLASSES, reverse=bool(repeat % 2)):
            gc.collect()
            times[name].append(timed(partial(run, name)))
    first, second = times.values()
    row: Row = {}
    for place, clock in enumerate(("wall", "cpu")):
        for name, values in times.items():
            row[f"{name}_{clock}_s"] = statistics.median(pair[place] for pair in values)
        ratios = [b[place] / a[place] for a, b in zip(first, second, strict=True)]
        row[f"{clock}_ratio"] = statistics.median(ratios)
        row[f"{clock}_ratios"] = [min(ratios), max(ratios)]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["rect-tiny", "gpt2"], default="rect-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="rows of each task; without it all")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", default=",".join(WORK))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    settings = {"device": arguments.device, "batch_size": arguments.batch_size}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(arguments.shape, Path(scratch))
        metadata = {"pretrained": folder, "edits": edits_file(Path(scratch)), "data": "tiny"}
        manager = TaskManager(include_path=tasks_folder(), metadata=metadata)

        def load(name: str) -> HFLM:
            model, more = CLASSES[name]
            return model(pretrained=folder, **settings, **more)

        rows.append({"work": "loading the model"} | in_turn(load, arguments.repeats))
        models = {name: load(name) for name in CLASSES}
        counted = {name: Passes(model.model) for name, model in models.items()}
        for work in arguments.only.split(","):

            def run(name: str, tasks: list[Any] = WORK[work]) -> None:
                counted[name].reset()
                lm_eval.simple_evaluate(
                    model=models[name],
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=arguments.limit,
                    bootstrap_iters=0,  # it is the same for both and takes long
                )

            with (  # lm-eval starts other programs to describe the machine, which takes seconds
                mock.patch.object(collect_env, "get_pretty_env_info", lambda: ""),
                mock.patch.object(evaluator, "get_git_commit_hash", lambda: ""),
            ):
                row = {"work": work} | in_turn(run, arguments.repeats)
            for name, count in counted.items():
                for what in ("passes", "sequences", "tokens"):
                    row[f"{name}_{what}"] = getattr(count, what)
            rows.append(row)
    _write(rows, arguments)
    title = f"{arguments.shape}, {arguments.device}, batches of {arguments.batch_size}"
    headings = ["work", "hf", "edited_hf", "ratio", "ratio of CPU time", "passes", "tokens"]
    print_table(title, headings, [_cells(row) for row in rows])
    return int(any(row["cpu_ratio"] >= 1 + LIMIT for row in rows if row["work"] in ALIKE))


def _write(rows: list[Row], arguments: argparse.Namespace) -> None:
    output = arguments.output or RESULTS / f"evaluation-{arguments.shape}-{arguments.device}.json"
    asked = {name: getattr(arguments, name) for name in ("shape", "batch_size", "limit", "repeats")}
    write_results(output, asked | {"rows": rows} | describe(arguments.device))


def _cells(row: Row) -> list[str]:
    seconds = [f"{row[f'{name}_wall_s']:.3g} s" for name in CLASSES]
    counts = [
        f"{row[f'hf_{what}']} -> {row[f'edited_hf_{what}']}"
        for what in ("passes", "tokens")
        if "hf_passes" in row
    ]
    return [row["work"], *seconds, f"{row['wall_ratio']:.3f}", f"{row['cpu_ratio']:.3f}", *counts]


if __name__ == "__main__":
    sys.exit(main())
