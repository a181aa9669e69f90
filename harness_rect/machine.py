"""What computes, as far as the last bits of a result depend on it."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

import torch


def computed_on(device: torch.device) -> dict[str, str | int]:
    """The kind of device, the number of threads, and the name of the processor, or of the GPU.

    Sums are split over the threads, and processors of other kinds add and round in other ways.
    """
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {"device": device.type, "threads": torch.get_num_threads(), "processor": processor}


@cache
def _cpu() -> str:
    """The name and the instructions that torch uses, such as "AMD EPYC 7763 (AVX2)"."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except (OSError, ValueError):  # not Linux
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
