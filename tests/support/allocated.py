"""What torch's CPU allocator holds while something runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_allocated(run: Callable[[], Any]) -> int:
    """Most bytes held at a time by tensors made in ``run``, by torch's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    held = most = 0
    for change in changes:
        held += change["args"]["Bytes"]
        most = max(most, held)
    return most
