"""harness-rect: knowledge editing measured by EleutherAI's lm-evaluation-harness.

This file is imported whenever lm-eval is (see `_autoload`), so it must stay tiny.
"""

import importlib as _importlib
import os as _os
import sys as _sys
from importlib.machinery import PathFinder as _PathFinder

#: Public name -> its module, or the module that has it; imported when first used. Types: __init__.pyi.
_PUBLIC = {
    "Edit": "harness_rect.edits",
    "EditConfig": "harness_rect.config",
    "EditReport": "harness_rect.session.report",
    "EditSession": "harness_rect.session.stream",
    "UserError": "harness_rect.errors",
    "analysis": "harness_rect.experiments.analysis",
    "compare": "harness_rect.api",
    "edit": "harness_rect.api",
    "embedded": "harness_rect.embedded",
    "load_edits": "harness_rect.edits",
    "report": "harness_rect.api",
}
__all__ = [*_PUBLIC]


def __getattr__(name):
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(_PUBLIC[name])
    found = module if module.__name__.endswith(f".{name}") else getattr(module, name)
    globals()[name] = found
    return found


def __dir__():
    return sorted({*globals(), *_PUBLIC, "__version__"})


def _version():
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("harness-rect")
    except PackageNotFoundError:  # files that are not installed
        return "0+unknown"


# `model_wrappers/` and `tasks/` lie beside this package in a source checkout and inside it in a wheel. The
# real path, because an editable install reaches the package through a link (see hatch_build.py).
_here = _os.path.dirname(_os.path.realpath(__file__))


class _FindsBeside:
    """Finds these two folders beside the package, and nothing else of the checkout."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("harness_rect.model_wrappers", "harness_rect.tasks"):
            return _PathFinder.find_spec(name, [_os.path.dirname(_here)], target)


if not _os.path.isdir(_os.path.join(_here, "tasks")):
    _sys.meta_path.append(_FindsBeside)
