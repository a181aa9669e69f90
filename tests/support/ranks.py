"""Processes of one gloo group without a launcher: each can have arguments, and an end, of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    status: int
    out: str
    err: str


def environments(number: int) -> list[dict[str, str]]:
    """What a launcher would set for each of ``number`` processes that start now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def run_ranks(arguments: Sequence[Sequence[str]]) -> list[Ended]:
    """Run ``python *arguments[rank]`` for every rank at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | environment | {"PYTHONPATH": str(TESTS.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words, environment in zip(arguments, environments(len(arguments)), strict=True)
    ]
    said = [process.communicate(timeout=180) for process in processes]
    return [Ended(process.returncode, *both) for process, both in zip(processes, said, strict=True)]
