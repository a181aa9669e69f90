"""harness-rect: knowledge editing measured by EleutherAI's lm-evaluation-harness.

This file is imported whenever lm-eval is (see `_autoload`), so it must stay tiny.
"""

import os as _os
import sys as _sys
from importlib.machinery import PathFinder as _PathFinder

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


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("harness-rect")
    except PackageNotFoundError:  # files that are not installed
        return "0+unknown"
