"""What the documentation shows works as it stands."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hatchling.build import build_wheel
from support import tiny_models

from harness_rect.config import EditConfig
from harness_rect.methods import METHODS, Method
from harness_rect.regularizers import REGULARIZERS, Regularizer

DOCS = Path(__file__).parent.parent / "docs"


#: Fenced blocks: language, the file that a reader puts it into, and text.
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def registries(monkeypatch):
    """What a guide adds to methods, regularizers and the tests' model families is gone after the test."""
    monkeypatch.setattr(tiny_models, "FAMILIES", dict(tiny_models.FAMILIES))
    for registry in (METHODS, REGULARIZERS):
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
        monkeypatch.setattr(registry, "_plugins", None)


def follow(guide: Path, folder: Path, monkeypatch) -> dict[str, Any]:
    """Do what a guide says in ``folder``; the names that its Python blocks without a file define.

    Python files of this package become modules of it, whose methods and regularizers are registered.
    """
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {"__name__": guide.stem}
    for language, file, text in BLOCK.findall(guide.read_text(encoding="utf-8")):
        code = compile(text, file or guide.name, "exec") if language == "python" else None
        if code is not None and file:
            module = ModuleType(file.removesuffix(".py").replace("/", "."))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(code, vars(module))
            for entry in vars(module).values():
                if isinstance(entry, Method):
                    METHODS[entry.name] = entry
                elif inspect.isclass(entry) and issubclass(entry, Regularizer) and entry is not Regularizer:
                    REGULARIZERS[entry.name] = entry
        elif code is not None:
            exec(code, scope)
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    return scope


@pytest.mark.parametrize("guide", sorted(DOCS.glob("adding_*.md")), ids=lambda path: path.stem)
def test_the_example_of_a_guide_passes_its_own_tests(guide, tmp_path, monkeypatch, registries, request):
    scope = follow(guide, tmp_path, monkeypatch)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})


def test_the_example_of_another_package_adds_a_regularizer(tmp_path, monkeypatch, registries):
    follow(DOCS / "adding_a_regularizer.md", tmp_path, monkeypatch)
    package = tmp_path / "norm-clip"
    (tmp_path / "harness_rect/regularizers/norm_clip.py").rename(package / "norm_clip.py")
    monkeypatch.chdir(package)
    monkeypatch.syspath_prepend(package / build_wheel(str(package)))
    del REGULARIZERS["norm_clip"]
    config = EditConfig.from_args(edits="tiny", regularizer="norm_clip", max_ratio="0.005")
    assert config.regularizer.max_ratio == 0.005
    assert type(config.regularizer).__module__ == "norm_clip"


def test_the_generated_tables_are_up_to_date():
    sys.path.insert(0, str(DOCS.parent))  # the tools are not installed
    try:
        from tools.docs_tables import TABLES, pages, rewritten
    finally:
        sys.path.pop(0)
    used = set()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert rewritten(text) == text, f"{page.name}: run python -m tools.docs_tables"
        used |= set(re.findall(r"<!-- table: (\w+) -->", text))
    assert used == set(TABLES)


def test_the_command_line_names_every_method():
    from harness_rect import cli

    (commands,) = (
        action for action in cli.make_parser(["edit"])._actions if isinstance(action.choices, dict)
    )
    text = commands.choices["edit"].format_help()
    for name in METHODS:
        assert name in text, name
