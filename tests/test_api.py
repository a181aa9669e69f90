"""The public Python API: light, declared, and the same edits as the lm-eval model class makes."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness_rect
from harness_rect import embedded
from harness_rect.config import EditConfig
from harness_rect.errors import UserError
from harness_rect.model_wrappers.edited_hf import EditedHF

ROOT = Path(__file__).parent.parent
COMMITTED = "results/rect-tiny/rect-tiny"
ROWS = [json.loads(line) for line in embedded.EDITS.read_text("utf-8").splitlines()[:2]]
RUN: dict[str, Any] = {"method": "rome", "regularizer": "rect", "keep": 0.4, "edit_cache": "off"}


@pytest.fixture(scope="module")
def loaded():
    folder = embedded.resolve_model("rect-tiny")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_importing_the_package_imports_neither_torch_nor_pydantic():
    heavy = "{'torch', 'pydantic', 'numpy', 'lm_eval', 'typing'} & set(sys.modules)"
    code = f"import sys, harness_rect; assert 'edit' in dir(harness_rect); print({heavy})"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_every_public_name_is_declared_for_type_checkers_and_can_be_imported():
    tree = ast.parse((ROOT / "harness_rect" / "__init__.pyi").read_text("utf-8"))
    (declared,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(declared) == harness_rect.__all__
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert getattr(harness_rect, alias.name) is getattr(module, alias.name)
    with pytest.raises(AttributeError, match="has no attribute 'edti'"):
        getattr(harness_rect, "edt" + "i")


def test_edit_declares_all_arguments_of_an_editing_run():
    declared = inspect.signature(harness_rect.edit).parameters
    fields = EditConfig.model_fields
    assert fields.keys() | {"model", "tokenizer", "keep", "settings"} == declared.keys()
    for name in fields.keys() - {"edits", "regularizer"}:
        assert declared[name].default == fields[name].default, name


def test_edit_makes_the_weights_of_the_model_class_and_takes_them_back(loaded):
    model, tokenizer = loaded
    by_command = EditedHF("rect-tiny", edits="tiny[0:2]", **RUN)
    before, theirs = weights(model), weights(by_command.model)
    edits = [ROWS[0], *harness_rect.load_edits("tiny[1]")]
    with harness_rect.edit(model, tokenizer, edits, **RUN) as session:
        assert changed(theirs, weights(model)) == set()
        assert changed(before, theirs) == set(session.originals) != set()
        assert session.report.run == by_command.run_key
    assert changed(before, weights(model)) == set()


def test_a_model_is_reverted_after_an_error_in_the_block(loaded):
    model, tokenizer = loaded
    before = weights(model)
    with (
        pytest.raises(ZeroDivisionError),
        harness_rect.edit(model, tokenizer, ROWS[:1], "ft", rect="40%", edit_cache="off") as session,
    ):
        assert session.report.regularizer == "rect" and changed(before, weights(model))
        _ = 1 / 0
    assert changed(before, weights(model)) == set()


@pytest.mark.parametrize(
    ("edits", "arguments", "message"),
    [
        (ROWS, {"keep": 0.4}, "edit(): keep is given, but there is no regularizer"),
        (ROWS, {"regularizer": "rect"}, "edit(): regularizer=rect needs keep="),
        (ROWS, {"edit_batch_size": 2}, "edit(): method=rome edits one fact at a time"),
        (ROWS, {"ketp": 0.4}, "edit(): unknown argument 'ketp': did you mean 'keep'?"),
        (ROWS, {"method": "none"}, "method=none edits nothing"),
        ("facts.txt", {}, "edits=facts.txt: expected tiny"),
        ([], {}, "edits: no edits are given"),
        ([{"prompt": "{} is"}], {}, "edits, row 0: subject"),
        (ROWS[0], {}, "edits, row 0: expected a JSON object"),
        (2 * list(harness_rect.load_edits("tiny[1]")), {}, "edits: two edits have the same id"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(edits, arguments, message, loaded):
    model, tokenizer = loaded
    block = harness_rect.edit(model, tokenizer, edits, **arguments)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"), block:
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: harness_rect.load_edits(cast(Any, None)),
        lambda: harness_rect.load_edits(Path("nowhere.json")),
        lambda: harness_rect.compare(cast(Any, 5), COMMITTED),
        lambda: harness_rect.report(cast(Any, None), "page.html"),
    ],
)
def test_wrong_kinds_of_arguments_are_user_errors(wrong):
    with pytest.raises(UserError) as told:
        wrong()
    assert "\n" not in str(told.value)


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python_api.md").read_text("utf-8")
    listed = re.findall(r"`(\w+)", "".join(line for line in page.splitlines() if line.startswith("| `")))
    assert set(harness_rect.__all__) <= set(listed)
    monkeypatch.chdir(tmp_path)
    for folder in ("unedited", "rome/order0/edits_020"):
        shutil.copytree(ROOT / COMMITTED / folder, Path(COMMITTED) / folder)
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, scope)
    printed = capsys.readouterr().out
    assert "Lidia Messaem is the lute" in printed and "rect_reasoning 1.0 0.54 0.54" in printed
    assert Path("report.html").stat().st_size > 10_000
