"""Methods and regularizers of other packages, found by their entry points."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.__main__ import cli_evaluate
from safetensors.torch import load_file
from support.our_tasks import without_lm_evals_tasks
from support.plugins import CODE, install

from harness_rect import cli, embedded
from harness_rect.config import EditConfig
from harness_rect.errors import UserError
from harness_rect.methods import METHODS
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.regularizers import REGULARIZERS

BOTH = {"methods": {"ones": "clipping:ONES"}, "regularizers": {"clip": "clipping:Clip"}}
WEIGHT = "transformer.h.0.mlp.c_proj.weight"
LIMIT = 0.125


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``installed(entry_points, code)``: a package in this process, until the test is over."""
    for registry in (METHODS, REGULARIZERS):
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
        monkeypatch.setattr(registry, "_plugins", None)

    def add(entry_points, code: str = CODE) -> None:
        monkeypatch.syspath_prepend(install(tmp_path / "site", entry_points, code))
        monkeypatch.delitem(sys.modules, "clipping", raising=False)

    return add


def run(folder: Path, *command: str) -> str:
    """A command in a process of its own that finds the installed package; its output."""
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def check_edited(report: dict) -> None:
    """The edit is the one of the package: all elements of one weight moved by its limit."""
    assert report["method"] == "ones"
    assert (report["regularizer"], report["regularizer_settings"]) == ("clip", {"limit": LIMIT})
    (step,) = report["steps"]
    (weight,) = step["weights"].values()
    assert weight["applied_norm"] / LIMIT == pytest.approx(weight["update_norm"] / 0.25, rel=1e-4)


def test_the_edit_command_uses_an_installed_package(tmp_path: Path) -> None:
    install(tmp_path / "site", BOTH)
    options = ["--model", "rect-tiny", "--edits", "tiny[0:1]", "--output", "out", "--edit-cache", "off"]
    run(
        tmp_path,
        "harness_rect",
        "edit",
        "--method",
        "ones",
        "--regularizer",
        "clip",
        "--limit",
        str(LIMIT),
        *options,
    )
    check_edited(json.loads((tmp_path / "out" / "edit_report.json").read_text()))
    before = load_file(embedded.ROOT / "model" / "model.safetensors")[WEIGHT].float()
    moved = load_file(tmp_path / "out" / "model.safetensors")[WEIGHT].float() - before
    assert torch.allclose(moved, torch.full_like(moved, LIMIT), atol=1e-3)


def test_lm_eval_uses_an_installed_package(tmp_path: Path, installed, monkeypatch) -> None:
    installed(BOTH)
    monkeypatch.chdir(tmp_path)
    without_lm_evals_tasks(monkeypatch, tmp_path / "empty")
    arguments = (
        f"pretrained=rect-tiny,method=ones,regularizer=clip,limit={LIMIT},edits=tiny[0:1],edit_cache=off"
    )
    command = ["lm_eval", "--model", "edited_hf", "--model_args", arguments, "--tasks", "rect_zsre"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", "out", "--device", "cpu"])
    cli_evaluate()
    (results,) = Path("out").rglob("results*.json")
    check_edited(json.loads(results.read_text())["config"]["edit"])


def test_a_sweep_uses_an_installed_package(tmp_path: Path, installed, monkeypatch) -> None:
    installed(BOTH)
    monkeypatch.chdir(tmp_path)
    config = {
        "output": "out",
        "models": ["rect-tiny"],
        "edits": "tiny[0:1]",
        "methods": ["ones"],
        "regularizers": [{"regularizer": "clip", "limit": LIMIT}],
        "checkpoints": [1],
        "tasks": ["rect_zsre"],
        "device": "cpu",
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["sweep", "sweep.yaml"]) == 0
    (results,) = Path("out").rglob("results*.json")
    check_edited(json.loads(results.read_text())["config"]["edit"])


BROKEN = {
    "that cannot be imported": (
        "raise ImportError('no module named lost')",
        "ImportError: no module named lost",
    ),
    "without the object": ("x = 1", "AttributeError: module 'clipping' has no attribute 'Clip'"),
    "of another type": ("class Clip: name = 'clip'", "is of the wrong type for harness_rect.regularizers"),
    "of another name": (
        CODE.replace('name = "clip"', 'name = "clap"'),
        "must have the name 'clip', found 'clap'",
    ),
    "without a title": (CODE.replace('title = "Clip"', ""), "must have a text as its attribute title"),
}


@pytest.mark.parametrize("package", BROKEN)
def test_a_package_that_cannot_be_loaded_is_one_warning_to_all_others(package, installed, caplog) -> None:
    code, problem = BROKEN[package]
    installed({"regularizers": {"clip": "clipping:Clip"}}, code)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert EditConfig.from_args(edits="tiny", regularizer="rect", keep=0.3).regularizer.name == "rect"
            assert "clip" not in list(REGULARIZERS)
    (warning,) = caplog.messages
    assert problem in warning and "clipping:Clip" in warning and "\n" not in warning
    with pytest.raises(UserError) as error:
        EditConfig.from_args(edits="tiny", regularizer="clip")
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_names_of_this_package_stay_its_own(installed, caplog) -> None:
    installed({"regularizers": {"rect": "clipping:Clip"}})
    config = EditConfig.from_args(edits="tiny", regularizer="rect", keep=0.3)
    assert config.regularizer.model_dump()["keep"] == 0.3
    assert "regularizer rect of clipping:Clip: the name is taken" in caplog.text


@pytest.mark.parametrize("name", ["edits", "method", "rect", "data", "device", "seed"])
def test_a_setting_called_like_an_argument_is_refused_where_it_is_used(name, installed, capsys) -> None:
    installed({"regularizers": {"clip": "clipping:Clip"}}, CODE.replace("limit", name))
    given = EditConfig.from_args(edits="tiny[0:1]", method="rome", regularizer="rect", keep=0.3)
    assert (given.edits, given.method) == ("tiny[0:1]", "rome")
    with pytest.raises(UserError, match=rf"regularizer=clip cannot be used: its setting {name} has the name"):
        EditConfig.from_args(edits="tiny[0:1]", regularizer="clip")
    with pytest.raises(SystemExit) as done:
        cli.main(["edit", "--help"])
    assert done.value.code == 0


def test_a_setting_called_like_an_argument_of_lm_eval_is_refused_where_it_is_used(installed) -> None:
    installed({"regularizers": {"clip": "clipping:Clip"}}, CODE.replace("limit", "truncation"))
    with pytest.raises(UserError, match="regularizer=clip cannot be used: its setting truncation"):
        EditedHF(pretrained="rect-tiny", edits="tiny[0:1]", regularizer="clip")
    assert EditedHF(pretrained="rect-tiny", method="none", truncation=True, device="cpu").truncation is True
