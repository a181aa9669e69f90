"""What the ``lm_eval`` command prints after its own tables: the general tasks before and after the edits.

Nothing is evaluated for it. The scores of the unedited model, and those after the same edits without the
regularizer, come from earlier results in the folder of ``--output_path`` or in one beside it, and from
:data:`KNOWN`; where there are none, the commands are named that make them.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from harness_rect import embedded
from harness_rect.config import declared_arguments, settings
from harness_rect.errors import UserError, inside_lm_eval_command
from harness_rect.experiments import results
from harness_rect.experiments.compare.differences import find_differences
from harness_rect.experiments.results import Results
from harness_rect.experiments.score_table import general_tasks, name_of, score_table
from harness_rect.io.progress import console
from harness_rect.session.report import EditReport

#: Results files of the embedded models, without what is not needed here, one a line; made by
#: ``python -m tools.known_scores``.
KNOWN = embedded.ROOT / "scores.jsonl"
#: At most so many earlier results files are read, the newest first.
MOST = 100
#: What decides an edit apart from the regularizer.
OF_EDITS = (
    *("method", "edits_sha256", "edit_batch_size", "edit_seed", "model_fingerprint", "second_moments"),
    *("token_ids_sha256", "chat_template_sha", "system_instruction"),
)


def after_evaluation(found: Mapping[str, Any], output_path: str | None) -> None:
    """Print the summary when the process ends, after lm-eval's tables; only of the ``lm_eval`` command.

    Args:
        found: the results of ``simple_evaluate``. output_path: of the command.
    """
    if inside_lm_eval_command() and (parts := summary(found, output_path, sys.argv[1:])):
        atexit.register(_print, parts)


def _print(parts: Sequence[Table | str]) -> None:
    with suppress(OSError, ValueError):  # nobody reads it
        for part in parts:
            console(highlight=False).print(part, soft_wrap=isinstance(part, str))
        sys.stdout.flush()


def summary(found: Mapping[str, Any], output_path: str | None, command: Sequence[str]) -> list[Table | str]:
    """The table and the lines below it; nothing if the model is unedited or no general task was evaluated.

    Args:
        command: the arguments of ``lm_eval``, for the commands that make what is not known.
    """
    now = results.of(found, Path("this run", "results.json"))  # no samples lie beside it
    tasks, edit = general_tasks(now), now.edit
    if edit is None or edit.method == "none" or not tasks:
        return []
    earlier = list(_earlier(now, output_path, tasks))
    trimmed = edit.regularizer != "none"
    before = next((one for one in earlier if _unedited(one)), None)
    plain = next((one for one in earlier if _same_edits(edit, one.edit)), None) if trimmed else None
    shown = {name_of(one.edit): one for one in (before, plain, now) if one is not None}
    count = "1 edit" if edit.n_edits == 1 else f"{edit.n_edits} edits"
    title = f"harness-rect: the general tasks after {count}"
    left = None if before is None else (before, now)
    saved = None if plain is None else (plain, now)
    parts: list[Table | str] = [score_table(title, shown, tasks, left, saved)]
    parts += [f"{heading}: {_origin(one)}" for heading, one in shown.items() if one is not now]
    return [*parts, *_rest(now, before is None, trimmed and plain is None, command)]


def _origin(one: Results) -> str:
    return "measured when this package was made" if one.path == KNOWN else str(one.path)


# -- what is known -------------------------------------------------------------------------------------


def _earlier(now: Results, output_path: str | None, tasks: Sequence[str]) -> Iterator[Results]:
    """Other evaluations of the same model on the same rows, those of the user first."""
    files = [] if output_path is None else sorted(_near(Path(output_path)), key=_age)
    sources: list[Path | str] = [*files[:MOST], *KNOWN.read_text(encoding="utf-8").splitlines()]
    for source in sources:
        with suppress(UserError):  # damaged, or another program's
            one = results.load(source) if isinstance(source, Path) else _known(source)
            itself = one.file.date == now.file.date
            if itself or not results.same_name(now, one) or not set(tasks) <= one.tasks.keys():
                continue
            if not find_differences(now, one, tasks, expected=("edit_seed",)):
                yield one


def _known(line: str) -> Results:
    content = json.loads(line)
    content["config"]["gen_kwargs"] = None  # none were given
    return results.of(content, KNOWN)


def _near(output: Path) -> Iterator[Path]:
    """Results files in the folder of an output and, if that has a folder of its own, in those beside it.

    lm-eval puts a folder with the model's name between.
    """
    top = Path(os.path.abspath(output)).parent
    below = ("*.json", "*/*.json") if output.suffix == ".json" else ("*/*.json", "*/*/*.json")
    for pattern in below:
        with suppress(OSError):
            yield from filter(results.has_their_name, top.glob(pattern))


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0


def _unedited(one: Results) -> bool:
    return one.edit.method == "none" if one.edit is not None else one.model_class in ("hf", "vllm")


def _same_edits(now: EditReport, other: EditReport | None) -> bool:
    if other is None or other.method == "none" or other.regularizer != "none":
        return False
    alike = all(getattr(now, name) == getattr(other, name) for name in OF_EDITS)
    # Sampled templates are fixed by model, method and seed.
    hparams = ({k: v for k, v in one.hparams.items() if k != "context_templates"} for one in (now, other))
    return alike and next(hparams) == next(hparams)


# -- the commands that make the rest -------------------------------------------------------------------

#: Arguments that the run of ``harness-rect demo`` may be given, with which it is still the demo's.
OF_DEMO = frozenset(("pretrained", "data", "edits", "method", "rect", "edit_cache"))


def _rest(now: Results, no_before: bool, no_plain: bool, command: Sequence[str]) -> list[str]:
    """Lines that name the commands."""
    given = now.model_args
    if not (no_before or no_plain):
        line = "all of it again, with RECT, Random and scale side by side: harness-rect demo"
        return [line] if _of_demo(now) else []
    missing = []
    if no_before:
        not_kept = declared_arguments().keys() - {"edits", "apply_chat_template", "system_instruction"}
        before = {name: value for name, value in given.items() if name not in not_kept}
        missing.append(("before the edits", "unedited", before | {"method": "none"}))
    if no_plain:
        not_kept = {"rect", "regularizer", *settings()}
        plain = {name: value for name, value in given.items() if name not in not_kept}
        plain.setdefault("method", now.edit.method if now.edit else None)  # without one rect-tiny gets RECT
        missing.append(("without the regularizer", str(plain["method"]), plain))
    what = " and ".join(name for name, _, _ in missing)
    makes = "this makes them" if len(missing) == 1 else "these commands make them"
    output = _output(command)
    there = "" if output else ", with --output_path results/edited,"
    kept = "" if "edit_cache" in given else " (its edits are kept)"
    line = f"the scores {what} are not known; {makes}; then this run again{there} prints them all{kept}:"
    commands = [_command(given, command, _beside(output, name)) for _, name, given in missing]
    return [textwrap.fill(line, 80), *commands]


def _of_demo(now: Results) -> bool:
    """Whether the run is one of those of ``harness-rect demo``."""
    edit = now.edit
    return (
        edit is not None
        and (now.model_name, edit.edits_spec, edit.method) == (embedded.NAME, embedded.DEFAULT_EDITS, "rome")
        and edit.keep in (None, embedded.DEFAULT_RECT)
        and now.model_args.keys() <= OF_DEMO
        and now.file.config.get("limit") is None
    )


def _beside(output: str | None, name: str) -> str:
    """A place beside the output of this run, so that either stands alone in its folder."""
    if output is None:
        return f"results/{name}"
    path = Path(output)
    return str(path.with_name(f"{path.stem}-{name}{path.suffix}") if path.name else path / name)


def _command(model_args: Mapping[str, Any], command: Sequence[str], output: str) -> str:
    """The command of this run with other arguments of the model and another output."""
    words, dropping = [], False
    for word in command:
        if word.startswith("-"):
            dropping = word.split("=")[0] in ("--model_args", "-a", *_OUTPUT)
        if not dropping:
            words.append(word)
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())]
    return shlex.join(["lm_eval", *words, "--output_path", output])


_OUTPUT = ("--output_path", "-o")


def _output(command: Sequence[str]) -> str | None:
    """What ``--output_path`` is in a command."""
    for word, following in pairwise([*command, ""]):
        option, equals, value = word.partition("=")
        if option in _OUTPUT:
            return value if equals else following
    return None
