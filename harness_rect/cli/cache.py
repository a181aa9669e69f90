"""``harness-rect cache``: what the cache of edit runs holds, whether it is whole, how to make it smaller."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harness_rect.cli.kept_runs import add_cache_option, cache_of
from harness_rect.errors import UserError
from harness_rect.io.cache import cache_folder, human, parse_size
from harness_rect.io.checksums import ASIDE, SUMS, Damaged, check_sums
from harness_rect.io.resume import verify_state
from harness_rect.io.rows import parse_json, read_text
from harness_rect.session.report import EditReport
from harness_rect.session.runs import REPORT, USELESS, EditCache, Entry, KeptRun


def add_options(parser: argparse.ArgumentParser) -> None:
    add_cache_option(parser)
    parser.add_argument(
        "action",
        choices=list(ACTIONS),
        help="list all runs; show one; verify checksums, of kept second moments too (exit status 1 if one is"
        " wrong); prune: remove what is damaged or left over, then what was not used for longest, down to"
        " --max-size; clear: all",
    )
    parser.add_argument("key", nargs="?", metavar="RUN", help="the beginning of a key, for show")
    parser.add_argument("--max-size", metavar="SIZE", help="for prune: 500MB, 10GB")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.key is None) == (arguments.action == "show"):
        expected = "expected a key" if arguments.key is None else "takes no key"
        raise UserError(f"cache {arguments.action}: {expected}")
    if (arguments.max_size is None) == (arguments.action == "prune"):
        expected = "expected --max-size, such as 10GB" if arguments.max_size is None else "has no --max-size"
        raise UserError(f"cache {arguments.action}: {expected}")
    return ACTIONS[arguments.action](cache_of(arguments), arguments)


def _list(cache: EditCache, arguments: argparse.Namespace) -> int:
    entries = cache.entries()
    rows = [("key", "", "model", "method", "regularizer", "edits", "size", "last used")]
    for entry in reversed(entries):
        described = _described(entry)
        rows.append((entry.key[:12], entry.kind, *described, human(entry.bytes), _day(entry.used)))
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))
    total = human(sum(entry.bytes for entry in entries))
    print(f"{len(entries)} entries in {cache.folder}, {total}")
    return 0


def _described(entry: Entry) -> tuple[str, str, str, str]:
    """Model, method, regularizer and number of edits of a run; what cannot be read is a question mark."""
    if entry.kind != "run":
        return "", "", "", ""
    path = entry.path / REPORT
    try:
        check_sums(entry.path, [REPORT])  # `verify` reads the other files, which may be large
        report = EditReport.read(parse_json(read_text(path), str(path)), str(path))
    except (Damaged, UserError, OSError):
        return "?", "?", "?", "?"
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None)
    regularizer = f"{report.regularizer} ({settings})" if settings else report.regularizer
    return report.model or "", report.method, regularizer, str(report.n_edits)


def _show(cache: EditCache, arguments: argparse.Namespace) -> int:
    folder = cache.find(arguments.key)
    try:
        run = _read(folder, folder.name)
    except Damaged as problem:
        raise UserError(f"{folder}: the kept edit run is damaged: {problem}") from None
    report, steps = run.report, run.history.steps
    how = [f"{name}={value}" for name, value in run.base.get("arguments", {}).items()]
    base = ", ".join([run.base["model"], *how, run.base["dtype"]])
    shown: dict[str, Any] = {
        "folder": folder,
        "key": run.key,
        "base model": f"{report.model} ({base})",
        "method": report.method,
        "hparams": report.hparams_origin,
        "regularizer": f"{report.regularizer} {report.settings or ''}".rstrip(),
        "edits": f"{report.n_edits} of {report.edits_spec}, {report.edit_batch_size} at a time",
        "edited weights": ", ".join(run.hashes),
        "steps": "too large to keep: the edited weights are" if steps is None else len(steps),
        "computed on": ", ".join(f"{name} {value}" for name, value in (report.computed_on or {}).items()),
        "at the end": ", ".join(f"{name} {value:.3g}" for name, value in report.at_the_end.items() if value),
        "flagged": ", ".join(f"{flag}: {len(ids)}" for flag, ids in report.flagged.items()) or "none",
    }
    for name, value in shown.items():
        print(f"{name + ':':16}{value}")
    return 0


def _verify(cache: EditCache, arguments: argparse.Namespace) -> int:
    from harness_rect.moments.layout import verify_moment  # imports transformers

    entries = [entry for entry in cache.entries() if entry.kind != "leftover"]
    moments = sorted(cache_folder("stats").glob("*/*.npz"))
    damaged = 0
    for path, check in [(entry.path, partial(_check, entry)) for entry in entries] + [
        (path, partial(verify_moment, path)) for path in moments
    ]:
        try:
            check()
        except (Damaged, UserError) as problem:
            damaged += 1
            print(f"damaged: {path}: {str(problem).removeprefix(f'{path}: ')}")
    what = f"{len(entries)} entries in {cache.folder}, {len(moments)} files of second moments"
    print(f"{what}: {damaged or 'none'} damaged")
    return 1 if damaged else 0


def _check(entry: Entry) -> None:
    """Raise Damaged if an entry is not what was written."""
    if entry.kind == "damaged":
        raise Damaged("set aside before" if ASIDE in entry.path.name else f"it has no {SUMS}")
    if entry.kind == "unfinished":
        verify_state(entry.path)
    else:
        _read(entry.path, entry.key)


def _read(folder: Path, key: str) -> KeptRun:
    """The run in a folder; raises Damaged if it is not whole, or of another key."""
    run = KeptRun.read(folder)
    if not run.key.startswith(key):
        raise Damaged("another run's")
    return run


def _prune(cache: EditCache, arguments: argparse.Namespace) -> int:
    limit = parse_size(arguments.max_size, f"--max-size {arguments.max_size}")
    return _say(cache.clear(lambda entry: entry.kind in USELESS) + cache.prune(limit))


def _clear(cache: EditCache, arguments: argparse.Namespace) -> int:
    gone = cache.clear()
    cache.remove_locks()
    return _say(gone)


def _say(gone: list[Entry]) -> int:
    print(f"removed {len(gone)} entries, {human(sum(entry.bytes for entry in gone))}")
    return 0


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


ACTIONS: dict[str, Callable[[EditCache, argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "prune": _prune,
    "clear": _clear,
}
