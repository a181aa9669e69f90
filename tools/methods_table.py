"""The measurements of docs/methods.md: python -m tools.methods_table [FOLDER of results/methods.yaml]

One row a method, in the sweep's order: editing metrics right after each edit and at the end, the mean of the
eight tasks after 10 and 20 edits, seconds an edit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

METRICS = ("reliability", "generalization", "locality")


def table(folder: Path) -> str:
    index = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    scores: dict[str, dict[int, float]] = {}
    last: dict[str, dict[str, Any]] = {}
    unedited = 0.0
    for evaluation in index["evaluations"]:
        results = json.loads((folder / evaluation["results"]).read_text(encoding="utf-8"))
        mean = results["results"]["rect_general"]["score,none"]
        if not evaluation["n_edits"]:
            unedited = mean
            continue
        scores.setdefault(evaluation["label"], {})[evaluation["n_edits"]] = mean
        last[evaluation["label"]] = results["config"]["edit"]
    counts = sorted({count for found in scores.values() for count in found})
    heads = [
        "method",
        "facts an edit",
        *(f"{m} right after" for m in METRICS),
        *(f"{m} at the end" for m in METRICS),
    ]
    heads += [f"mean of eight, {count} edits" for count in counts] + ["seconds an edit"]
    lines = [heads, ["---"] * len(heads)]
    for label, edit in last.items():
        cells = [f"`{label.partition('-batch')[0]}`", str(edit["edit_batch_size"])]
        for moment in ("right_after_each_edit", "at_the_end"):
            cells += [f"{edit[moment][metric]:.2f}" for metric in METRICS]
        cells += [f"{scores[label][count]:.3f}" for count in counts] + [f"{edit['seconds_per_edit']:.2f}"]
        lines.append(cells)
    rows = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{rows}\n\nUnedited, the mean of the eight is {unedited:.3f}."


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else ".methods")))
