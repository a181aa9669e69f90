"""Imports go down the table of packages in docs/architecture.md, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Packages and modules of ``harness_rect``, from the top to the bottom.
ORDER = re.findall(
    r"^\| `(\w+)` \|", (ROOT / "docs" / "architecture.md").read_text("utf-8"), flags=re.MULTILINE
)


def _modules() -> dict[str, Path]:
    """Dotted names of all modules of the wheel and their files; packages without ``.__init__``."""
    found = {}
    for folder, prefix in (("harness_rect", ""), ("model_wrappers", "harness_rect.")):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[prefix + name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _imported(module: str) -> Iterator[str]:
    """The modules of this project that a module imports, anywhere in its file."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from (found for found in (name, node.module) if found in MODULES)


def _package(module: str) -> str | None:
    return module.split(".")[1] if "." in module else None


def test_the_table_of_packages_is_complete():
    assert sorted(ORDER) == sorted({_package(module) for module in MODULES} - {None})


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_below_it(package):
    below = {package, None, *ORDER[ORDER.index(package) + 1 :]}
    upward = [
        f"{module} imports {imported}"
        for module in MODULES
        if _package(module) == package
        for imported in _imported(module)
        if _package(imported) not in below
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(_imported(module)) - {module} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle
