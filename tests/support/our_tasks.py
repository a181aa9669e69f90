"""lm-eval without its own tasks: reading their thousands of files takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest


def without_lm_evals_tasks(patch: pytest.MonkeyPatch, empty: Path) -> None:
    """Let TaskManager look for the tasks of lm-eval in the folder ``empty``; ours are found as always."""
    from lm_eval.tasks import manager

    patch.setattr(manager, "__file__", str(empty / "manager.py"))
