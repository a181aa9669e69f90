"""A function of one tensor recorded as a CUDA graph: a step of a search launches thousands of small kernels.

What is recorded is compared with what the function gave when it was called, and not used if they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

#: Largest relative difference (2-norm) between a called and a replayed result.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
TOLERANCE_16_BITS = 5e-2

Run = Callable[[Tensor], tuple[Tensor, ...]]


def recorded(run: Run, given: Tensor, expected: Sequence[Tensor], dtype: torch.dtype) -> Run | None:
    """Replays of ``run``, or None if it cannot be recorded.

    Args:
        run: made of CUDA operations on fixed shapes, none of which looks at a value. What it reads beside its
            argument must stay where it is for as long as the result is used.
        given: an argument it was called with. expected: what it returned. dtype: of its arithmetic.

    Returns:
        A function like ``run`` whose results are overwritten by its next call.
    """
    argument = given.detach().clone()
    graph = torch.cuda.CUDAGraph()
    stream = _stream(given.device)
    stream.wait_stream(torch.cuda.current_stream(given.device))
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                results = run(argument)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(given.device).wait_stream(stream)
        graph.replay()
        off = max(_difference(found, wanted) for found, wanted in zip(results, expected, strict=True))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        log.info("a search step cannot be recorded (%s); it is called each time", str(error).splitlines()[:1])
        return None
    if not off <= TOLERANCE.get(dtype, TOLERANCE_16_BITS):
        log.info("a recorded search step differs by %.2g; it is called each time", off)
        return None

    def replay(value: Tensor) -> tuple[Tensor, ...]:
        argument.copy_(value)
        graph.replay()
        return results

    return replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))
