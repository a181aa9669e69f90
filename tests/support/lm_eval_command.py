"""``python -m lm_eval`` as a process of its own, with our package found as an installed one would be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Without lm-eval's own tasks, as in support.our_tasks.
COMMAND = """
import runpy, sys
from lm_eval.tasks import manager
manager.__file__ = "empty/manager.py"
runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
"""


def lm_eval_command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run in ``tmp_path``, for at most three minutes."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text("import harness_rect._autoload\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
