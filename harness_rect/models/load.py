"""One-line errors for models that cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from harness_rect.errors import UserError


@contextmanager
def load_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or damaged checkpoint into a :class:`UserError`.

    Args:
        what: the argument that names it, for the message: ``pretrained=gpt3-xl``.
    """
    try:
        yield
    except UserError:
        raise
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        name = str(error).rpartition("argument ")[2]
        raise UserError(
            f"{what}: there is no argument {name}; see the table of arguments in the README"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"{what}: cannot be loaded: {lines[0] if lines else type(error).__name__}") from None
