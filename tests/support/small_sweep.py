"""A sweep of a small model that takes seconds, and its being killed."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from support.facts import FACTS

from harness_rect.compat.lm_eval import KeptTasks
from harness_rect.experiments.sweep import evaluate, runner
from harness_rect.experiments.sweep.plan import Shard
from harness_rect.experiments.sweep.ray_workers import Resources
from harness_rect.io.checksums import SUMS

ROWS: dict[str, list[dict[str, Any]]] = {
    "rte.jsonl": [
        {"sentence1": f"It rained in town {i}.", "sentence2": "It was wet.", "label": i % 2} for i in range(6)
    ],
    "sst2.jsonl": [{"sentence": "large and lovely" if i % 2 else "wet", "label": i % 2} for i in range(5)],
}
EDITS = [fact | {"case_id": f"fact-{i}"} for i, fact in enumerate(FACTS)]
# What of one may be missing from others, so that metrics are partial at some checkpoints and not at others.
del EDITS[2]["rephrase_prompt"]
CONFIG: dict[str, Any] = {
    "output": "out",
    "models": ["model"],
    "edits": "facts.json",
    "data": "rows",
    "methods": [{"method": "rome", "hparams": "hparams.json"}],
    "regularizers": ["none", {"regularizer": "random", "keep": 0.5}],
    "checkpoints": [0, 1, 3],
    "tasks": ["rect_nli", "rect_sentiment", "rect_editing"],
    "orders": 2,
    "limit": 4,
    "batch_size": 2,
    "device": "cpu",
    "log_samples": True,
}
TIMES = re.compile(
    r'("(?:date|start_time|end_time|total_evaluation_time_seconds|seconds|measuring_seconds'
    r'|seconds_per_edit|seconds_per_evaluation)": )("[\d.]+"|[\d.]+)'
)


@contextmanager
def small_world(world: Path, folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Work in a folder with links to the small world."""
    folder.mkdir(exist_ok=True)
    for path in world.iterdir():
        (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        # All of lm-eval's own tasks take seconds to list.
        patch.setattr(evaluate, "KeptTasks", functools.partial(KeptTasks, include_defaults=False))
        patch.chdir(folder)
        yield patch


def sweep(
    dry_run: bool = False, shard: Shard | None = None, ray: Resources | None = None, **changes: Any
) -> None:
    path = Path("sweep.yaml")
    path.write_text(yaml.safe_dump(CONFIG | changes))
    runner.run_sweep(path, dry_run, shard=shard, ray=ray)


def files(folder: Path) -> dict[str, str]:
    """Path -> content without times, of everything below ``folder`` except checksums."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SUMS:
            found[str(path.relative_to(folder))] = TIMES.sub(r"\g<1>0", path.read_text())
    found["sweep.json"] = json.dumps(json.loads(found["sweep.json"]) | {"timing": None})
    return found


class Fuse:
    """Kills this process (SIGKILL) at one of its file renames or of the model's forward passes."""

    def __init__(self, kind: str, below: int, moments: random.Random) -> None:
        self.kind, self.left = kind, moments.randrange(1, below)

    def burn(self, kind: str) -> None:
        self.left -= kind == self.kind
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        rename, forward = os.replace, transformers.GPT2LMHeadModel.forward

        def replace(*args: Any, **kwargs: Any) -> None:
            self.burn("rename")  # before: a temporary file is left
            rename(*args, **kwargs)
            self.burn("rename")  # after

        def run(*args: Any, **kwargs: Any) -> Any:
            self.burn("pass")
            return forward(*args, **kwargs)

        patch.setattr(os, "replace", replace)
        patch.setattr(transformers.GPT2LMHeadModel, "forward", run)


def started(fuse: Fuse | None = None, shard: Shard | None = None) -> int:
    """Sweep in a process of its own, which is forked; its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        with pytest.MonkeyPatch.context() as patch:
            if fuse:
                fuse.install(patch)
            sweep(shard=shard)
            status = 0
    finally:
        os._exit(status)


def was_killed(child: int) -> bool:
    """Wait for a process of :func:`started`: whether its fuse blew (else it must have ended well)."""
    _, how = os.waitpid(child, 0)
    assert os.WIFSIGNALED(how) or os.WEXITSTATUS(how) == 0
    return os.WIFSIGNALED(how)
