"""The small sweep's model, rows and edits, made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.small_sweep import EDITS, ROWS, small_world, sweep


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model("gpt2", n_positions=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows").mkdir()
    for name, rows in ROWS.items():
        (folder / "rows" / name).write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows" / "drift.txt").write_text(
        "The old mint belongs to nobody. You can use a list here.\n" * 9
    )
    (folder / "facts.json").write_text(json.dumps(EDITS))
    hparams = {"layers": [0], "v_num_grad_steps": 2, "context_templates": ["{}", "You list. {}"]}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``place(name)``: a folder with links to the small world, the working directory from now on."""
    with ExitStack() as stack:

        def place(name: str) -> Path:
            patch = stack.enter_context(small_world(world, tmp_path / name))
            patch.setenv("HARNESS_RECT_CACHE", str(tmp_path / "cache"))
            return tmp_path / name

        yield place


@pytest.fixture
def here(place: Callable[[str], Path]) -> Path:
    return place("here")


@pytest.fixture
def finished(undisturbed: Path, here: Path) -> Path:
    """The small world with the output of the whole sweep, to be changed."""
    shutil.copytree(undisturbed, here / "out")
    return here


@pytest.fixture(scope="session")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the whole sweep, made once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with small_world(world, folder):
        sweep()
    return folder / "out"
