"""The tables of docs/rect_on_rect_tiny.md: python -m tools.rect_experiment [FOLDER] [--csv FILE]

Reads the results of `harness-rect sweep results/rect-experiment.yaml`: for every setting of ROME (layer,
second moments) and every regularizer the mean over orders of the mean of the eight tasks, and, order by
order, its difference from plain ROME with the same setting (95% interval of Student's t over the orders).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from harness_rect.session.report import EditReport

Key = tuple[str, str, int]  # method, regularizer, number of edits
METRICS = ("reliability", "generalization", "locality")


def read(folder: Path) -> tuple[float, dict[Key, dict[int, dict[str, float]]]]:
    """The unedited mean of the eight, and for each setting order -> its scores."""
    index = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    found: dict[Key, dict[int, dict[str, float]]] = defaultdict(dict)
    unedited = math.nan
    for evaluation in index["evaluations"]:
        if not evaluation["done"]:
            continue
        results = json.loads((folder / evaluation["results"]).read_text(encoding="utf-8"))
        score = results["results"]["rect_general"]["score,none"]
        if not evaluation["n_edits"]:
            unedited = score
            continue
        edit = EditReport.read(results["config"]["edit"], evaluation["results"])
        kept = "none" if edit.keep is None else f"{edit.regularizer} {100 * edit.keep:.0f}%"
        scores = {"mean of eight": score}
        scores |= {f"{m} right after": edit.right_after_each_edit[m] for m in METRICS}
        scores |= {f"{m} at the end": edit.at_the_end[m] for m in METRICS}
        found[evaluation["label"].partition("+")[0], kept, evaluation["n_edits"]][evaluation["order"]] = (
            scores
        )
    return unedited, found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval."""
    if len(values) < 2:
        return mean(values), math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), half


def rows(found: dict[Key, dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    made = []
    for (method, kept, edits), orders in found.items():
        plain = found[method, "none", edits]
        both = sorted(orders.keys() & plain.keys())
        row: dict[str, Any] = {"method": method, "regularizer": kept, "edits": edits, "orders": len(orders)}
        for metric in next(iter(orders.values())):
            row[metric], row[f"{metric} +-"] = interval([scores[metric] for scores in orders.values()])
            if kept != "none":
                differences = [orders[o][metric] - plain[o][metric] for o in both]
                row[f"{metric} change"], row[f"{metric} change +-"] = interval(differences)
        made.append(row)
    return made


def markdown(made: list[dict[str, Any]], edits: int) -> str:
    heads = ["setting", "regularizer", "mean of eight", "change from plain ROME", "reliability right after"]
    heads += ["change", "reliability at the end", "locality at the end"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in made:
        if row["edits"] != edits:
            continue
        cells = [
            row["method"].removeprefix("rome-").replace("-", ", "),
            row["regularizer"],
            _cell(row, "mean of eight"),
        ]
        cells.append(_cell(row, "mean of eight change", sign="+"))
        cells += [
            _cell(row, "reliability right after"),
            _cell(row, "reliability right after change", sign="+"),
        ]
        cells += [_cell(row, "reliability at the end"), _cell(row, "locality at the end")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str, sign: str = "") -> str:
    return f"{row[name]:{sign}.3f} ± {row[f'{name} +-']:.3f}" if name in row else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".rect-experiment"))
    parser.add_argument("--csv", type=Path, help="also write every number here")
    arguments = parser.parse_args()
    unedited, found = read(arguments.folder)
    made = rows(found)
    print(f"Unedited, the mean of the eight is {unedited:.3f}.")
    for edits in sorted({row["edits"] for row in made}):
        print(f"\nAfter {edits} edits:\n\n{markdown(made, edits)}")
    if arguments.csv:
        names = list(dict.fromkeys(name for row in made for name in row))
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(
                {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in made
            )


if __name__ == "__main__":
    main()
