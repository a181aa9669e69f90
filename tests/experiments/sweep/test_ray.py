"""A sweep in workers of a Ray that is started here; skipped without Ray (`make test-ray` installs it)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import psutil
import pytest
from support.small_sweep import files, sweep

from harness_rect.errors import UserError
from harness_rect.experiments.sweep import ray_workers
from harness_rect.experiments.sweep.ray_workers import Resources

pytest.importorskip("ray")
#: Workers that are killed, and before how many sayings of workers the last one is; each loss makes for more.
KILLS = int(os.environ.get("KILLS", "2"))
LAST = 26 + 2 * KILLS


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::_RayWo"):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def test_killed_workers_make_no_difference(
    undisturbed: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    chosen = random.Random(7)
    moments = chosen.sample(range(1, LAST), KILLS)
    killed, said = [], 0
    take = ray_workers._Driver._read_inbox

    def watched(driver: ray_workers._Driver) -> None:
        nonlocal said
        changed = driver.changed

        def counted(*what) -> None:
            nonlocal said
            said += 1
            changed(*what)
            if said in moments and (alive := workers()):
                killed.append(chosen.choice(alive))
                killed[-1].kill()

        driver.changed = counted
        take(driver)
        driver.changed = changed

    monkeypatch.setattr(ray_workers._Driver, "_read_inbox", watched)
    sweep(ray=Resources())
    assert len(killed) == KILLS
    assert files(here / "out") == files(undisturbed)


def test_what_no_node_has_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(UserError, match=r"no node of the Ray cluster has .*num_gpus 3"):
        sweep(ray=Resources(gpus=3))
