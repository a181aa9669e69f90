"""Makes a stock lm-eval find our models and our tasks, with nothing to pass and nothing to patch on disk.

Every interpreter start runs the one line of `harness_rect_autoload.pth`. It installs an import hook that
imports this file when `lm_eval` is imported, so other programs pay next to nothing. This file waits for two
modules of lm-eval and, after each has run, uses its public interface: the model registry, and the
`include_path` of TaskManager. It imports the standard library only and never raises: after any error lm-eval
runs without this package. HARNESS_RECT_AUTOLOAD=0 disables it.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

# What we declare in pyproject.toml too, for releases of lm-eval that load plugins.
MODELS = (
    EntryPoint("edited_hf", "harness_rect.model_wrappers.edited_hf:EditedHF", "lm_eval.models"),
    EntryPoint("edited_vllm", "harness_rect.model_wrappers.edited_vllm:EditedVLLM", "lm_eval.models"),
)


def tasks_folder() -> str:
    """Where our task YAMLs lie: inside the package in a wheel, beside it in a source checkout."""
    here = os.path.dirname(os.path.realpath(__file__))
    inside = os.path.join(here, "tasks")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(here), "tasks")


def add_models(_module: ModuleType) -> None:
    """Register our model classes, lazily, once `lm_eval.models` has filled the registry.

    Not earlier: get_model imports that module only while the registry is empty, so an entry of ours would
    hide all of lm-eval's own. An lm-eval that loads plugins has registered us already, or does so later:
    being the same entry points, ours are then no conflict.
    """
    from lm_eval.api.registry import model_registry

    for model in MODELS:
        if model.name not in model_registry:
            model_registry.register(model.name, target=model)


def add_tasks(module: ModuleType) -> None:
    """Let every TaskManager that reads lm-eval's default tasks read ours next, and then the user's own."""
    original = module.TaskManager.__init__
    signature = inspect.signature(original)
    known = {"include_path", "include_defaults"} <= signature.parameters.keys()
    if not known or hasattr(original, "_harness_rect"):
        return

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments["include_path"]
        theirs = list(given) if isinstance(given, list | tuple) else [given] if given else []
        ours = tasks_folder()
        # If a folder of the user's holds ours, it is read anyway; read twice, every task would warn of it.
        if call.arguments["include_defaults"] and not any(_holds(path, ours) for path in theirs):
            call.arguments["include_path"] = [ours, *theirs]
        original(*call.args, **call.kwargs)
        self.include_path = given  # what the user asked for, not what we made of it

    init._harness_rect = True  # type: ignore[attr-defined]
    module.TaskManager.__init__ = init


def _holds(folder: Any, inner: str) -> bool:
    outer = os.path.realpath(folder)
    return inner == outer or inner.startswith(os.path.join(outer, ""))


class Finder:
    """Finds nothing itself: lets the finders after it find what it waits for, and acts once that has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[ModuleType], None]] = {
            "lm_eval.models": add_models,
            "lm_eval.tasks.manager": add_tasks,
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        try:
            for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self.follow(spec.loader)
                    return spec
        except Exception:  # the import goes on as if we were not here, and fails or not for its own reasons
            pass
        return None

    def follow(self, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.serve(module)

        loader.exec_module = exec_module  # on this instance only: the loader stays what it is in all else

    def serve(self, module: ModuleType) -> None:
        action = self.waiting.pop(module.__name__, None)
        try:
            if not self.waiting:
                sys.meta_path.remove(self)
            if action is not None:
                action(module)
        except Exception:  # an lm-eval we do not know: it works, without us
            pass


def install() -> None:
    if os.environ.get("HARNESS_RECT_AUTOLOAD") == "0" or any(type(f) is Finder for f in sys.meta_path):
        return
    finder = Finder()
    sys.meta_path.insert(0, finder)
    imported = finder.waiting.keys() & sys.modules.keys()  # before us: we come by hand, not through the .pth
    for name in imported:
        finder.serve(sys.modules[name])


install()
