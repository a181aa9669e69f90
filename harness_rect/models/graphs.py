"""Steps of a search recorded as CUDA graphs, since launching thousands of small kernels one by one is slow.

The result of a recording is compared with that of the call, and the recording is not used if they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from harness_rect.models.lm import EditableLM

log = logging.getLogger(__name__)

#: Largest relative difference (2-norm) between a called and a replayed result.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
TOLERANCE_16_BITS = 5e-2

#: Steps with more tokens are not recorded: in them the time to launch kernels is negligible.
GRAPH_TOKENS = 2048

Run = Callable[[Tensor], tuple[Tensor, ...]]


def recorded_after_first_call(run: Run, lm: EditableLM, tokens: int) -> Run:
    """``run``, recorded at its first call; ``run`` itself where that is impossible or of no use.

    Args:
        run: as in :func:`recorded`. tokens: the number of tokens that the model processes in it.
    """
    devices = {parameter.device for parameter in lm.model.parameters()}
    if lm.input_device.type != "cuda" or len(devices) > 1 or tokens > GRAPH_TOKENS:
        return run
    replay: list[Run] = []

    def called(argument: Tensor) -> tuple[Tensor, ...]:
        if replay:
            return replay[0](argument)
        results = run(argument)
        replay.append(recorded(run, argument, results, next(lm.model.parameters()).dtype) or run)
        return results

    return called


def recorded(run: Run, given: Tensor, expected: Sequence[Tensor], dtype: torch.dtype) -> Run | None:
    """Replays of ``run``, or None if it cannot be recorded.

    Args:
        run: consists of CUDA operations on fixed shapes that do not depend on values. Tensors that it reads
            besides its argument must keep their memory for as long as the result is used.
        given: an argument it was called with. expected: its results. dtype: of its arithmetic.

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
