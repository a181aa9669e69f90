"""A digest of code as it is loaded, which changes when a function is edited, replaced or patched.

Results that are kept on disk are keyed by it beside their inputs. It is the same in every process of one
installation, whatever else is imported there and whatever ``PYTHONHASHSEED`` is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from pydantic import BaseModel

#: Packages whose arithmetic decides the bits of a result.
LIBRARIES = ("torch", "transformers", "numpy", "scikit-learn")

#: What reads and writes files and tells the user about it; no bit of a result depends on it.
NOT_COUNTED = ("harness_rect.io", "harness_rect.errors")

_WRAPPERS = (property, staticmethod, classmethod, functools.cached_property, functools.partial)
#: Where these keep the functions they wrap.
_HELD = ("fget", "fset", "__func__", "func", "args", "keywords")
_SIMPLE = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), torch.dtype)


def code_digest(*objects: Any) -> str:
    """sha256 (hex) of the code that some objects run, and of the versions of Python and :data:`LIBRARIES`.

    The code is that of the objects themselves and of every module of their top-level packages that is
    reached from them by imports at the head of modules: functions and methods by their byte code, constants
    (names in capitals) by their values. File names and line numbers do not count.

    Args:
        objects: functions, classes, modules, and dataclass instances that hold some, such as a method.
    """
    code = _Code({_module_of(part).partition(".")[0] for one in objects for part in _parts(one)})
    code.add("python", platform.python_version())
    for name in LIBRARIES:
        code.add(name, version(name))
    for one in objects:
        code.add("object", code.describe(one))
    code.add_modules()
    return code.sha256.hexdigest()


def _parts(value: Any) -> list[Any]:
    """An object and the fields of a dataclass instance."""
    return [value, *vars(value).values()] if _is_record(value) else [value]


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")


def _module_of(value: Any) -> str:
    """The module an object was defined in, the wrapped function's for decorated and bound ones."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, functools.partial):
        return _module_of(value.func)
    return str(getattr(value, "__module__", None) or type(value).__module__)


class _Code:
    """Collects descriptions of the code of some top-level packages."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages - {"builtins", "__main__"}
        self.sha256 = hashlib.sha256()
        self._described: dict[int, Any] = {}  # holds the objects, so that no id is used twice
        self._modules: dict[str, ModuleType] = {}  # in the order in which they are reached

    def add(self, name: str, description: str) -> None:
        self.sha256.update(f"{name} {description}\n".encode())

    def add_modules(self) -> None:
        """Add all modules reached, and those that are reached from them."""
        done = 0
        while done < len(self._modules):
            module = list(self._modules.values())[done]
            for name, value in sorted(vars(module).items()):
                # A package has its submodules as attributes once they are imported anywhere.
                submodule = isinstance(value, ModuleType) and value.__name__ == f"{module.__name__}.{name}"
                if not _is_dunder(name) and not submodule:
                    self.add(f"{module.__name__}.{name}", self._attribute(name, value))
            done += 1

    def describe(self, value: Any) -> str:
        """Text that differs where the code or the constants of two objects differ."""
        if isinstance(value, _SIMPLE):
            return repr(value)
        if isinstance(value, tuple | list):
            return self._all("", value)
        if isinstance(value, set | frozenset):
            return f"{{{sorted(map(self.describe, value))}}}"
        if isinstance(value, dict):
            return self._all("", (part for item in value.items() for part in item))
        if isinstance(value, re.Pattern):
            return repr((value.pattern, value.flags))
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, ModuleType):
            self._reach(value.__name__)
            return value.__name__
        name = f"{_module_of(value)}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        self._reach(_module_of(value))
        if id(value) in self._described or name.startswith(NOT_COUNTED):
            return name
        self._described[id(value)] = value
        if isinstance(value, FunctionType):
            return self._function(name, value)
        if isinstance(value, MethodType):
            ours = _module_of(value.__self__).partition(".")[0] in self.packages
            state = vars(value.__self__) if ours and hasattr(value.__self__, "__dict__") else None
            return self._all(name, (value.__func__, type(value.__self__), state))
        if isinstance(value, type):
            return self._class(name, value)
        if _is_record(value) or isinstance(value, BaseModel):
            return self._all(name, (type(value), vars(value)))
        held = _HELD if isinstance(value, _WRAPPERS) else ("__wrapped__",)
        return self._all(name, (getattr(value, part, None) for part in held))

    def _all(self, name: str, values: Iterable[Any]) -> str:
        return f"{name}({', '.join(map(self.describe, values))})"

    def _code(self, code: CodeType) -> str:
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        arguments = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        handlers = getattr(code, "co_exceptiontable", b"")  # Python 3.11
        return self._all(code.co_name, (code.co_code, code.co_consts, names, arguments, handlers))

    def _function(self, name: str, function: FunctionType) -> str:
        closure = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        named: list[Any] = []
        if function.__module__ == "__main__":  # a notebook's other variables do not count
            known = function.__globals__
            named = [known[used] for used in _names(function.__code__) if used in known]
        parts = (function.__code__, function.__defaults__, function.__kwdefaults__, closure, named)
        return self._all(name, parts)

    def _class(self, name: str, of: type) -> str:
        """A class by its own members if its package is one of ours, else by its name."""
        if _module_of(of).partition(".")[0] not in self.packages | {"__main__"}:
            return name
        members = [
            (member, value)
            for member, value in sorted(vars(of).items())
            if not _is_dunder(member) or isinstance(value, FunctionType | staticmethod | classmethod)
        ]
        texts = [f"{member}={self._attribute(member, value, within=of)}" for member, value in members]
        return f"{name}{self._all('', of.__bases__)}: {texts}"

    def _attribute(self, name: str, value: Any, within: type | None = None) -> str:
        """A module's or class's attribute; of variables that are no constants only the type."""
        changing = _SIMPLE if within is None else ()
        if isinstance(value, (*changing, tuple, list, set, frozenset, dict)) and not name.isupper():
            return type(value).__qualname__
        return self.describe(value)

    def _reach(self, name: str) -> None:
        module = sys.modules.get(name)
        if module and name.partition(".")[0] in self.packages and not name.startswith(NOT_COUNTED):
            self._modules.setdefault(name, module)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _names(code: CodeType) -> list[str]:
    """Global names that a function and those defined in it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return list(dict.fromkeys([*code.co_names, *(name for one in inner for name in _names(one))]))
