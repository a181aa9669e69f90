"""More areas: results files and kept runs that are used again, ``--metadata``, and names of folders."""

from __future__ import annotations

import atexit
import copy
import io
import json
import os
import random
import shutil
import tempfile
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fuzz import areas, hostile
from fuzz.areas import Area, Run, command
from lm_eval.utils import handle_arg_string
from support.report_files import edit as edit_report
from support.report_files import writer

from harness_rect import cli
from harness_rect._autoload import tasks_folder
from harness_rect.compat.lm_eval import KeptTasks
from harness_rect.evaluation.catalogue import TASKS
from harness_rect.io.checksums import write_sums

RESULTS = Path(__file__).parents[2] / "results/rect-tiny/rect-tiny/rome/order0/edits_001/results.json"


def _differing(run: Run, status: int) -> Run:
    """Status 1 says that something came out otherwise than before, which is no failure here."""
    return lambda: status if (found := run()) == 1 else found


def rerun(rng: random.Random, folder: Path) -> Run:
    """Up to the model, or with the unchanged file as what the repetition gives."""
    made = json.loads(RESULTS.read_bytes())
    config = made["config"]
    config["model_args"]["edits"] = str(areas.facts(folder))
    part = rng.choice((made, config, config, config["model_args"], config["edit"]))
    changed = hostile.mutated(rng, part, rng.choice((1, 1, 2, 5)))
    part.clear()
    part.update(changed)
    path = hostile.put(rng, folder / "in" / "results.json", hostile.as_json(made))
    if rng.random() < 0.5:
        return areas.stopping(command("rerun", path))

    def write(output: Path, **more: Any) -> None:
        shutil.copy(RESULTS, output / "results.json")

    def compared() -> int:
        given = SimpleNamespace(write=write)
        with mock.patch("harness_rect.experiments.rerun.run", lambda *arguments, **more: given):
            return cli.main(["rerun", str(path)])

    return _differing(compared, 0)


@cache
def _kept() -> Path:
    """A kept run of two edits."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-kept-"))
    (folder / "h.json").write_text(json.dumps(areas.HPARAMS))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    given: dict[str, Any] = {
        "model": "rect-tiny",
        "method": "rome",
        "edits": f"{areas.facts(folder)}[:2]",
        "device": "cpu",
    }
    given |= {"hparams": folder / "h.json", "edit_cache": folder / "cache", "output": folder / "out"}
    with redirect_stdout(io.StringIO()):
        assert command("edit", *areas.as_options(given))() == 0
    (run,) = (path.parent for path in (folder / "cache").rglob("run.json"))
    return run


def kept_runs(rng: random.Random, folder: Path) -> Run:
    """Files of a run are changed, and the checksums made anew."""
    run = folder / "in" / "run"
    shutil.copytree(_kept(), run)
    for path in rng.sample(sorted(run.iterdir()), rng.choice((1, 1, 2))):
        data = path.read_bytes()
        if path.name == "run.json" and rng.random() < 0.5:  # as of edited_hf
            made = json.loads(data)
            made["base"]["arguments"] = {"revision": "main", "subfolder": "x", "add_bos_token": False}
            data = hostile.as_json(made)
        if path.suffix == ".json":
            data = hostile.as_json(hostile.mutated(rng, json.loads(data), rng.choice((1, 1, 3))))
        path.write_bytes(hostile.damaged(rng, data) if path.suffix != ".json" or rng.random() < 0.1 else data)
    if rng.random() < 0.9:
        write_sums(run)
    more = rng.choice(([], [], ["--upto", rng.choice("012")], ["--rect", "0.4"]))
    name = rng.choice((["replay"], *(["export", "--format", form] for form in ("full", "peft", "delta"))))

    def loaded(*names: Any, **given: Any) -> tuple[Any, Any]:
        return copy.deepcopy(areas.tiny())

    def put() -> int:
        here = "harness_rect.cli.replay"
        with mock.patch(f"{here}.load_model", loaded), mock.patch(f"{here}._loaded", loaded):
            return command(*name, run, "--output", folder / "out" / "o", *more)()

    return _differing(put, 2)


def metadata(rng: random.Random, folder: Path) -> Run:
    """As the tasks get it of ``--metadata`` or ``--model_args``."""
    usual = {"edits": str(areas.facts(folder)), "data": "tiny", "tokenizer": "rect-tiny", "max_length": 64}
    usual |= {"prompt_context": "qa", "measure": "generated", "pretrained": "rect-tiny"}
    for key in rng.sample(sorted(usual), rng.choice((1, 1, 2))):
        usual[key] = rng.choice((handle_arg_string(rng.choice(areas.VALUES)), hostile.value(rng)))

    def load() -> None:
        manager = KeptTasks(include_path=tasks_folder(), metadata=usual, include_defaults=False)
        manager.load([rng.choice(sorted(TASKS))])

    return areas.through_boundary(load)


NAMES = (
    *(
        b"\xff\xfe",
        b"caf\xe9",
        b"a\nb",
        b"a\rb",
        b"[/x]",
        b"[bold]b",
        b"\x1b[31mred",
        b"[[x",
        b"$x$",
        b"%s%n",
    ),
    *(b"-o", b" ", b"\xe2\x80\xae", b"<b>&", b"a|b", b"`c`", b"..x", b"*", b"n" * 200, b"\xc2\x85", b"{0}"),
)


def names(rng: random.Random, folder: Path) -> Run:
    """Folders of any bytes, for ``report`` and ``compare``, shown where only UTF-8 can be."""
    where = folder / "in" / os.fsdecode(rng.choice(NAMES))
    add = writer(where / os.fsdecode(rng.choice(NAMES)))
    tasks = ("rect_nli", "rect_sentiment")
    base, other = add(7, tasks=tasks), add(5, edit_report(3, (0.9, 0.5)), tasks=tasks)
    form = rng.choice(("table", "markdown", "csv", "json"))
    output = folder / "out" / f"{os.fsdecode(rng.choice(NAMES))}.html"
    run = command("compare", base.parent, other.parent, "--format", form)
    if rng.random() < 0.2:  # a page takes a second or two
        run = areas.undrawn(command("report", where, "-o", output))

    def shown() -> int:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
            return run()

    return shown


AREAS: dict[str, Area] = areas.AREAS | {
    "rerun": rerun,
    "kept runs": kept_runs,
    "metadata": metadata,
    "names": names,
}
