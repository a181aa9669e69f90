"""The tables of docs/what_editing_costs.md, from the results of results/what-editing-costs.yaml:

    python -m tools.cost_tables [FOLDER] [--csv FILE]     # default .costs

One row for each method: the mean over the orders of the edits, with half the width of its 95% interval of
Student's t.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats

from harness_rect.experiments import results
from harness_rect.experiments.results import Results
from tools.docs_tables import markdown

UNEDITED = "unedited"
AFTER = "right after each edit"


class Column(NamedTuple):
    """A measure: of a task or group, or (``AFTER``) of the session. decimals: as it is shown."""

    title: str
    source: str
    metric: str
    decimals: int = 2


TABLES: dict[str, Sequence[Column]] = {
    "The edits": (
        Column("reliability right after, teacher-forced", AFTER, "reliability"),
        Column("right after, generated", AFTER, "reliability_gen"),
        Column("reliability at the end, teacher-forced", "rect_zsre", "reliability"),
        Column("at the end, generated", "rect_autoregressive", "reliability"),
        Column("generalization at the end, teacher-forced", "rect_zsre", "generalization"),
        Column("at the end, generated", "rect_autoregressive", "generalization"),
        Column("answers that end by themselves", "rect_autoregressive", "stopped"),
    ),
    "What should follow, and what should stay": (
        Column("another name of the subject, teacher-forced", "rect_portability", "subject_aliasing"),
        Column("another name, generated", "rect_portability", "subject_aliasing_gen"),
        Column("other facts of the subject, teacher-forced", "rect_portability", "relation_specificity"),
        Column("other facts, generated", "rect_portability", "relation_specificity_gen"),
        Column("ripple effects", "rect_ripple", "ripple"),
        Column("locality right after, teacher-forced", AFTER, "locality"),
        Column("locality right after, generated", AFTER, "locality_gen"),
        Column("locality at the end, generated", "rect_autoregressive", "locality"),
    ),
    "The model": (
        Column("mean of the eight", "rect_general", "score", 3),
        Column("KL from the unedited model", "rect_drift", "kl", 3),
        Column("perplexity", "rect_drift", "perplexity", 1),
        Column("likeliest token changed", "rect_drift", "argmax_changed"),
        Column("entropy of words", "rect_fluency", "ngram_entropy"),
        Column("consistency", "rect_fluency", "consistency"),
    ),
}

#: label -> column -> its value in each order
Values = dict[str, dict[Column, list[float]]]


def read(folder: Path) -> Values:
    """The values of every column, unedited model first."""
    found: Values = defaultdict(lambda: defaultdict(list))
    for entry in json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["evaluations"]:
        if entry["done"]:
            one = results.load(folder / entry["results"])
            label = entry["label"] if entry["n_edits"] else UNEDITED
            for column, value in _values(one):
                found[label][column].append(value)
    return found


def _values(one: Results) -> Iterator[tuple[Column, float]]:
    for column in (column for columns in TABLES.values() for column in columns):
        if column.source == AFTER:
            value = one.edit.averages("after").get(column.metric) if one.edit else None
        else:
            scores = one.scores(column.source) if column.source in one.names else {}
            value = next((s.value for key, s in scores.items() if key.metric == column.metric), None)
        if value is not None:
            yield column, value


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval where there are several values."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _cell(values: Sequence[float], decimals: int) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.{decimals}f}" + ("" if half is None else f" ± {half:.{decimals}f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".costs"))
    parser.add_argument("--csv", type=Path, help="write the value of every order here")
    arguments = parser.parse_args()
    found = read(arguments.folder)
    for title, columns in TABLES.items():
        rows = [
            [f"`{label}`", *(_cell(values[column], column.decimals) for column in columns)]
            for label, values in found.items()
        ]
        print(f"## {title}\n\n{markdown(['method', *(column.title for column in columns)], rows)}\n")
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "from", "metric", "value in each order"])
            for label, values in found.items():
                for column, of in values.items():
                    writer.writerow([label, column.source, column.metric, *(round(v, 5) for v in of)])


if __name__ == "__main__":
    main()
