"""Parts of a sweep in several processes: the files of one process, whoever was killed, and no two at odds."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from filelock import FileLock
from support.small_sweep import Fuse, files, started, sweep, was_killed

from harness_rect.errors import UserError
from harness_rect.experiments.sweep import folder, runner, work
from harness_rect.experiments.sweep.plan import Shard


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_shards_at_the_same_time_make_the_files_of_one_process(undisturbed: Path, here: Path) -> None:
    parts = [Shard(i, 3) for i in (1, 2, 3)]
    fuse = Fuse("pass", 60, random.Random(3))
    at_once = [started(fuse if part.index == 2 else None, part) for part in parts]
    assert [was_killed(child) for child in at_once] == [False, True, False]
    assert 0 < len(list(Path("out").rglob("results.json"))) < 9
    assert not was_killed(started(shard=parts[1]))
    assert files(here / "out") == files(undisturbed)


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        (
            ".shard-1-of-2.lock",
            None,
            "shard 1/2 is running in this folder; wait for it before you run the whole",
        ),
        (".shard-1-of-2.lock", Shard(1, 3), "shard 1/2 is running .* before you run shard 1/3"),
        (".shard-1-of-2.lock", Shard(1, 2), "shard 1/2 is running in this folder$"),
        (".lock", Shard(1, 2), "another sweep is running in this folder"),
    ],
)
def test_parts_that_would_overlap_are_refused(here, held, asked, message, monkeypatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0)
    left = Path("out/.states/.abc.7.tmp")
    left.mkdir(parents=True)
    with FileLock(f"out/{held}"), pytest.raises(UserError, match=message):
        sweep(shard=asked)
    assert left.exists()


def test_a_shard_without_work_loads_no_model(here, monkeypatch, capsys) -> None:
    monkeypatch.setattr(work, "load_model", None)
    sweep(shard=Shard(6, 6))
    assert "0 of 9 evaluations are done" in capsys.readouterr().out


@pytest.mark.parametrize("shard", [None, Shard(6, 6)])
def test_what_a_killed_sweep_was_removing_is_removed_by_the_next_one(here, shard, monkeypatch) -> None:
    left = Path("out/.states/.abc.7.tmp")
    (left / "inner").mkdir(parents=True)

    def work(*arguments: object) -> None:
        assert not left.exists()
        raise SystemExit

    monkeypatch.setattr(runner._Sweep, "run", work)
    with pytest.raises(SystemExit):
        sweep(shard=shard)
