"""Replacing modules' forwards for a while: to skip blocks, to see what one returns, for a faster GELU."""

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
    """Give a module another forward; then what it had, its class's or (accelerate) one of its own."""
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
    """The first ``count`` blocks return ``entry``, what the last of them returned, without computing it.

    Hooks on them still run.
    """
    with ExitStack() as stack:
        for layer in range(count):
            stack.enter_context(forward_of(lm.block(layer), lambda *args, **kwargs: entry))
        yield


@contextmanager
def returned_by(block: nn.Module | None) -> Iterator[list[Any]]:
    """Collects what a block's forward returns, before any hook on the block sees it."""
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
    """What a block returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def fused_gelu(model: nn.Module) -> Iterator[None]:
    """GELU's tanh approximation runs as one kernel, which keeps one tensor for the backward pass.

    GPT-2, GPT-J, Phi and others write it out in nine operations. Equal within rounding, so in 32 and 64 bits
    only.
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
