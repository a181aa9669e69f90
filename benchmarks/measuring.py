"""Time and memory of a function, and the files and tables of figures that all benchmarks write alike."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from harness_rect.io.files import written_whole

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def timed(run: Callable[[], Any], device: str = "cpu") -> tuple[float, float]:
    """(wall, CPU) seconds of one call, until a GPU has finished too."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def seconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    return side_by_side([run], repeats, device)[0]


def side_by_side(runs: Sequence[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Median seconds of each, taken in turns: what else the machine does then falls on all of them."""
    rounds = [[timed(run, device)[0] for run in runs] for _ in range(repeats)]
    return [statistics.median(taken) for taken in zip(*rounds, strict=True)]


def peak_allocated(run: Callable[[], Any], device: str) -> int:
    """Largest sum of tensors held at a time while it runs, in bytes, above what was held at its start."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in changes]
    return max(totals) - totals[0] + changes[0]["args"]["Bytes"]


def peak_resident(run: Callable[[], Any]) -> int:
    """Largest resident memory of this process while it runs, in bytes, above that at its start."""
    process, stop = psutil.Process(), threading.Event()
    start = top = process.memory_info().rss

    def watch() -> None:
        nonlocal top
        while not stop.wait(0.005):
            top = max(top, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        stop.set()
        thread.join()
    return top - start


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def write_results(path: Path, results: dict[str, Any]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def merged(old: Sequence[Row], new: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """Old rows, those with the ``key`` of a new one replaced by it, and the other new ones."""
    return list({tuple(row[k] for k in key): row for row in [*old, *new]}.values())


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column and one without a heading to the left."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i and heading else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 130)).print(table)
