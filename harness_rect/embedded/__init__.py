"""The embedded models, facts to edit in them, and rows for the eight general tasks.

``pretrained=rect-tiny``, ``edits=tiny`` and ``data=tiny`` name files in the folder ``tiny`` of this package.
``rect-tiny`` has GPT-2's architecture; ``rect-tiny-llama`` has Llama's and is trained on the same facts and
tasks. ``tools/tiny_world`` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

#: The model that edited_hf takes if none is named.
NAME = "rect-tiny"
ROOT = Path(__file__).parent.parent / "tiny"
#: Each embedded model's folder: model/ is what transformers loads, stats/ has its second moments.
MODELS = {NAME: ROOT, "rect-tiny-llama": ROOT / "llama"}
DATA = ROOT / "data"
#: Weights of MEND, trained for the default model.
MEND = ROOT / "mend"
EDITS = ROOT / "edits.jsonl"
#: Defaults of the arguments ``edits`` and ``rect`` for embedded models.
DEFAULT_EDITS = "tiny[0:20]"
DEFAULT_RECT = 0.4
#: Of an embedded model, where none is given.
BATCH_SIZE = 16
#: Arguments of edited_hf that do not say how to edit.
NOT_EDITING = frozenset(
    (
        *("edit_cache", "data", "save_edited", "measure", "judge", "judge_model"),
        *("apply_chat_template", "system_instruction"),
    )
)

#: The models of this process for which edited_hf took the default model.
unnamed: WeakSet[Any] = WeakSet()


def resolve_model(name: Any) -> Any:
    """The folder of an embedded model for its name; anything else unchanged."""
    return str(MODELS[name] / "model") if is_embedded(name) else name


def name_of(folder: str) -> str | None:
    """The name of the embedded model that was loaded from a folder, None for any other."""
    return next((name for name in MODELS if folder == resolve_model(name)), None)


def is_embedded(name: Any) -> bool:
    return isinstance(name, str) and name in MODELS


def batch_size(name: Any, given: Any) -> Any:
    """The batch size to evaluate with: lm-eval's default, the number 1, counts as not given.

    What ``--batch_size`` gives is a text.
    """
    not_given = given is None or (isinstance(given, int) and given == 1)
    return BATCH_SIZE if not_given and is_embedded(name) else given


def stats_folder(name: str) -> str | None:
    """The folder with the second moments of an embedded model, None for any other."""
    return str(MODELS[name] / "stats") if is_embedded(name) else None


def defaults(pretrained: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are added to those given: none unless the model is an embedded one.

    ``edits`` and ``data`` are the embedded ones where they are not given. RECT is the default as long as no
    argument says how to edit.

    Args:
        pretrained: the name of the model.
        given: the arguments that are given. ``method=none`` reaches Python as None and is given too.
    """
    if not is_embedded(pretrained):
        return {}
    rect = {} if given.keys() - NOT_EDITING else {"rect": DEFAULT_RECT}
    found = {"edits": DEFAULT_EDITS, "data": "tiny"}
    return rect | {name: value for name, value in found.items() if given.get(name) in (None, "")}


def completed(arguments: Mapping[str, Any], default_model: bool) -> dict[str, Any]:
    """Arguments of an evaluation with those that the embedded default adds.

    Args:
        arguments: the model's arguments, with or without ``--metadata``.
        default_model: whether ``edited_hf`` was given no model and took the default.
    """
    model = arguments.get("pretrained") or (NAME if default_model else None)
    return {**arguments, "pretrained": model, **defaults(model, arguments)}


def of_tasks(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's metadata of a task, which hold the model's arguments, with the defaults added.

    Metadata without a model mean the default model if edited_hf was given none either. Else (a ready-made
    model, a TaskManager of the user's own) nothing is added: rows of ours would silently replace others.
    """
    return completed(metadata, bool(unnamed))
