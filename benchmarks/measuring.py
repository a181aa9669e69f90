"""Time and memory of a function, the machine they were measured on, and files and tables of results."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
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
    """Median seconds of each, run alternately so that other load on the machine affects all of them."""
    rounds = [[timed(run, device)[0] for run in runs] for _ in range(repeats)]
    return [statistics.median(taken) for taken in zip(*rounds, strict=True)]


def peak_allocated(run: Callable[[], Any], device: str) -> int:
    """Largest total size of all tensors while it runs, in bytes, minus their size at its start."""
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
    """Largest resident memory of this process while it runs, in bytes, minus that at its start."""
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


def describe(device: str) -> dict[str, Any]:
    """The machine and the libraries, for results measured on ``device`` (cpu or cuda)."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def write_results(path: Path, results: dict[str, Any]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def merged(old: Sequence[Row], new: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """All rows; a new one replaces the old one that has the same values in the columns ``key``."""
    return list({tuple(row[k] for k in key): row for row in [*old, *new]}.values())


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column and those without a heading are aligned left, all others right."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i and heading else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 130)).print(table)
