"""The state of unfinished work: what comes back, and what is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness_rect.io import resume
from harness_rect.io.resume import Resumable


def test_a_state_comes_back_under_its_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    work = Resumable(path, "a")
    assert work.load() is None
    tensors = {"x": torch.arange(6.0, dtype=torch.float64).view(2, 3).T}
    work.save(tensors, {"done": 3})
    found = work.load()
    assert found is not None and found[1] == {"done": 3}
    assert torch.equal(found[0]["x"], tensors["x"]) and found[0]["x"].dtype == torch.float64
    assert Resumable(path, "b").load() is None
    work.finish()
    work.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "bit", "state", "folder"])
def test_a_damaged_state_is_set_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    work = Resumable(tmp_path / "state.safetensors", "a")
    work.save({"x": torch.ones(100)}, {"done": 1})
    whole = work.path.read_bytes()
    work.path.unlink()
    content = {"empty": b"", "text": b"nothing", "cut": whole[:100], "bit": whole[:-1] + b"\0"}
    if damage == "folder":
        work.path.mkdir()
    else:
        work.path.write_bytes(content.get(damage) or whole.replace(b"done", b"dome"))
    assert work.load() is None
    assert f"the saved state {work.path} is damaged" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors.damaged"]


def test_it_is_time_to_save_some_seconds_after_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    work = Resumable(tmp_path / "state", "a")
    assert not work.due
    now[0] += resume.SAVE_SECONDS + 1
    assert work.due
    work.save({}, {})
    assert not work.due
