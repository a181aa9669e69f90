"""The figures of docs/numerics.md, on the embedded models: the same edits in three dtypes, and by threads.

    python -m tools.numerics && python -m tools.docs_tables

The first takes about ten minutes and writes results/numerics.json, from which the second makes the tables.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.tasks import TaskManager
from torch import Tensor

from harness_rect._autoload import tasks_folder
from harness_rect.config import EditConfig
from harness_rect.embedded import resolve_model
from harness_rect.methods import METHODS
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.session import EditSession

FILE = Path(__file__).parent.parent / "results" / "numerics.json"
MODELS = ("rect-tiny", "rect-tiny-llama")
DTYPES = ("float32", "bfloat16", "float16")
#: Edits; documents of each general task.
EDITS, DOCUMENTS = 5, 5
#: Numbers of threads between which the weights are compared, and edits of each.
THREADS, EDITS_BY_THREADS = (1, 2), 3


def precision() -> Iterator[dict[str, Any]]:
    """A row for each model, method, regularizer and dtype; differences are those from float32."""
    for model in MODELS:
        for method in ("rome", "memit"):
            for keep in (None, 0.4):
                weights: dict[str, Tensor] = {}
                for dtype in DTYPES:
                    found = _evaluated(model, method, keep, dtype)
                    now = {name: found[0].model.get_parameter(name).float() for name in found[1]["weights"]}
                    weights = weights or now
                    yield {
                        **{"model": model, "method": method, "rect": keep, "dtype": dtype},
                        "difference": difference(weights, now),
                        "reliability": found[1]["at_the_end"]["reliability"],
                        "general": found[2],
                    }


def _evaluated(
    model: str, method: str, keep: float | None, dtype: str
) -> tuple[EditedHF, dict[str, Any], float]:
    """The edited model, its report, and its mean score of the general tasks."""
    arguments: dict[str, Any] = {
        "pretrained": model,
        "method": method,
        "edits": f"tiny[0:{EDITS}]",
        "dtype": dtype,
    }
    arguments |= {"edit_cache": "off"} | ({} if keep is None else {"rect": keep})
    arguments |= {"edit_batch_size": EDITS} if METHODS[method].batches else {}
    lm = EditedHF(**arguments, device="cpu")
    manager = TaskManager(include_path=tasks_folder(), include_defaults=False, metadata=arguments)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["rect_general"],
        task_manager=manager,
        limit=DOCUMENTS,
        bootstrap_iters=0,
        log_samples=False,
    )
    return lm, lm.edit_report.to_dict(), results["groups"]["rect_general"]["score,none"]


def threads() -> Iterator[dict[str, Any]]:
    """A row for each method: how far the weights are apart with one and with two threads."""
    before = torch.get_num_threads()
    for method in METHODS:
        weights = []
        for number in THREADS:
            torch.set_num_threads(number)
            weights.append(_edited(method))
        torch.set_num_threads(before)
        yield {"method": method, "difference": difference(*weights)}


def _edited(method: str) -> dict[str, Tensor]:
    folder = resolve_model("rect-tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = EDITS_BY_THREADS if METHODS[method].batches else 1
    config = EditConfig(method=method, edits=f"tiny[0:{EDITS_BY_THREADS}]", edit_batch_size=size)
    session = EditSession(model, tokenizer, config, model_name="rect-tiny")
    report = session.run()
    return {name: session.lm.weight(name).detach() for name in report["weights"]}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two elements, divided by the largest element of the weight."""
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one)


def main() -> None:
    logging.disable(logging.WARNING)
    found = {
        "made_with": {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "lm_eval": lm_eval.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "threads": list(threads()),
        "precision": list(precision()),
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
