"""A folder of results files, and what fills it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.report_files import writer


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder that ``add`` writes to."""
    return tmp_path / "runs"


@pytest.fixture
def add(runs: Path) -> Callable[..., Path]:
    """See ``report_files.writer``."""
    return writer(runs)
