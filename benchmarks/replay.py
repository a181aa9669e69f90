"""Time to put a kept edit run onto its base model; the weights must be the same bits every time.

    python benchmarks/replay.py [--edits 100] [--regularizers none,rect]

A run of 100 ROME edits on GPT-2's shape with random weights, one after the other. Its updates are random, of
rank one and of the size of ROME's: replaying does not depend on what was searched, which would take minutes.
Seconds are of wall and of CPU time, medians of three: reading and checking the kept folder, and replaying it,
hashes included. Results are written to benchmarks/results/replay-gpt2-cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from editing import ROME_LAYER, make_lm
from measuring import RESULTS, Row, describe, print_table, timed, write_results

from harness_rect.config import make_regularizer
from harness_rect.models import EditableLM
from harness_rect.session.history import History, KeptStep, KeptUpdate
from harness_rect.session.replay import put, replayed
from harness_rect.session.report import EditReport
from harness_rect.session.runs import KeptRun
from harness_rect.session.weights import EditedWeights
from harness_rect.updates import LowRank


def make_run(lm: EditableLM, name: str, edits: int, regularizer: str) -> KeptRun:
    """A run of random updates, with the hashes that the session would give its weights."""
    generator = torch.Generator().manual_seed(0)
    history, (rows, columns) = History(), lm.weight(name).shape
    for _ in range(edits):
        left, right = (torch.randn(n, 1, generator=generator) / n**0.5 for n in (rows, columns))
        update = LowRank(left * 0.5, right)
        kept = KeptUpdate(update, update if regularizer == "none" else None)
        history.add(KeptStep(1, {name: kept}))
    settings = {"keep": 0.4} if regularizer == "rect" else {}
    report = EditReport(
        method="rome",
        n_edits=edits,
        edit_seed=0,
        regularizer=regularizer,
        regularizer_settings=settings,
        computed_on={"device": "cpu", "threads": torch.get_num_threads()},
    )
    run = KeptRun("0" * 64, {"model": "", "dtype": "float32"}, report, [], {}, history, {})
    weights = EditedWeights(lm, [name])
    weights.start()
    for _ in replayed(run, weights, make_regularizer(regularizer, settings)):
        pass
    weights.install(weights.masters)
    hashes = weights.hashes()
    weights.revert()
    return KeptRun(run.key, run.base, report, [], hashes, history, {})


def medians(what: str, run: Callable[[], Any]) -> Row:
    """Wall and CPU seconds."""
    times = zip(*(timed(run) for _ in range(3)), strict=True)
    return {
        f"{what}_{kind}": round(statistics.median(each), 3)
        for kind, each in zip(("seconds", "cpu_seconds"), times, strict=True)
    }


def measure(lm: EditableLM, edits: int, regularizer: str, folder: Path) -> Row:
    name = lm.architecture.weight_name(ROME_LAYER["gpt2"])
    folder.mkdir()
    make_run(lm, name, edits, regularizer).write(folder)
    run, weights = KeptRun.read(folder), EditedWeights(lm, [name])

    def replay() -> None:
        put(run, weights)  # raises if other bits come out
        weights.revert()

    return {
        "regularizer": regularizer,
        "edits": edits,
        **medians("read", lambda: KeptRun.read(folder)),
        **medians("replay", replay),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "bytes_of_weight": lm.weight(name).nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--regularizers", default="none,rect")
    arguments = parser.parse_args()
    lm = make_lm("gpt2", "cpu", "float32")
    with tempfile.TemporaryDirectory() as place:
        rows = [
            measure(lm, arguments.edits, name, Path(place) / name)
            for name in arguments.regularizers.split(",")
        ]
    print_table(
        "replay, GPT-2's shape", list(rows[0]), [[str(value) for value in row.values()] for row in rows]
    )
    results = {"machine": describe("cpu"), "rows": rows}
    write_results(RESULTS / "replay-gpt2-cpu.json", results)


if __name__ == "__main__":
    main()
