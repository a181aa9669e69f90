"""The commands that are disturbed: small ones of every kind that writes something, and what they leave.

Each runs in a world, a folder with its inputs, and writes below ``disk`` in it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
import yaml
from faults.forks import Ended, Fault, Fork, fuse, run
from support.facts import FACTS

from harness_rect import cli
from harness_rect.code_digest import code_digest
from harness_rect.hparams import presets
from harness_rect.io import resume
from harness_rect.io.checksums import ASIDE, SUMS
from harness_rect.methods import METHODS

MODEL = Path(__file__).resolve().parents[1] / "data" / "goldens" / "tiny_gpt2"
HPARAMS = {
    "layers": [1],
    "v_num_grad_steps": 2,
    "v_lr": 0.3,
    "context_templates": ["{}"],
    "mom2_adjustment": True,
    "mom2_dataset": "text.txt",
    "mom2_n_samples": 100,
}
SWEEP = {
    "output": "disk/out",
    "models": ["model"],
    "edits": "facts.json[0:2]",
    "data": "tiny",
    "methods": [{"method": "rome", "hparams": "hparams.json"}],
    "regularizers": ["none", {"rect": 0.4}],
    "checkpoints": [0, 1, 2],
    "tasks": ["rect_sentiment"],
    "orders": 1,
    "limit": 2,
    "batch_size": 2,
    "device": "cpu",
    "log_samples": True,
}


@dataclass(frozen=True)
class Work:
    """A command. needs: the work whose outputs it reads."""

    command: Sequence[str]
    needs: str | None = None


_MODEL = ("--model", "model", "--device", "cpu")
_EDIT = ("--edit-cache", "disk/cache", "--output", "disk/out")
_ROME = ("--method", "rome", "--edits", "facts.json[0:2]", "--hparams", "hparams.json", "--rect", "0.4")
_STATS = ("--layers", "1,2", "--text", "text.txt", "--tokens", "300")
_ARGS = (
    "pretrained=model,method=rome,edits=facts.json[0:2],hparams=hparams.json,edit_cache=disk/cache,data=tiny"
)
_RUN = ("disk/cache/RUN", "--output", "disk/out")
WORKS = {
    "edit": Work(("harness-rect", "edit", *_MODEL, *_ROME, *_EDIT)),
    "stats": Work(("harness-rect", "stats", *_MODEL, *_STATS, "--output", "disk/out")),
    "train-mend": Work(
        (
            *("harness-rect", "train-mend", *_MODEL, "--train", "facts.json", "--layers", "1"),
            *("--steps", "3", "--rank", "2", "--batch-size", "2", "--output", "disk/out"),
        )
    ),
    "sweep": Work(("harness-rect", "sweep", "sweep.yaml")),
    "lm_eval": Work(
        (
            *("lm_eval", "--model", "edited_hf", "--model_args", _ARGS, "--tasks", "rect_sentiment"),
            *("--limit", "2", "--batch_size", "2", "--device", "cpu", "--output_path", "disk/out"),
        )
    ),
    "edit by MEND": Work(
        (
            *("harness-rect", "edit", *_MODEL, "--method", "mend", "--edits", "facts.json[0:1]"),
            *("--hparams", "disk/mend", *_EDIT),
        ),
        needs="train-mend",
    ),
    "edit with stats": Work(
        ("harness-rect", "edit", *_MODEL, *_ROME, *_EDIT, "--stats", "disk/stats"), needs="stats"
    ),
    "replay": Work(("harness-rect", "replay", *_RUN), needs="edit"),
    "export": Work(("harness-rect", "export", *_RUN, "--format", "delta"), needs="edit"),
    "report": Work(("harness-rect", "report", "disk/swept", "-o", "disk/out/r.html"), needs="sweep"),
}
#: Where a work that needs another's output finds it.
_MOVED = {"train-mend": "mend", "stats": "stats", "sweep": "swept", "edit": "edited"}


class World:
    """A folder with all inputs of a work, and what other works left that it needs."""

    def __init__(self, work: str, folder: Path) -> None:
        self.name, self.folder, self.disk = work, folder, folder / "disk"
        self.command = list(WORKS[work].command)
        shutil.copytree(_inputs(), folder, symlinks=True)
        if needs := WORKS[work].needs:
            self.put(done(needs))
            (self.disk / "out").rename(self.disk / _MOVED[needs])
            if needs == "edit":
                kept = next(p.name for p in (self.disk / "cache").iterdir() if p.is_dir())
                self.command = [part.replace("RUN", kept) for part in self.command]
        else:
            self.disk.mkdir()

    def put(self, disk: Path) -> None:
        """Replace all outputs by those in a folder."""
        shutil.rmtree(self.disk, ignore_errors=True)
        shutil.copytree(disk, self.disk)

    def start(self, fault: Fault | None = None) -> Fork:
        return Fork(self.folder, self.command, fault)

    def run(self, fault: Fault | None = None) -> Ended:
        return run(self.folder, self.command, fault)

    def again(self) -> list[str]:
        """Give the same command again, undisturbed: problems in how it ends and in what it leaves."""
        ended = self.run()
        there = ended.status == 2 and "exists already" in ended.said and self.name != "sweep"
        problems = [f"again: {ended.problem}"] if ended.problem else []
        if ended.status and not there:
            problems.append(f"again: status {ended.status}: {ended.said[-600:]}")
        return problems or self.differences() + (self._temporary("out") if self.name == "sweep" else [])

    def differences(self) -> list[str]:
        """What the outputs differ in from those of an undisturbed run."""
        found, right = outputs(self.disk), reference(self.name)
        names = sorted(name for name in found.keys() | right.keys() if found.get(name) != right.get(name))
        return [f"differs: {name} {'' if name in found else 'is missing'}" for name in names]

    def half_written(self) -> list[str]:
        """Files of which only a part may be there. Hidden states of unfinished work are whole; what a sweep
        was removing among them it removes when it next runs."""
        return [line for line in self._temporary() if "/.states/" not in line]

    def _temporary(self, within: str = "") -> list[str]:
        left = [path for path in (self.disk / within).rglob("*") if path.name.endswith(".tmp")]
        return [f"half-written: {path.relative_to(self.disk)}" for path in left]


@contextmanager
def world(work: str) -> Iterator[World]:
    """A new world, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        yield World(work, Path(folder) / "w")


