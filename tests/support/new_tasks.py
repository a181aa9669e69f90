"""Entries of the catalogue for tasks beyond teacher forcing, for as long as it does not have them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness_rect.evaluation.catalogue import TASKS, Metric, Protocol, Task


def _editing(name: str, *metrics: Metric, protocol: Protocol = "generated") -> Task:
    entries = tuple(replace(metric, protocol=protocol) for metric in metrics)
    return Task(name, name, entries, kind="editing", group="rect_beyond", repeats_headline=False)


def _shares(*names: str) -> list[Metric]:
    return [Metric(name, name) for name in names]


def _portability() -> Task:
    task = _editing("rect_portability", *_shares("portability", "reasoning"), protocol="teacher-forced")
    generated = (replace(m, name=f"{m.name}_gen", protocol="generated") for m in task.metrics)
    return replace(task, metrics=(*task.metrics, *generated))


_ENTRIES = (
    _editing("rect_autoregressive", *_shares("reliability", "generalization", "locality", "stopped")),
    _portability(),
    _editing("rect_ripple", *_shares("ripple", "logical_generalization")),
    _editing("rect_multihop", *_shares("multihop_acc", "hop_acc")),
    _editing("rect_fluency", Metric("ngram_entropy", "bits", share=False), *_shares("consistency")),
    _editing(
        "rect_drift",
        Metric("kl", "nats", higher_is_better=False, share=False, retained=False),
        Metric("perplexity", "perplexity", higher_is_better=False, share=False),
        Metric("argmax_changed", "share of positions", higher_is_better=False, retained=False),
        protocol="probability",
    ),
)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in _ENTRIES:
        if task.name not in TASKS:
            monkeypatch.setitem(TASKS, task.name, task)
