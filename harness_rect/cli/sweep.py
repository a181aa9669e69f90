"""``harness-rect sweep``: run a whole experiment."""

from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext

from harness_rect.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.yaml",
        help="what to edit and evaluate: a file, or a sweep of this package such as paper/overfitting",
    )
    parser.add_argument("--list", action="store_true", help="show the sweeps of this package, and stop")
    parser.add_argument("--models", metavar="M[,M]", help="models instead of those of the file")
    parser.add_argument("--output", metavar="DIR", help="folder of the results instead of the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and stop")
    parser.add_argument(
        "--shard", metavar="I/N", help="run the I-th of N parts; they may run at the same time in one folder"
    )
    parser.add_argument(
        "--backend",
        choices=("local", "ray"),
        default="local",
        help="where trajectories run: in this process (the default), or in workers of Ray",
    )
    parser.add_argument("--cpus", type=float, metavar="C", help="CPU cores of each Ray worker (default 1)")
    parser.add_argument(
        "--gpus", type=float, metavar="G", help="GPUs of each Ray worker (default 1 where there are any)"
    )


def run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    if arguments.list:
        from harness_rect.experiments.sweep.named import listing
        from harness_rect.io.progress import console

        console().print(listing())
        return
    if arguments.config is None:
        raise UserError("what to run is missing: a YAML file, or a name that --list shows")
    models = [] if arguments.models is None else [name.strip() for name in arguments.models.split(",")]
    for name in ("cpus", "gpus"):
        given = getattr(arguments, name)
        if given is not None and arguments.backend != "ray":
            raise UserError(f"--{name} {given:g}: for workers of Ray; give --backend ray too")
        if given is not None and not (0 <= given < math.inf and (given or name == "gpus")):
            wanted = "0 or more" if name == "gpus" else "more than 0"
            raise UserError(f"--{name} {given:g}: expected {wanted}")
    from harness_rect.experiments.sweep.ray_start import ray_running

    # Ray starts while what follows is imported.
    with ray_running() if arguments.backend == "ray" and not arguments.dry_run else nullcontext():
        from harness_rect.experiments.sweep.plan import Shard
        from harness_rect.experiments.sweep.ray_workers import Resources
        from harness_rect.experiments.sweep.runner import run_sweep
        from harness_rect.io.files import expanded

        run_sweep(
            expanded(arguments.config),
            arguments.dry_run,
            started,
            None if arguments.output is None else expanded(arguments.output),
            models,
            shard=None if arguments.shard is None else Shard.parse(arguments.shard),
            ray=Resources(arguments.cpus or 1, arguments.gpus) if arguments.backend == "ray" else None,
        )
