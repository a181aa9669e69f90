"""The machine that figures were taken on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def describe(device: str) -> dict[str, Any]:
    """What stands beside the figures of a benchmark that ran on ``device``, cpu or cuda."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