@cache
def _inputs() -> Path:
    """A folder with the inputs of all works."""
    folder = Path(_kept()) / "inputs"
    folder.mkdir()
    (folder / "model").symlink_to(MODEL)
    (folder / "facts.json").write_text(json.dumps(FACTS))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    (folder / "text.txt").write_text("A city by the sea.\n\nIt rained in the old town, for days.\n\n" * 12)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    return folder


@cache
def _kept() -> str:
    import atexit

    folder = tempfile.mkdtemp(prefix="faults-")
    os.chmod(folder, 0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def done(work: str) -> Path:
    """The outputs of an undisturbed run."""
    return _undisturbed(work)[0]


@cache
def reference(work: str) -> dict[str, str]:
    return outputs(done(work))


def events(work: str) -> int:
    """How many moments an undisturbed run has for a fuse."""
    return _undisturbed(work)[1]


@cache
def _undisturbed(work: str) -> tuple[Path, int]:
    count = mmap.mmap(-1, 8)
    with world(work) as one:
        ended = one.run(fuse(0, lambda: None, count))
        if ended.status or ended.problem:
            raise RuntimeError(f"{work} does not work undisturbed: {ended}")
        kept = Path(_kept()) / work
        shutil.copytree(one.disk, kept)
    return kept, int(count[:8])


# -- outputs ------------------------------------------------------------------------------------------------

_TIMES = re.compile(
    rb'"(?:date|start_time|end_time|total_evaluation_time_seconds|seconds|measuring_seconds|seconds_per_edit'
    rb'|seconds_per_evaluation|from_cache|timing)": '
    rb'(?:"[^"]*"|[\d.]+|true|false|\{[^{}]*(\{[^{}]*\}[^{}]*)*\})'
)


def outputs(disk: Path) -> dict[str, str]:
    """File below ``out`` -> sha256 of its content without times; its name without a date.

    Hidden files, checksums and what was set aside are left out.
    """
    found = {}
    for path in sorted((disk / "out").rglob("*")):
        parts = path.relative_to(disk / "out").parts
        aside = ASIDE in path.name or path.name == SUMS
        if path.is_file() and not aside and not any(part.startswith(".") for part in parts):
            name = re.sub(r"_\d{4}-\d\d-\d\dT[\d.-]+", "", "/".join(parts))
            found[name] = hashlib.sha256(_content(path)).hexdigest()
    return found


def _content(path: Path) -> bytes:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays.files))
    if path.suffix in (".json", ".jsonl"):
        return _TIMES.sub(b"", path.read_bytes())
    return path.read_bytes()


# -- this process -------------------------------------------------------------------------------------------


@contextmanager
def prepared(evaluating: bool = True) -> Iterator[None]:
    """What takes long and is the same in all forks is done once, here; states are saved at every step.

    Args:
        evaluating: for the works that evaluate, too.
    """
    for command in cli.COMMANDS if evaluating else ("edit", "stats", "train-mend"):
        cli.module_of(command)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    with torch.no_grad():
        model(**tokenizer("a", return_tensors="pt"))
    gc.freeze()  # a fork that collects need not copy all this
    for name in ("rome", "mend"):
        presets(METHODS[name])
    once: Callable[..., Any] = cache(code_digest)
    with ExitStack() as stack:
        for patch in (
            mock.patch("harness_rect.session.stream.code_digest", once),
            mock.patch("harness_rect.training.mend.code_digest", once),
            mock.patch("harness_rect.moments.provider.code_digest", once),
            mock.patch.object(resume, "SAVE_SECONDS", 0.0),
            mock.patch("harness_rect.moments.accumulate.BATCH_TOKENS", 80),
            *(_evaluating() if evaluating else ()),
        ):
            stack.enter_context(patch)
        yield


def _evaluating() -> tuple[Any, Any]:
    """Describe the machine, which starts a dozen programs, and leave out lm-eval's own tasks."""
    from lm_eval.tasks import manager
    from torch.utils import collect_env

    from harness_rect.compat import lm_eval as compat
    from harness_rect.experiments.sweep import runner  # noqa: F401

    compat.describe_machine()
    return (
        mock.patch.object(collect_env, "get_pretty_env_info", compat._environment),
        mock.patch.object(manager, "__file__", "empty/manager.py"),
    )
