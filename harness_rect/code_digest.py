"""A digest of code as it is loaded: it changes when a function or a constant is edited, replaced or patched.

Results that are kept on disk are keyed by it beside their inputs. It is the same in every process of one
installation, whatever else is imported there and whatever ``PYTHONHASHSEED`` is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import pkgutil
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

#: Packages whose arithmetic determines the bits of a result.
LIBRARIES = ("torch", "transformers", "numpy", "scikit-learn")

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), torch.dtype)
#: Attributes that are hashed, by type: of functions and of objects that wrap functions. Python 3.10 has no
#: exception tables.
_PARTS: dict[Any, str] = {
    FunctionType: "__code__ __defaults__ __kwdefaults__ __wrapped__",
    MethodType: "__func__",
    property: "fget fset",
    (functools.partial, functools.cached_property): "func args keywords",
    (staticmethod, classmethod, type(functools.cache(repr))): "__wrapped__",
    CodeType: "co_code co_consts co_names co_varnames co_freevars co_cellvars co_argcount co_posonlyargcount"
    " co_kwonlyargcount co_flags co_exceptiontable",
    re.Pattern: "pattern flags",
}


def code_digest(modules: Iterable[str], *objects: Any) -> str:
    """sha256 (hex) of the code of modules and objects, and of the versions of Python and :data:`LIBRARIES`.

    The byte code of functions and methods and the values of constants (names in capitals) are hashed;
    docstrings, file names, line numbers and other variables are not.

    Args:
        modules: names of modules of this package; a package stands for all its modules.
        objects: classes, and instances that hold functions, such as a :class:`Method`. If they are from
            another package, all its source files are hashed too; from a notebook, its functions and its
            variables of simple types.
    """
    found: list[Any] = [platform.python_version(), *map(version, LIBRARIES)]
    found += [_members(module) for name in modules for module in _imported(f"harness_rect.{name}")]
    for one in objects:
        held = [one] if isinstance(one, type) else vars(one).values()
        origins = {part.__module__ for part in held if isinstance(part, type | FunctionType)}
        found += [_members(one), *(_sources(origin) for origin in sorted(origins))]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _imported(name: str) -> Iterator[ModuleType]:
    yield (module := importlib.import_module(name))
    for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
        yield importlib.import_module(found.name)


def _members(owner: Any, variables: bool = False) -> list[Any]:
    """The functions, classes and constants of a module, a class or an instance."""
    found: list[Any] = []
    for name, value in sorted(vars(owner).items()):
        variable = variables and not name.startswith("_") and isinstance(value, _SIMPLE)
        if isinstance(value, type) and isinstance(owner, ModuleType) and value.__module__ == owner.__name__:
            found.append((name, _plain(value.__bases__), _members(value)))
        elif isinstance(value, (type, *_PARTS)) or name.isupper() or variable:
            found.append((name, _plain(value)))
    return found


def _plain(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """Nested lists of text that differ where two values or the code of two functions differ."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, set | frozenset):
        return sorted(repr(_plain(item)) for item in value)
    if isinstance(value, dict):
        value = [*value.items()]
    parts = next((names.split() for kind, names in _PARTS.items() if isinstance(value, kind)), None)
    if parts and value not in above:  # a function that calls itself is in its own closure
        held = [getattr(value, name, None) for name in parts]
        if isinstance(value, FunctionType):
            held += [cell.cell_contents for cell in value.__closure__ or ()]
            first, *others = value.__code__.co_consts or (None,)
            if first == value.__doc__:
                held[0] = value.__code__.replace(co_consts=(None, *others))
        value, above = held, (*above, value)
    if isinstance(value, list | tuple):
        return [_plain(item, above) for item in value]
    named = value if isinstance(value, type | FunctionType) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _sources(module: str) -> list[Any]:
    """Hashes of the source files of another package, or the functions and variables of a notebook."""
    package, loaded = module.partition(".")[0], sys.modules.get(module)
    if package in ("harness_rect", "builtins") or loaded is None:
        return []
    if module == "__main__":
        return _members(loaded, variables=True)
    folders = getattr(sys.modules.get(package), "__path__", ())
    files = [file for folder in folders for file in Path(folder).rglob("*.py")]
    if not files and getattr(loaded, "__file__", None):
        files = [Path(str(loaded.__file__))]
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
