"""Measure what is known of the embedded models without another evaluation: python -m tools.known_scores

Writes harness_rect/tiny/scores.jsonl: of each embedded model, and of the default one after its default 20
edits by ROME without RECT, the scores of the eight general tasks on all rows and on the first N.
"""

from __future__ import annotations

import json
from typing import Any

from lm_eval.tasks import TaskManager

from harness_rect import embedded
from harness_rect._autoload import tasks_folder
from harness_rect.compat.lm_eval import evaluate
from harness_rect.evaluation.catalogue import GENERAL
from harness_rect.experiments.summary import KNOWN, OF_EDITS
from harness_rect.io.files import written_whole
from harness_rect.model_wrappers.edited_hf import EditedHF

LIMITS = (None, 10, 20)
RUNS = [*((model, "none") for model in embedded.MODELS), (embedded.NAME, "rome")]
#: Parts of an edit report by which edits are found again.
EDIT = {*OF_EDITS, "regularizer", "hparams", "n_edits", "right_after_each_edit", "schema_version"}


def known(model: str, method: str, limits: tuple[int | None, ...] = LIMITS) -> list[dict[str, Any]]:
    """Results files of one model, without what is not read."""
    arguments = {"pretrained": model, "method": method, "data": "tiny"}
    lm = EditedHF(**arguments, edit_cache="off")
    tasks = TaskManager(include_path=tasks_folder(), include_defaults=False, metadata=arguments)
    found = []
    for limit in limits:
        done = evaluate(
            lm,
            "edited_hf",
            model_args=arguments,
            tasks=list(GENERAL.members),
            limit=limit,
            task_manager=tasks,
            log_samples=False,
        )
        found.append(_trimmed(done.results))
    return found


def _trimmed(results: dict[str, Any]) -> dict[str, Any]:
    config = results["config"]
    edit = {name: value for name, value in config["edit"].items() if name in EDIT | {"method"}}
    edit["hparams"] = {k: v for k, v in edit.get("hparams", {}).items() if k != "context_templates"}
    return {
        "results": {
            task: {"score,none": round(results["results"][task]["score,none"], 6)} for task in GENERAL.members
        },
        "configs": {task: {} for task in GENERAL.members},
        **{key: results[key] for key in ("versions", "n-shot", "n-samples")},
        "config": {
            **{key: config[key] for key in ("model", "model_args", "limit")},
            **{"model_dtype": str(config["model_dtype"]), "edit": edit},
        },
    }


if __name__ == "__main__":
    lines = [json.dumps(one) + "\n" for model, method in RUNS for one in known(model, method)]
    with written_whole(KNOWN) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
