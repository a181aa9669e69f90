"""The measurements of docs/methods.md: python -m tools.methods_table [FOLDER of results/methods.yaml]

One row for each method, in the sweep's order: editing metrics right after each edit and at the end, the mean
of the eight tasks at each number of edits, seconds for each edit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from harness_rect.evaluation.catalogue import EDITING_METRICS, GENERAL
from harness_rect.experiments import results
from harness_rect.session.report import EditReport

TIMES: dict[Literal["after", "end"], str] = {"after": "right after", "end": "at the end"}


def table(folder: Path) -> str:
    index = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    scores: dict[str, dict[int, float]] = {}
    last: dict[str, EditReport] = {}
    unedited = 0.0
    for evaluation in index["evaluations"]:
        one = results.load(folder / evaluation["results"])
        mean = one.scores(GENERAL.name)[one.headline(GENERAL.name)].value
        if one.edit is None or not one.edit.n_edits:
            unedited = mean
            continue
        scores.setdefault(evaluation["label"], {})[one.edit.n_edits] = mean
        last[evaluation["label"]] = one.edit
    counts = sorted({count for found in scores.values() for count in found})
    heads = [
        "method",
        "facts an edit",
        *(f"{m} {words}" for words in TIMES.values() for m in EDITING_METRICS),
    ]
    heads += [f"mean of eight, {count} edits" for count in counts] + ["seconds an edit"]
    lines = [heads, ["---"] * len(heads)]
    for label, edit in last.items():
        values = [edit.averages(when).get(metric) for when in TIMES for metric in EDITING_METRICS]
        cells = [f"`{label.partition('-batch')[0]}`", str(edit.edit_batch_size)]
        cells += [_number(value, 2) for value in values]
        cells += [_number(scores[label].get(count), 3) for count in counts]
        lines.append([*cells, _number(edit.seconds_per_edit, 2)])
    rows = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{rows}\n\nUnedited, the mean of the eight is {unedited:.3f}."


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else ".methods")))
