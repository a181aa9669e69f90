"""Temporary replacements of ``forward``: to skip blocks, to record return values, for a fused GELU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness_rect.compat.transformers import STEPWISE_GELU
from harness_rect.models.lm import EditableLM


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's ``forward`` within the block.

    Afterwards it has that of its class again, or the one that was set on the module (by accelerate).
    """
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def skipping(lm: EditableLM, count: int, entry: Any) -> Iterator[None]:
    """Let the first ``count`` blocks return ``entry``, a return value of the last of them, at once.

    Their hooks still run.
    """
    with ExitStack() as stack:
        for layer in range(count):
            stack.enter_context(forward_of(lm.block(layer), lambda *args, **kwargs: entry))
        yield


@contextmanager
def returned_by(block: nn.Module | None) -> Iterator[list[Any]]:
    """Record the return values of a block's forward, before hooks on the block change them."""
    found: list[Any] = []
    if block is None:
        yield found
        return
    run = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append(output := run(*args, **kwargs))
        return output

    with forward_of(block, forward):
        yield found


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The return value of a block with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def fused_gelu(model: nn.Module) -> Iterator[None]:
    """Compute GELU's tanh approximation by one kernel, which keeps one tensor for the backward pass.

    transformers computes it in nine operations for GPT-2, GPT-J, Phi and others. The results differ by
    rounding, so it is replaced in 32 and 64 bits only.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) in STEPWISE_GELU:
                stack.enter_context(forward_of(module, partial(_gelu, module.forward)))
        yield


def _gelu(stepwise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return nn.functional.gelu(x, approximate="tanh")
    return stepwise(x)
