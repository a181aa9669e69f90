"""Sweeps that come with the package: one for each figure and table of the paper, and the same on rect-tiny.

``sweeps/paper/NAME.yaml`` is a sweep without ``output``. Its key ``mini`` has the keys that the small version
``mini/NAME`` has otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from harness_rect.errors import UserError, did_you_mean
from harness_rect.experiments.sweep.plan import SweepConfig, read_values
from harness_rect.hparams import presets
from harness_rect.methods import METHODS
from harness_rect.validation import validated

FOLDER = Path(__file__).parents[2] / "sweeps" / "paper"
#: Kind -> the folder of results that its names are put below.
RESULTS = {"paper": Path("results"), "mini": Path("results/mini")}


def names() -> list[str]:
    """``paper/NAME`` of every sweep, then ``mini/NAME``."""
    files = sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)
    return [f"{kind}/{path.stem}" for kind in RESULTS for path in files]


def read_sweep(asked: str, output: str | None = None, models: Sequence[str] = ()) -> SweepConfig:
    """The sweep that a user asks for.

    Args:
        asked: the path of a YAML file, or one of :func:`names`.
        output: the folder of its results, where it is not the sweep's own.
        models: names or folders of the models, where they are not the sweep's own. Hyper-parameters that a
            sweep takes from a preset by its name are then those of each model's own preset.

    Raises:
        UserError: one line naming file and key.
    """
    values = _values(asked)
    if output is not None:
        values["output"] = output
    if models:
        values = {key: value for key, value in values.items() if key != "model"} | {"models": list(models)}
        values["methods"] = _without_presets(values.get("methods"))
    return validated(SweepConfig, values, asked)


def _values(asked: str) -> dict[str, Any]:
    kind, _, name = asked.partition("/")
    if kind not in RESULTS or Path(asked).suffix or Path(asked).is_file():
        values = read_values(Path(asked))
        values.pop("mini", None)  # of a copy of one of ours
        return values
    if asked not in names():
        raise UserError(f"there is no sweep {asked}: {did_you_mean(asked, names())}")
    values = read_values(FOLDER / f"{name}.yaml") | {"output": str(RESULTS[kind] / name)}
    mini = values.pop("mini")
    return values | mini if kind == "mini" else values


def _without_presets(methods: Any) -> Any:
    """The entries of ``methods`` without ``hparams`` that name a preset."""
    if not isinstance(methods, list):
        return methods
    return [
        {key: value for key, value in entry.items() if key != "hparams"}
        if isinstance(entry, dict)
        and entry.get("method") in METHODS
        and entry.get("hparams") in presets(METHODS[entry["method"]])
        else entry
        for entry in methods
    ]


def evaluations(config: SweepConfig) -> int:
    """How many results files a sweep makes; counted without reading its edits."""
    points = sum(len(config.checkpoints_of(method)) for method in config.methods)
    edited = points * len(config.regularizers) * config.orders * len(config.edit_seeds)
    return len(config.models) * (edited + (0 in config.checkpoints))


#: Of :func:`rows`.
COLUMNS = ("name", "figure or table", "models", "methods", "edits", "evaluations")


def rows() -> list[list[str]]:
    """What each named sweep does, in words and numbers."""
    found = []
    for name in names():
        config = read_sweep(name)
        models = [model.pretrained.rpartition("/")[2] for model in config.models]
        methods = dict.fromkeys(METHODS[entry.method].title for entry in config.methods)
        edits = max(n for entry in config.methods for n in config.checkpoints_of(entry))
        counts = [str(edits), str(evaluations(config))]
        found.append([name, config.title, ", ".join(models), ", ".join(methods), *counts])
    return found


def listing() -> Table:
    """All named sweeps, for a terminal: beside each name what it is of, and its numbers."""
    table = Table(show_header=False, box=None, caption=f"The files: {FOLDER}", caption_justify="left")
    table.add_column(no_wrap=True)  # a name that is cut cannot be typed
    table.add_column(overflow="fold")
    for name, title, models, methods, edits, count in rows():
        words = f"{models}; {methods}; edits: {edits}; evaluations: {count}"
        table.add_row(name, f"{title}\n{words}")
    return table
