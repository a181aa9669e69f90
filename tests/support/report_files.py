"""Trees of results files made by hand: as many models, regularizers, edits and streams as a test needs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from support.lm_eval_files import content, mean_task, with_group, write

EIGHT = (
    *("rect_reasoning", "rect_nli", "rect_open_domain_qa", "rect_closed_domain_qa"),
    *("rect_dialogue", "rect_summarization", "rect_ner", "rect_sentiment"),
)
#: log10 edges of the histogram of delta: 37 of them, so 38 bins.
BINS = 38


def weight(manhattan: float = 12.5, over: tuple[float, float] = (0.6, 0.4)) -> dict[str, Any]:
    """What the edit report says of one weight."""
    return {
        "manhattan_distance": manhattan,
        "changed": 0.5,
        "share_over": {"0.077": over[0], "0.171": over[1]},
        "delta_histogram": [0] * 20 + [30, 70] + [0] * (BINS - 22),
        "heat_map": [[0.1, 0.2], [0.3, 0.4]],
    }


def edit(n_edits: int, reliability: tuple[float, float], stream: int = 0, **more: Any) -> dict[str, Any]:
    """A report as edited_hf writes it: reliability right after each edit and at the end."""
    after, end = ({"reliability": v, "generalization": v, "locality": 1 - v} for v in reliability)
    return {
        "method": "rome",
        "model": "tiny",
        "n_edits": n_edits,
        "regularizer": "none",
        "keep": None,
        "edit_batch_size": 1,
        "edit_seed": 0,
        "edits_sha256": f"{n_edits}-{stream}",
        "hparams": {"layers": [3], "v_lr": 0.5},
        "hparams_origin": "preset tiny",
        "right_after_each_edit": after,
        "at_the_end": end,
        "edits": [{"id": str(i), "after": after, "end": end} for i in range(n_edits)],
        "weights": {"h.3.weight": weight()},
        "versions": {"torch": "2.13.0"},
    } | more


def writer(folder: Path) -> Callable[..., Path]:
    """``add(right, edit=None, tasks=EIGHT, samples=False, model=..., **content)`` writes one evaluation.

    ``right``: how many of ten answers of each task are right, one number or one for each task.
    """
    numbers = count()

    def add(
        right: int | dict[str, int],
        edit: dict[str, Any] | None = None,
        tasks: tuple[str, ...] = EIGHT,
        samples: bool = False,
        model: str = "tiny",
        docs: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> Path:
        of = right if isinstance(right, dict) else dict.fromkeys(tasks, right)
        made = {name: mean_task("acc", [i < of[name] for i in range(10)]) for name in tasks}
        for task in made.values() if docs else ():
            task["docs"] = docs
        config = {"model_args": {"pretrained": model}, "edit": edit} | more.pop("config", {})
        results = content(made, config=config, **more)
        if set(EIGHT) <= set(tasks):
            mean = sum(task["value"] for task in made.values()) / len(made)
            results = with_group(results, "rect_general", EIGHT, mean)
        return write(folder / f"{next(numbers):03d}", results, made, samples)

    return add
