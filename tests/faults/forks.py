"""Commands run in forks of this process, which has torch loaded already, and what can go wrong in one.

A fault is a function that the fork calls before the command: it sets a limit, gives up rights, or lays a fuse
that burns with each access to a file in the current folder and with each forward pass of the model.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import itertools
import logging
import mmap
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from harness_rect import cli

Fault = Callable[[], None]
#: Seconds of computing, and of waiting, after which a command hangs.
HANG, WAIT = 20, 300
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.utime", "shutil.rmtree")


@dataclass(frozen=True)
class Ended:
    """status: its exit status, or minus the signal that ended it. said: all that it printed."""

    status: int
    said: str

    @property
    def problem(self) -> str:
        """What a command must never do, whatever happened to it; empty if it did not."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        if self.status in (-signal.SIGPROF, -signal.SIGALRM):
            return "hangs"
        if "Traceback" in self.said or "Exception ignored" in self.said:
            return "traceback"
        # Python ends by SIGINT itself where Ctrl-C comes after all is done; a shell shows it as 130, too.
        if self.status not in (0, 1, 2, 130, -signal.SIGINT, -signal.SIGKILL, -signal.SIGTERM):
            return f"status {self.status}"
        if self.status in (1, 2) and len(lines) != 1:
            return f"status {self.status} with {len(lines)} lines"
        return ""


class Fork:
    """A command that runs in a fork, in a folder."""

    def __init__(self, folder: Path, command: Sequence[str], fault: Fault | None = None) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        reading, writing = os.pipe()
        gc.disable()  # a fork that collects would run finalizers of this process
        if not (pid := os.fork()):
            os.close(reading)
            status = 1
            try:
                status = _in_fork(folder, command, fault, writing)
            finally:
                os._exit(status)
        gc.enable()
        os.close(writing)
        self.pid, self._reading = pid, reading

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        with open(self._reading, encoding="utf-8", errors="replace") as said:
            text = said.read()
        _, how = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(how), text)


def run(folder: Path, command: Sequence[str], fault: Fault | None = None) -> Ended:
    return Fork(folder, command, fault).wait()


def _in_fork(folder: Path, command: Sequence[str], fault: Fault | None, writing: int) -> int:
    os.chdir(folder)
    os.environ["HARNESS_RECT_CACHE"] = "disk/user"
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    logging.root.handlers.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(WAIT)
    signal.setitimer(signal.ITIMER_PROF, HANG)
    program, *arguments = command
    sys.argv = [program, *arguments]
    atexit._clear()  # what the process that forked is to do at its end
    status = 1
    try:
        if fault is not None:
            fault()
        status = cli.main(arguments) if program == "harness-rect" else _lm_eval()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            status = int(end.code or 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return status


def _lm_eval() -> int:
    from lm_eval.__main__ import cli_evaluate

    logging.getLogger("lm_eval").handlers[:] = [logging.StreamHandler()]
    logging.getLogger("harness_rect").handlers.clear()
    cli_evaluate()
    return 0


# -- faults -------------------------------------------------------------------------------------------------


def fuse(moment: int, blow: Callable[[], None], count: mmap.mmap | None = None) -> Fault:
    """Call ``blow`` at the ``moment``-th event, from 1.

    Args:
        count: gets the number of events so far, in decimal digits.
    """

    def lay() -> None:
        here, forward, seen = os.getcwd(), transformers.GPT2LMHeadModel.forward, itertools.count(1)

        def burn() -> None:
            if (number := next(seen)) == moment:
                blow()
            if count is not None:
                count[:8] = b"%8d" % number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            named = event in _EVENTS and isinstance(arguments[0], str | bytes | os.PathLike)
            if named and os.path.abspath(os.fsdecode(arguments[0])).startswith(here):
                burn()

        def run_and_burn(*arguments: Any, **more: Any) -> Any:
            burn()
            return forward(*arguments, **more)

        transformers.GPT2LMHeadModel.forward = run_and_burn
        sys.addaudithook(hook)

    return lay


def signalled(number: int) -> Callable[[], None]:
    """What a fuse does that sends a signal to its own process."""
    return lambda: os.kill(os.getpid(), number)


def deleted(folder: str) -> Callable[[], None]:
    """What a fuse does that removes a folder, as another process would."""

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    return remove


def file_size(most: int) -> Fault:
    """No file may grow beyond so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def without_rights() -> None:
    """Let the permissions of files bind the superuser, too: give up two capabilities of Linux."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the format, this process
        data = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
        libc.capget(header, data)
        for index in (0, 1):
            data[index] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.capset(header, data)
