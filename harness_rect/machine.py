"""What computes, as far as the last bits of a result depend on it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch


def computed_on(device: torch.device) -> dict[str, str | int]:
    """Kind of device, number of threads, name of the processor or GPU, and a precision that was set.

    Sums are split over the threads, and processors of other kinds add and round in other ways.
    """
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    precision = torch.get_float32_matmul_precision()
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processor": processor,
        **({} if precision == "highest" else {"float32_matmul_precision": precision}),
    }


@contextmanager
def as_loaded(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes of the model, not in those of autocast; new tensors are float32 on the CPU."""
    dtype = torch.get_default_dtype()
    # A default device is looked at in every call of torch, so none is set where there is none.
    elsewhere = torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False), torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


@cache
def _cpu() -> str:
    """The name and the instructions that torch uses, such as "AMD EPYC 7763 (AVX2)"."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except (OSError, ValueError):  # not Linux
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
