"""``harness-rect sweep``: run a whole experiment."""

from __future__ import annotations

import argparse
import os
import time

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


def run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval shows one bar for each task of each evaluation
    if arguments.list:
        from harness_rect.experiments.sweep.named import listing
        from harness_rect.io.progress import console

        console().print(listing())
        return
    if arguments.config is None:
        raise UserError("what to run is missing: a YAML file, or a name that --list shows")
    models = [] if arguments.models is None else [name.strip() for name in arguments.models.split(",")]
    from harness_rect.experiments.sweep.runner import run_sweep
    from harness_rect.io.files import expanded

    output = None if arguments.output is None else expanded(arguments.output)

    run_sweep(expanded(arguments.config), arguments.dry_run, started, output, models)
