"""The digest of code changes with what the code does, and with nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

import harness_rect
from harness_rect.code_digest import code_digest
from harness_rect.methods import METHODS
from harness_rect.session.stream import CODE

ROME = METHODS["rome"]
HELPERS = '''import re
SCALE = 2.0
WORD = re.compile("a b")
seen = 0
def scaled(x):
    """A product."""
    return SCALE * x
'''
SEARCH = "class Search:\n    @classmethod\n    def run(cls, x):\n        return x\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """``load(helpers=, search=, name=)``: a package of two modules with these sources, newly imported."""
    numbers = iter(range(10))

    def load(helpers: str = HELPERS, search: str = SEARCH, name: str = "harness_rect.lent") -> ModuleType:
        root, top = tmp_path / str(next(numbers)), name.rpartition(".")[2]
        (root / top).mkdir(parents=True)
        for module, text in {"__init__": "", "helpers": helpers, "search": search}.items():
            (root / top / f"{module}.py").write_text(text)
        for loaded in [loaded for loaded in sys.modules if loaded.startswith(name)]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setattr(harness_rect, "__path__", [str(root), *harness_rect.__path__])
        monkeypatch.syspath_prepend(root)
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.search")

    return load


@pytest.mark.parametrize(
    "sources",
    [
        (HELPERS.replace("2.0", "3.0"),),
        (HELPERS.replace("a b", "a c"),),
        (HELPERS.replace("SCALE * x", "SCALE + x"),),
        (HELPERS.replace("scaled(x)", "scaled(x, y=1)"),),
        (HELPERS.replace("SCALE * x", "[SCALE * x for i in {1, 2}][0]"),),
        (HELPERS, SEARCH.replace("return x", "return 2 * x")),
        (HELPERS, SEARCH.replace("class Search", "class Search(dict)")),
    ],
)
def test_functions_classes_and_constants_count(load, sources: tuple[str, ...]) -> None:
    load()
    before = code_digest(["lent"])
    load(*sources)
    assert code_digest(["lent"]) != before


@pytest.mark.parametrize(
    "helpers",
    [
        HELPERS,
        "\n\n# no code\n" + HELPERS,
        HELPERS.replace("seen = 0", "seen = 5"),
        HELPERS.replace("A product", "The product of both"),
    ],
    ids=["folder", "lines", "variable", "docstring"],
)
def test_places_comments_docstrings_and_variables_do_not_count(load, helpers: str) -> None:
    load()
    before = code_digest(["lent"])
    load(helpers)
    assert code_digest(["lent"]) == before


def test_what_is_replaced_or_patched_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(factor: float) -> Callable[..., float]:
        return lambda x: factor * x

    found = [code_digest(CODE, ROME)]
    for propose in (times(2), times(3), partial(times(3), 1)):
        method = dataclasses.replace(ROME, propose=propose)  # type: ignore[arg-type]
        assert code_digest(CODE, method) == code_digest(CODE, method)
        found.append(code_digest(CODE, method))
    for place in ("methods.rome.edit_in_order", "models.EditableLM.batch", "session.step.measure"):
        monkeypatch.setattr(f"harness_rect.{place}", lambda *arguments: None)
        found.append(code_digest(CODE, ROME))
    monkeypatch.setattr("harness_rect.measure.BATCH_SEQUENCES", 31)
    found.append(code_digest(CODE, ROME))
    assert len(set(found)) == 8


def test_the_texts_of_a_method_do_not_count() -> None:
    other = dataclasses.replace(ROME, title="Other", paper="elsewhere", summary="less", cost="much")
    assert code_digest([], other) == code_digest([], ROME)


def test_all_files_of_another_package_count(load) -> None:
    search = load(name="lent").Search
    before = code_digest([], search)
    assert code_digest([], load(name="lent").Search) == before
    assert code_digest([], load(HELPERS.replace("2.0", "3.0"), name="lent").Search) != before
    search.run = lambda x: 2 * x
    assert code_digest([], search) != before


def test_functions_and_plain_variables_of_a_notebook_count(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)

    def digest(source: str) -> str:
        exec(source, vars(main))
        return code_digest([], dataclasses.replace(ROME, propose=main.propose))

    first = digest("scale = 2\ndef helper(x): return scale * x\ndef propose(x): return helper(x)")
    assert digest("_ = 5; Out = {1: 5}") == first
    assert len({first, digest("scale = 3"), digest("def helper(x): return x")}) == 3


def test_every_process_finds_the_same_whatever_it_has_imported() -> None:
    script = (
        "{}from harness_rect.code_digest import code_digest\n"
        "from harness_rect.methods import METHODS\n"
        f"print(code_digest({CODE}, METHODS['memit']))"
    )
    more = "import harness_rect.evaluation.editing.task, harness_rect.training.mend\n"
    found = {
        subprocess.run(
            [sys.executable, "-c", script.format(imports)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, imports in (("1", ""), ("2", more))
    }
    assert found == {code_digest(CODE, METHODS["memit"])}
