"""What can go wrong, and the one boundary at which it becomes a line for the user.

Library code raises :class:`UserError` with a single line that names the row, key or file, what was expected
and what to do; from Python it is an ordinary ``ValueError``. The ``harness-rect`` commands, and under the
``lm_eval`` command the model class and the tasks, print that line and exit with its status
(:func:`tell`): 2 for what was asked wrongly, 1 for what failed on the way, 130 for Ctrl-C. Errors of the
system and of file formats that reach the boundary as they are become a line as well; anything else is a bug
and keeps its traceback. ``HARNESS_RECT_DEBUG=1`` shows every traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType


class UserError(ValueError):
    """What was asked cannot be done; ``str(error)`` is one line for the user."""

    status = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it before it kills; what a command has begun is cleaned up."""


class Failed(UserError):
    """What was asked is right, and failed on the way: a full disk, too little memory, no connection."""

    status = 1


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, None if none is at least ``cutoff`` (0 to 1) like it."""
    import difflib  # not for the commands that never need it

    # Longer ones are no misspelling, and comparing them takes quadratic time.
    return next(iter(difflib.get_close_matches(name[:100], list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` where a known name is close, else ``expected one of`` and all known names."""
    names = list(known)
    close = closest(name, names)
    return f"did you mean {close!r}?" if close else f"expected one of {', '.join(names)}"


# --------------------------------------------------------------------------------------------- the boundary

INTERRUPTED = 130
#: The longest line that is printed; a file can hold a key of any length.
LONGEST = 2000
#: Failures of the machine; any other error of the system means that a name was wrong.
_ON_THE_WAY = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENOMEM", "EPIPE", "EBADF", "EINTR"),
        *("EAGAIN", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTUNREACH", "ENETUNREACH"),
        *("ESTALE", "EBUSY", "ETXTBSY"),
    )
    if hasattr(errno, name)
}
#: Errors of file formats, by the names of their classes: their packages are not imported here.
_FORMATS = {
    "YAMLError": "not valid YAML",
    "SafetensorError": "not a safetensors file",
    "BadZipFile": "not a zip file",
    "JSONDecodeError": "not JSON",
}
_BUG = (
    "this is a bug of harness-rect: please report it with the lines above and the command"
    " (SECURITY.md says how, if it could be abused)"
)


def described(error: BaseException) -> tuple[int, str] | None:
    """The exit status and the line of an error that can be foreseen; None for a bug."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; what was saved is used when the same command is given again"
    if isinstance(error, UnicodeError):
        return 2, f"text that is not valid UTF-8: {text}"
    if isinstance(error, OSError):
        return _of_system(error, text)
    if isinstance(error, RecursionError):
        return 2, "a file is nested too deeply to be read"
    out_of_memory = isinstance(error, MemoryError) or "OutOfMemoryError" in kinds
    if out_of_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return 1, f"not enough memory{': ' if text else ''}{text}"
    if "SafetensorError" in kinds and "os error" in text:
        return 1, text
    for name in kinds & _FORMATS.keys():
        return 2, f"{_FORMATS[name]}: {text}"
    if isinstance(error, zlib.error):
        return 2, f"damaged compressed data: {text}"
    # Ctrl-C in an import: Python 3.11 and transformers wrap it in a RuntimeError.
    cause = error.__cause__ or error.__context__
    return described(cause) if cause is not None and _interrupted(cause) else None


def on_the_way(error: BaseException) -> bool:
    """Whether the machine failed, or Ctrl-C came, and nothing was asked wrongly.

    Packages raise an OSError without a number for whatever they do not find.
    """
    if isinstance(error, OSError):
        return error.errno in _ON_THE_WAY
    found = described(error)
    return found is not None and found[0] != UserError.status


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error came of Ctrl-C."""
    for _ in range(20):  # a chain of causes may be a circle
        if error is None or isinstance(error, KeyboardInterrupt):
            break
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


def _of_system(error: OSError, text: str) -> tuple[int, str]:
    status = 1 if error.errno is None or on_the_way(error) else 2
    name = error.filename if error.filename2 is None else error.filename2
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if not isinstance(name, str):  # a number is that of an open file
        return status, error.strerror or text or type(error).__name__
    return status, f"{name}: {error.strerror or text}"


def tell(error: BaseException) -> int:
    """Print an error as one line on stderr, a bug with its traceback; returns the exit status."""
    found = described(error)
    if found is None or os.environ.get("HARNESS_RECT_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    if found is None:
        print(f"error: {_BUG}", file=sys.stderr)
        return 1
    status, line = found
    if sys.stderr is None:  # closed
        return status
    unnamed = isinstance(error, OSError) and error.filename is None
    if (reason := _unwritten("\n" if unnamed else "")) and unnamed:
        status, line = 1, f"standard output: {reason}"
    print(line if status == INTERRUPTED else f"error: {one_line(line)}", file=sys.stderr)
    return status


def one_line(text: str) -> str:
    """A text without line breaks and other control characters, and not longer than :data:`LONGEST`."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: found[0].encode("unicode_escape").decode(), text
    )


def _unwritten(text: str) -> str | None:
    """Why standard output does not take a text, None if it does; what is left is then given up.

    Python would try to write the rest once more when it ends, and print a traceback.
    """
    try:
        print(end=text, flush=True)
    except (OSError, ValueError) as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        return getattr(error, "strerror", None) or str(error)
    return None


def inside_lm_eval_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name in {"lm_eval.__main__", "lm_eval"}:
        return True
    return os.path.basename(sys.argv[0] or "") in {"lm_eval", "lm-eval", "lm_eval.exe", "lm-eval.exe"}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """The boundary of what the ``lm_eval`` command calls: see :func:`tell`.

    lm-eval has no error handling of its own, so a user's typo would end in a page of traceback.
    Called from Python (``simple_evaluate``, a notebook), exceptions pass through unchanged.
    """
    if not inside_lm_eval_command():
        yield
        return
    sys.excepthook = _last_resort
    try:
        yield
    except Exception as error:
        raise SystemExit(tell(error)) from None


def _last_resort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What ``lm_eval`` ends with where no block above is entered: during its own loops over the requests."""
    if isinstance(error, UserError | KeyboardInterrupt):
        raise SystemExit(tell(error))
    sys.__excepthook__(kind, error, trace)
