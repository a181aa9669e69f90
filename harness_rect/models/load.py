"""One-line errors for models that cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from harness_rect.errors import Failed, UserError, on_the_way


def check_device(device: object, what: str) -> None:
    """Refuse a device that is not there; None leaves the choice to others.

    Args:
        what: the argument, for the message: ``device=cuda``.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=torch.device(str(device)))
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{what}: cannot be used here: {reason}") from None


@contextmanager
def load_errors(what: str) -> Iterator[None]:
    """Turn what lm-eval and transformers raise for what they cannot load into a :class:`UserError`.

    Whatever they raise: they look arguments up as attributes, assert, and import what is asked for. A full
    disk and the like become a :class:`Failed`; too little memory and Ctrl-C pass as they are.

    Args:
        what: the argument that names it, for the message: ``pretrained=gpt3-xl``.
    """
    try:
        yield
    except Exception as error:
        of_files = isinstance(error, OSError | SafetensorError)
        failed = on_the_way(error)
        if isinstance(error, UserError) or (failed and not of_files):
            raise
        text = str(error).strip()
        if isinstance(error, TypeError) and "unexpected keyword argument" in text:
            name = text.rpartition("argument ")[2]
            raise UserError(
                f"{what}: there is no argument {name}; see docs/reference/arguments.md"
            ) from error
        first = text.splitlines()[0] if text else ""
        if not (of_files or isinstance(error, ValueError)) or not first:
            first = f"{type(error).__name__}{': ' if first else ''}{first}"
        raise (Failed if failed else UserError)(f"{what}: cannot be loaded: {first}") from error
