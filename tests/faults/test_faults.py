"""A fault of each kind that is cheap; ``make faults`` injects as many as there is time for."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

pytest.importorskip("resource")  # not on Windows, which has no forks either

from faults.classes import CLASSES
from faults.works import prepared


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with prepared(evaluating=False):
        yield


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("killed: edit", 22),
        ("killed: stats", 3),
        ("damaged: kept runs", 84),
        ("damaged: cached second moments", 1),
        ("damaged: unfinished second moments", 1),
        ("another version", 3),
        ("full disk", 14),
    ],
)
def test_nothing_is_lost_or_silently_wrong_after_a_fault(name: str, seed: int) -> None:
    assert CLASSES[name](random.Random(seed)) == []
