"""The measurements that three documents show, from the results of sweeps:

    python -m tools.sweep_tables methods [FOLDER]            # of results/methods.yaml, default .methods
    python -m tools.sweep_tables rect [FOLDER] [--csv FILE]  # of results/rect-experiment.yaml
    python -m tools.sweep_tables controls [FOLDER]           # of results/controls/*.yaml, default .controls

`methods`: one row for each method, in the sweep's order. `rect`: for every setting of ROME (layer, second
moments) and every regularizer the mean over orders and, order by order, the difference from plain ROME with
the same setting, each with half the width of its 95% interval of Student's t over the orders. `controls`:
writes results/controls/NAME.csv of every finished sweep, and from all such files, those of single edits
included (python -m tools.single_edits), the tables of docs/controls.md and results/controls/tables.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness_rect.evaluation.catalogue import EDITING_METRICS, GENERAL
from harness_rect.experiments import results
from harness_rect.session.report import EditReport, When
from tools import controls
from tools.controls import interval
from tools.docs_tables import markdown

TIMES: dict[When, str] = {"after": "right after", "end": "at the end"}
MEAN = "mean of eight"
Row = dict[str, Any]


def read(folder: Path) -> tuple[float, list[tuple[Row, float, EditReport]]]:
    """The unedited mean of the eight; for each evaluation after edits its entry, its mean and its report."""
    unedited, found = math.nan, []
    for entry in json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["evaluations"]:
        if not entry["done"]:
            continue
        one = results.load(folder / entry["results"])
        mean = one.scores(GENERAL.name)[one.headline(GENERAL.name)].value
        if one.edit is None or not one.edit.n_edits:
            unedited = mean
        else:
            found.append((entry, mean, one.edit))
    return unedited, found


def methods(found: list[tuple[Row, float, EditReport]]) -> str:
    """Editing metrics after the last evaluation, the mean of the eight at each, seconds for each edit."""
    means: dict[str, dict[int, float]] = defaultdict(dict)
    for entry, mean, edit in found:
        means[entry["label"]][edit.n_edits] = mean
    last = {entry["label"]: edit for entry, _, edit in found}
    counts = sorted({edit.n_edits for _, _, edit in found})
    heads = ["method", "facts an edit"]
    heads += [f"{metric} {words}" for words in TIMES.values() for metric in EDITING_METRICS]
    heads += [f"{MEAN}, {count} edits" for count in counts] + ["seconds an edit"]
    lines = []
    for label, edit in last.items():
        values = [edit.averages(when).get(metric) for when in TIMES for metric in EDITING_METRICS]
        cells = [f"`{label.partition('-batch')[0]}`", str(edit.edit_batch_size)]
        cells += [_number(value, 2) for value in values]
        cells += [_number(means[label].get(count), 3) for count in counts]
        lines.append([*cells, _number(edit.seconds_per_edit, 2)])
    return markdown(heads, lines)


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def over_orders(found: list[tuple[Row, float, EditReport]]) -> list[Row]:
    """For each setting, regularizer and number of edits: every metric, its change, and their intervals."""
    scores: dict[tuple[str, str, int], dict[int, dict[str, float]]] = defaultdict(dict)
    for entry, mean, edit in found:
        kept = "none" if edit.keep is None else f"{edit.regularizer} {100 * edit.keep:.0f}%"
        values: dict[str, Any] = {
            f"{metric} {words}": edit.averages(when)[metric]
            for when, words in TIMES.items()
            for metric in EDITING_METRICS
        }
        setting = entry["label"].partition("+")[0], kept, edit.n_edits
        scores[setting][entry["order"]] = {MEAN: mean} | values
    rows = []
    for (method, kept, edits), orders in scores.items():
        plain = scores[method, "none", edits]
        row: Row = {"method": method, "regularizer": kept, "edits": edits, "orders": len(orders)}
        for metric in next(iter(orders.values())):
            row[metric], row[f"{metric} +-"] = interval([values[metric] for values in orders.values()])
            if kept != "none":
                changes = [orders[o][metric] - plain[o][metric] for o in sorted(orders.keys() & plain.keys())]
                row[f"{metric} change"], row[f"{metric} change +-"] = interval(changes)
        rows.append(row)
    return rows


#: Columns of the page -> columns of the rows.
SHOWN = {
    MEAN: MEAN,
    "change from plain ROME": f"{MEAN} change",
    "reliability right after": "reliability right after",
    "change": "reliability right after change",
    "reliability at the end": "reliability at the end",
    "locality at the end": "locality at the end",
}


def rect(rows: list[Row], edits: int) -> str:
    lines = [
        [row["method"].removeprefix("rome-").replace("-", ", "), row["regularizer"]]
        + [_cell(row, name) for name in SHOWN.values()]
        for row in rows
        if row["edits"] == edits
    ]
    return markdown(["setting", "regularizer", *SHOWN], lines)


def _cell(row: Row, name: str) -> str:
    sign = "+" if name.endswith("change") else ""
    return f"{row[name]:{sign}.3f} ± {row[f'{name} +-']:.3f}" if name in row else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", choices=("methods", "rect", "controls"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--csv", type=Path, help="write every number of `rect` here")
    arguments = parser.parse_args()
    default = {"methods": ".methods", "rect": ".rect-experiment", "controls": ".controls"}
    folder = arguments.folder or Path(default[arguments.sweep])
    if arguments.sweep == "controls":
        for note in controls.collect(folder):
            print(f"left as it is: {note}")
        for path in controls.write_documents():
            print(path)
        return
    unedited, found = read(folder)
    print(f"Unedited, the mean of the eight is {unedited:.3f}.\n")
    if arguments.sweep == "methods":
        print(methods(found))
        return
    rows = over_orders(found)
    for edits in sorted({row["edits"] for row in rows}):
        print(f"After {edits} edits:\n\n{rect(rows, edits)}\n")
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
