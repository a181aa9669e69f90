"""``python -m lm_eval`` as a process of its own, with our package found as an installed one would be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Without lm-eval's own tasks, as in support.our_tasks; what starts other processes need not import it.
SITE = """
import os, sys
import harness_rect._autoload
if "RANK" in os.environ or "lm_eval" in sys.orig_argv[:3]:
    from lm_eval.tasks import manager
    manager.__file__ = "empty/manager.py"
"""
#: Two processes. On a CPU ``accelerate launch`` starts one, however many are asked for. Without an address
#: they look for each other by the name of the machine, which need not resolve.
LAUNCH = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2", "-m")


def lm_eval_command(
    tmp_path: Path, *arguments: str, launch: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m *launch lm_eval *arguments`` in ``tmp_path``, for at most five minutes."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", *launch, "lm_eval", *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
