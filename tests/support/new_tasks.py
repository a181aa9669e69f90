"""An entry of the catalogue for rect_drift, for as long as it does not have one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness_rect.evaluation.catalogue import TASKS, Metric, Task

_LOWER = Metric("", "", higher_is_better=False, share=False, protocol="probability")
_DRIFT = Task(
    "rect_drift",
    "Drift",
    (
        replace(_LOWER, name="kl", retained=False),
        replace(_LOWER, name="perplexity"),
        replace(_LOWER, name="argmax_changed", share=True, retained=False),
    ),
    group="rect_beyond",
    file="drift.txt",
    repeats_headline=False,
)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    if _DRIFT.name not in TASKS:
        monkeypatch.setitem(TASKS, _DRIFT.name, _DRIFT)
