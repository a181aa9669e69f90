"""Runs hostile inputs, and counts what must not happen."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.areas import Run
from fuzz.more_areas import AREAS

#: Seconds of computing and of waiting after which an input hangs, and bytes of memory that it may add.
HANG, WAIT, MEMORY = 20, 180, 6 * 2**30


@dataclass
class Count:
    """Of one area. found: (seed, what happened) of each defect."""

    tried: int = 0
    tracebacks: int = 0
    wrong: int = 0
    hangs: int = 0
    found: list[tuple[str, str]] = field(default_factory=list)


class _Hang(BaseException):
    pass


def try_one(area: str, seed: str, count: Count) -> None:
    """One input. Right is 0 without an error, or 2 with one line, and that nothing but ``out`` is written.

    A file of the system that cannot be read, such as /proc/self/mem, is a failure on the way: 1.
    """
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    said, before = io.StringIO(), os.getcwd()
    count.tried += 1
    status: object = None
    try:
        os.chdir(folder)
        (folder / "out").mkdir()
        run = AREAS[area](random.Random(seed), folder)
        there = _files(folder)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), _limited():
            status = _status(run)
    except _Hang as error:
        count.hangs += 1
        count.found.append((seed, f"hangs: {''.join(traceback.format_exception(error)[-4:])}"))
        return
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said.write("".join(traceback.format_exception(error)))
    finally:
        os.chdir(before)
        left = _files(folder) - there if status is not None else set()
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
    text = said.getvalue()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    if "Traceback" in text:
        count.tracebacks += 1
        count.found.append((seed, "\n".join(text.splitlines()[-12:])))
    elif (status, len(lines)) not in ((0, 0), (1 if os.strerror(errno.EIO) in text else 2, 1)) or left:
        count.wrong += 1
        count.found.append((seed, f"status {status}, {len(lines)} lines, left {left}: {text[-600:]}"))


def _files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if folder / "out" not in (path, *path.parents)}


def _status(run: Run) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run()
        except SystemExit as end:
            return end.code or 0


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Time and memory are limited within the block."""

    def hang(*arguments: Any) -> None:
        raise _Hang

    signals = (signal.SIGALRM, signal.SIGPROF)
    old = [signal.signal(one, hang) for one in signals]
    signal.alarm(WAIT)
    signal.setitimer(signal.ITIMER_PROF, HANG)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for one, handler in zip(signals, old, strict=True):
            signal.signal(one, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def table(counts: Mapping[str, Count]) -> str:
    lines = [f"{'area':<18}{'tried':>8}{'tracebacks':>12}{'wrong':>8}{'hangs':>8}"]
    total = Count()
    for area, count in counts.items():
        lines.append(f"{area:<18}{count.tried:>8}{count.tracebacks:>12}{count.wrong:>8}{count.hangs:>8}")
        for name in ("tried", "tracebacks", "wrong", "hangs"):
            setattr(total, name, getattr(total, name) + getattr(count, name))
    lines.append(f"{'all':<18}{total.tried:>8}{total.tracebacks:>12}{total.wrong:>8}{total.hangs:>8}")
    return "\n".join(lines)
