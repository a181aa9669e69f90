"""``harness-rect sweep``: run a whole experiment."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to edit and evaluate")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and stop")


def run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval shows one bar for each task of each evaluation
    from harness_rect.experiments.sweep.runner import run_sweep

    run_sweep(arguments.config, arguments.dry_run, started)
