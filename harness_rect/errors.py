"""The one exception for what a user can do wrong, and how it reaches them.

Library code raises :class:`UserError` with a single line that names the row, key or file, what was
expected and what to do. The commands print that line and exit with status 2; from Python it is an
ordinary ``ValueError``.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What was asked cannot be done; ``str(error)`` is one line for the user."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, None if none is at least ``cutoff`` (0 to 1) like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` where a known name is close, else ``expected one of`` and all known names."""
    names = list(known)
    close = closest(name, names)
    return f"did you mean {close!r}?" if close else f"expected one of {', '.join(names)}"


def _inside_lm_eval_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name in {"lm_eval.__main__", "lm_eval"}:
        return True
    return os.path.basename(sys.argv[0] or "") in {"lm_eval", "lm-eval", "lm_eval.exe", "lm-eval.exe"}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and exit status 2 under the ``lm_eval`` command.

    lm-eval has no error handling of its own, so a user's typo would end in a page of traceback.
    Called from Python (``simple_evaluate``, a notebook), the exception passes through unchanged.
    """
    try:
        yield
    except UserError as error:
        if not _inside_lm_eval_command():
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
