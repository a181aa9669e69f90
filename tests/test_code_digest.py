"""The digest of code changes with what the code does, and with nothing else."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from harness_rect.code_digest import code_digest
from harness_rect.methods import METHODS
from harness_rect.session.step import take_step

HELPERS = "import re\nSCALE = 2.0\nseen = 0\ndef scaled(x):\n    return SCALE * x\n"
METHOD = (
    "from lent_method.helpers import scaled\nclass Search:\n    def run(self, x):\n        return scaled(x)\n"
)


@pytest.fixture
def lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``lent(helpers=, method=)``: the class of another package whose two modules have these sources."""
    numbers = iter(range(10))

    def load(helpers: str = HELPERS, method: str = METHOD) -> type:
        root = tmp_path / str(next(numbers))
        (root / "lent_method").mkdir(parents=True)
        for name, text in {"__init__": "", "helpers": helpers, "search": method, "other": "X = 1\n"}.items():
            (root / "lent_method" / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.startswith("lent_method")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(root)
        importlib.invalidate_caches()
        return importlib.import_module("lent_method.search").Search

    return load


@pytest.mark.parametrize(
    "helpers",
    [
        HELPERS.replace("2.0", "3.0"),
        HELPERS.replace("SCALE * x", "SCALE + x"),
        HELPERS.replace("scaled(x)", "scaled(x, y=1)"),
        HELPERS.replace("SCALE * x", "[SCALE * x for i in {1, 2}][0]"),
    ],
)
def test_a_module_that_the_objects_module_imports_counts(lent, helpers: str) -> None:
    assert code_digest(lent()) != code_digest(lent(helpers))


@pytest.mark.parametrize(
    "helpers",
    [HELPERS, "\n\n" + HELPERS, HELPERS.replace("seen = 0", "seen = 5"), "# no code\n" + HELPERS],
    ids=["folder", "lines", "variable", "comment"],
)
def test_places_comments_and_variables_do_not_count(lent, helpers: str) -> None:
    assert code_digest(lent()) == code_digest(lent(helpers))


def test_modules_imported_elsewhere_do_not_count(lent) -> None:
    search = lent()
    before = code_digest(search)
    importlib.import_module("lent_method.other")
    assert code_digest(search) == before


def test_a_method_that_is_patched_counts(lent, monkeypatch: pytest.MonkeyPatch) -> None:
    search = lent()
    before = code_digest(search)
    monkeypatch.setattr(search, "run", lambda self, x: x)
    assert code_digest(search) != before


def test_what_a_function_closes_over_counts() -> None:
    def times(factor: float):
        return lambda x: factor * x

    assert code_digest(times(2)) == code_digest(times(2)) != code_digest(times(3))


def test_functions_of_a_notebook_count_by_the_variables_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)

    def digest(source: str) -> str:
        exec(source, vars(main))
        return code_digest(main.propose)

    first = digest("scale, other = 2, 1\ndef helper(x): return scale * x\ndef propose(x): return helper(x)")
    assert digest("other = 5") == first
    assert digest("scale = 3") != first


def test_every_process_finds_the_same_whatever_it_has_imported() -> None:
    script = (
        "{}from harness_rect.code_digest import code_digest\n"
        "from harness_rect.session.step import take_step\n"
        "from harness_rect.methods import METHODS\n"
        "print(code_digest(take_step, METHODS['memit']))"
    )
    more = "import harness_rect.session.stream, harness_rect.evaluation.editing, harness_rect.training.mend\n"
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
    assert found == {code_digest(take_step, METHODS["memit"])}
