"""The ``harness-rect`` command.

Exit status 0: done; 1: it failed on the way; 2: what was asked is wrong; 130: interrupted. Each but the first
comes with one line on stderr (:mod:`harness_rect.errors`). Each command is a module of this package with
``add_options(parser)`` and ``run(arguments)``; only the one named is imported.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

from harness_rect.errors import Terminated, UserError, tell

TYPE_CHECKING = False  # importing typing and pathlib takes half as long as all else here
if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn

COMMANDS = {
    "demo": "what editing costs a small model and what RECT saves, in two minutes",
    "doctor": "what is found on this machine, and the smallest end-to-end run",
    "edit": "edit a model and write it as a Hugging Face checkpoint",
    "sweep": "run a whole experiment, resumable (see docs/sweep.md)",
    "stats": "compute second moments from text, in the public npz layout",
    "compare": "evaluations side by side, with intervals and p-values",
    "train-mend": "train the networks that method mend edits with",
    "replay": "put a kept edit run onto its base model again, without any search",
    "export": "write a kept edit run as a checkpoint, a LoRA adapter or a checkpoint of differences",
    "cache": "list, show, verify, prune or clear kept edit runs",
    "rerun": "repeat the evaluation of a results file, and compare",
    "report": "one self-contained HTML page from a folder of results",
}

#: Commands that show their own progress; lm-eval would show a bar for each task of each evaluation.
OWN_PROGRESS = {"demo", "sweep"}

#: The options of each command as ``python -m tools.docs_tables`` writes them, for ``--help``: importing the
#: command itself takes seconds.
HELP = os.path.join(os.path.dirname(__file__), "help.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own); returns the exit status."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    ours = in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except (Exception, KeyboardInterrupt) as error:
        status = tell(error)
        if isinstance(error, Terminated):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)  # so that whoever sent it sees that it was obeyed
        return status
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(argv: Sequence[str]) -> int:
    _make_surroundings_usable()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if OWN_PROGRESS & {*argv[:1]}:
        # tqdm reads it when it is imported, by the command's module.
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "transformers", "datasets", "absl", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    _check_current_folder()
    arguments = make_parser(argv).parse_args(argv)
    status = arguments.run(arguments) or 0
    sys.stdout.flush()
    return int(status)


def _terminated(number: int, frame: object) -> NoReturn:
    """Clean up as after Ctrl-C, once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _make_surroundings_usable() -> None:
    """Standard output or error may be closed, as under some daemons, and a terminal 0 columns wide."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # It also takes the number, which a file would get.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if not os.environ.get("COLUMNS", "80").strip("0"):
        del os.environ["COLUMNS"]


def _check_current_folder() -> None:
    """Refuse one that was removed: no relative path has a meaning there, and MKL ends the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was removed; change to another one") from None


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """``--version``; the version is looked up only when it is asked for, which takes a while."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show program's version number and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import harness_rect

        print(harness_rect.__version__)
        parser.exit()


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of the one that ``argv`` names."""
    parser = _Parser(prog="harness-rect", description="Edit language models; measure the harm.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        if name not in argv:
            continue
        if {"-h", "--help"} & set(argv) and not _other_packages():
            import json

            with open(HELP, encoding="utf-8") as lines:
                for of, flags, settings in map(json.loads, lines):
                    if of == name:
                        command.add_argument(*flags, **settings)
        else:
            module = module_of(name)
            module.add_options(command)
            command.set_defaults(run=module.run)
    return parser


def path_argument(text: str) -> Path:
    """A path that an option gives, with ``~`` and ``~user`` replaced."""
    from pathlib import Path

    from harness_rect.io.files import expanded

    try:
        return Path(expanded(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def module_of(command: str) -> ModuleType:
    return importlib.import_module(f"harness_rect.cli.{command.replace('-', '_')}")


def _other_packages() -> bool:
    """Whether another package may add methods, or regularizers with options of their own."""
    from importlib.metadata import entry_points

    return any(entry_points(group=f"harness_rect.{kind}") for kind in ("methods", "regularizers"))
