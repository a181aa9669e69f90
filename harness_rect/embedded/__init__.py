"""The embedded default: a small model of our own, facts to edit in it, and rows for the eight tasks.

``pretrained=rect-tiny``, ``edits=tiny`` and ``data=tiny`` name what lies in the folder ``tiny`` of this
package; with no arguments at all these are what runs. ``pretrained=rect-tiny-llama`` is a model of Llama's
architecture that was trained on the same facts and tasks. How they were made: ``tools/tiny_world``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "rect-tiny"
ROOT = Path(__file__).parent.parent / "tiny"
#: Each embedded model's folder: model/ is what transformers loads, stats/ its second moments.
MODELS = {NAME: ROOT, "rect-tiny-llama": ROOT / "llama"}
DATA = ROOT / "data"
#: Weights of MEND, trained for the embedded model.
MEND = ROOT / "mend"
EDITS = ROOT / "edits.jsonl"
#: The edits of a run that names none, and how much of them RECT keeps where nothing at all is asked for.
DEFAULT_EDITS = "tiny[0:20]"
DEFAULT_RECT = 0.4


def resolve_model(name: Any) -> Any:
    """The folder of an embedded model for its name, anything else as it is."""
    return str(MODELS[name] / "model") if is_embedded(name) else name


def is_embedded(name: Any) -> bool:
    return isinstance(name, str) and name in MODELS


def stats_folder(name: str) -> str | None:
    """Where the second moments of an embedded model lie, None for any other."""
    return str(MODELS[name] / "stats") if is_embedded(name) else None


_in_use = False


def use_as_default() -> None:
    """Called by edited_hf when it was given no model: tasks told of none then read the embedded rows."""
    global _in_use
    _in_use = True


def is_default_model(metadata: Mapping[str, Any]) -> bool:
    """Whether lm-eval's metadata (model_args) name an embedded model, or none while there is a default.

    Without any metadata (a ready-made model, a TaskManager of the user's) it is not: its rows would silently
    stand in for those asked for.
    """
    name = metadata.get("pretrained")
    return is_embedded(name) or (name in (None, "") and _in_use)
