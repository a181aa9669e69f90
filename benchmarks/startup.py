"""What harness-rect adds to every start of the Python interpreter. Run: python benchmarks/startup.py [runs]

Makes temporary virtual environments that differ only in our files, starts them alternately and compares
medians: without the import hook, with it, with it disabled, and with it where no bytecode can be kept (a
read-only installation, PYTHONDONTWRITEBYTECODE), so that every start compiles our source again. Then the same
for the first import of lm_eval, where the hook does its work, with a minimal package in place of lm-eval.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MS = 2.0


LM_EVAL = {  # the parts of lm-eval that the hook uses
    "__init__.py": "",
    "api/__init__.py": "",
    "api/registry.py": (
        "import importlib.metadata\nclass R(dict):\n    def register(self, n, target): self[n] = target\n"
        "model_registry = R()\n"
    ),
    "models/__init__.py": "import lm_eval.api.registry\n",
    "tasks/__init__.py": "import lm_eval.tasks.manager\n",
    "tasks/manager.py": (
        "import inspect, functools\nclass TaskManager:\n"
        "    def __init__(self, include_path=None, include_defaults=True): pass\n"
    ),
}


def make_environment(folder: Path, hook: bool) -> Path:
    """An environment, with the files that our wheel installs if ``hook``; returns its interpreter."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name, text in LM_EVAL.items():
        file = site / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if hook:
        (site / "harness_rect" / "tasks").mkdir(parents=True)
        for file in ROOT.glob("harness_rect/*.py"):
            shutil.copy(file, site / "harness_rect")
        shutil.copy(ROOT / "harness_rect_autoload.pth", site)
    return folder / "bin" / "python"


def start_ms(python: Path, code: str, extra: dict[str, str]) -> float:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | extra
    begin = time.perf_counter()
    subprocess.run([python, "-c", code], env=environment, check=True)
    return (time.perf_counter() - begin) * 1000


def main(runs: int) -> int:
    use = "import lm_eval.models, lm_eval.tasks"
    with tempfile.TemporaryDirectory() as scratch:
        bare = make_environment(Path(scratch, "bare"), hook=False)
        hook = make_environment(Path(scratch, "hook"), hook=True)
        raw = make_environment(Path(scratch, "raw"), hook=True)
        no_bytecode = {"PYTHONDONTWRITEBYTECODE": "1"}
        cases: dict[str, tuple[Path, str, dict[str, str]]] = {
            "bare": (bare, "pass", {}),
            "hook": (hook, "pass", {}),
            "hook, HARNESS_RECT_AUTOLOAD=0": (hook, "pass", {"HARNESS_RECT_AUTOLOAD": "0"}),
            "hook, no bytecode": (raw, "pass", no_bytecode),
            "bare, import lm_eval": (bare, use, {}),
            "hook, import lm_eval": (hook, use, {}),
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        check = (
            "import sys; sys.exit('HarnessRect' not in [getattr(f, '__name__', '') for f in sys.meta_path])"
        )
        start_ms(hook, check, {})  # raises if the hook is not installed
        order = list(cases.items())
        shuffle = random.Random(0).shuffle  # a start is affected by the one before it
        for run in range(
            runs + 5
        ):  # interleaved, so that other load affects all; the first five are not counted
            shuffle(order)
            for name, case in order:
                took = start_ms(*case)
                if run >= 5:
                    times[name].append(took)
        importtime = [str(hook), "-X", "importtime", "-c", use]
        report = subprocess.run(importtime, capture_output=True, text=True, check=True).stderr

    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"Python {sys.version.split()[0]}, {runs} interleaved starts of each, medians:")
    for name, median in medians.items():
        base = medians["bare, import lm_eval" if "lm_eval" in name else "bare"]
        print(f"  {name:30s} {median:7.2f} ms  {median - base:+6.2f} ms  x{median / base:.3f}")
    print("Our modules in -X importtime on import of lm_eval (us self | us cumulative | module):")
    print("\n".join("  " + row.partition(":")[2] for row in report.splitlines() if "harness_rect" in row))
    cost = max(medians[name] for name in ("hook", "hook, no bytecode")) - medians["bare"]
    verdict = "under" if cost < LIMIT_MS else "OVER"
    print(f"Interpreter start: {cost:+.2f} ms, {verdict} the limit of {LIMIT_MS} ms")
    return int(cost >= LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
