"""A few hostile inputs of every area; ``make fuzz`` tries as many as there is time for."""

from __future__ import annotations

import pytest

pytest.importorskip("resource")  # not on Windows

from fuzz.more_areas import AREAS
from fuzz.running import Count, try_one


@pytest.mark.parametrize("area", AREAS)
def test_hostile_inputs_end_in_one_line(area: str) -> None:
    count = Count()
    for number in range(4):
        try_one(area, f"ci-{number}", count)
    assert count.tried == 4 and count.found == []
