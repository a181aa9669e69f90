"""A sweep of eight trajectories of rect-tiny in one process and in workers of Ray, one thread each.

    python benchmarks/ray_sweep.py [--edits 60] [--limit 20]

Ray has a worker for each core of the machine: two on two cores. The command starts it, or it runs already, as
on a cluster. Wall time is that of the command, its start and that of the workers included; it means something
where the cores are free. All ways must give the same scores and edited weights. The result is written to
benchmarks/results/ray_sweep.json with the load of the machine before.

Needs Ray: .venv/test-ray/bin/python has it after `make test-ray`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from measuring import RESULTS, describe, print_table, write_results

RUNNING = "workers of a Ray that runs"
WAYS = {"one process": None, "workers of a Ray started here": "ray", RUNNING: "ray"}
KEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--limit", type=int, default=20, help="documents of each task")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        took, found = {}, {}
        for name, backend in WAYS.items():
            folder = Path(place, name.replace(" ", "-"))
            folder.mkdir()
            with running_ray() if name == RUNNING else nullcontext("local") as address:
                took[name] = sweep(
                    folder, arguments, [] if backend is None else ["--backend", backend], address
                )
            found[name] = content(folder / "out")
    first, *others = found.values()
    if not first or any(other != first for other in others):
        raise SystemExit("the results differ; a ratio would mean nothing")
    ratios = {name: took["one process"] / seconds for name, seconds in took.items()}
    title = f"{len(KEPT)} trajectories of {arguments.edits} edits on {os.cpu_count()} cores, load {load:.1f}"
    print_table(
        title, ["", "wall", "ratio"], [[n, f"{s:.1f} s", f"{ratios[n]:.2f}"] for n, s in took.items()]
    )
    given = vars(arguments) | {"workers": os.cpu_count(), "load_before": load, "seconds": took}
    write_results(RESULTS / "ray_sweep.json", describe("cpu") | given | {"ratios": ratios})


@contextmanager
def running_ray() -> Iterator[str]:
    """The address of a Ray on this machine that is stopped at the end."""
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    os.environ["RAY_AUTH_MODE"] = "disabled"  # it listens on this machine alone
    started = [*command, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", "6399"]
    subprocess.run(
        [*started, "--include-dashboard", "false", "--disable-usage-stats"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield "127.0.0.1:6399"
    finally:
        subprocess.run([*command, "stop"], check=True, stdout=subprocess.DEVNULL)


def sweep(folder: Path, arguments: argparse.Namespace, options: list[str], address: str) -> float:
    """Wall seconds of the command, with this RAY_ADDRESS."""
    config = {
        "output": "out",
        "models": ["rect-tiny"],
        "edits": f"tiny[0:{arguments.edits}]",
        "data": "tiny",
        "methods": ["rome"],
        "regularizers": [{"rect": keep} for keep in KEPT],
        "checkpoints": [arguments.edits],
        "tasks": ["rect_general"],
        "limit": arguments.limit,
        "batch_size": 16,
        "device": "cpu",
    }
    (folder / "sweep.yaml").write_text(json.dumps(config))  # JSON is YAML
    setting = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": address}
    setting["HARNESS_RECT_CACHE"] = str(folder / "cache")
    started = time.perf_counter()
    command = [sys.executable, "-m", "harness_rect", "sweep", "sweep.yaml", *options]
    subprocess.run(command, cwd=folder, env=os.environ | setting, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def content(folder: Path) -> dict[str, Any]:
    """File -> scores, and the hashes of the edited weights."""
    read = {
        str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted(folder.rglob("results.json"))
    }
    return {
        name: (one["results"], {w: t["sha256"] for w, t in one["config"]["edit"].get("weights", {}).items()})
        for name, one in read.items()
    }


if __name__ == "__main__":
    main()
