"""What an edit run cost: evaluations of its base model and of what it left, compared for a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness_rect import embedded
from harness_rect.errors import UserError
from harness_rect.experiments.compare import compare
from harness_rect.experiments.compare.rendering import render
from harness_rect.experiments.results import Results, load, newest
from harness_rect.io.files import expanded
from harness_rect.session.provenance import UNKNOWN, described, report_beside
from harness_rect.session.report import EditReport

#: Arguments of a model class that name a folder with weights.
_WEIGHTS = ("pretrained", "peft", "delta")
_PATH = re.compile(r"(?<![\w.~/-])~?(?:/[^\s/,;:|\[\]]+)+")


def cost(measured: Sequence[str], report: EditReport, base: str) -> str:
    """A comparison in Markdown, without the folders of this machine.

    Args:
        measured: results of lm-eval, or folders with some: of the base model, and of the run.
        report: of the run. base: name or folder of its base model.

    Raises:
        UserError: they cannot be read or compared, or are of other models.
    """
    before, after = (load(newest(path)[0]) for path in measured)
    if problem := _other_than_base(before, report, base):
        raise UserError(f"--results {before.path}: {problem}; the first must be of the base model, {base}")
    if problem := _other_than_run(after, report):
        raise UserError(
            f"--results {after.path}: {problem}; the second must be of run {(report.run or '')[:12]}:"
            " evaluate these edits, or what `export` wrote"
        )
    text = render(compare(before, [after], allow_differences=True), "markdown").strip()
    for path in (str(before.path), str(after.path), before.model_name, after.model_name):
        if path.startswith(("/", "~")):
            text = text.replace(path, Path(path).name)
    return _PATH.sub(lambda found: Path(found.group()).name, text)


def _other_than_base(one: Results, report: EditReport, base: str) -> str | None:
    """Why results are not of the base model, None where they are."""
    if one.edit is not None and one.edit.n_edits:
        return f"is of a model after {one.edit.n_edits} edits"
    found = _provenance(one)
    fingerprint = found.get("model_fingerprint", UNKNOWN)
    if fingerprint != UNKNOWN:
        same = fingerprint == report.model_fingerprint
        return None if same else f"is of other weights ({one.model_name})"
    if added := [name for name in ("peft", "delta", "lora_local_path") if one.model_args.get(name)]:
        return f"is of a model with {added[0]}={one.model_args[added[0]]}"
    known = {_place(base), _place(report.model or base)}
    return None if _place(one.model_name) in known else f"is of another model ({one.model_name})"


def _other_than_run(one: Results, report: EditReport) -> str | None:
    """Why results are not of what a run left, None where they are."""
    if one.edit is not None and one.edit.n_edits:
        same = one.edit.run == report.run is not None
        return None if same else f"is of other edits (run {(one.edit.run or UNKNOWN)[:12]})"
    given = [said for said in map(_provenance(one).get, _WEIGHTS) if isinstance(said, dict)]
    for said in given:
        if said.get("run") == report.run is not None:
            return "its weights are not those that the run left" if said.get("as_written") is False else None
    return "is of other edits" if given else "says nothing of edits"


def _provenance(one: Results) -> dict[str, Any]:
    """What a results file says of the model's weights; else what the reports beside them say now."""
    if isinstance(recorded := one.file.config.get("provenance"), dict):
        return recorded
    places = {name: one.model_args.get(name) for name in _WEIGHTS}
    return {
        name: described(report_beside(place))
        for name, place in places.items()
        if isinstance(place, str) and Path(place).is_dir()
    }


def _place(model: str) -> str:
    """The folder that a name means, as it is compared; any other name as it is."""
    place = embedded.resolve_model(model)
    path = Path(expanded(place))
    return str(path.resolve()) if path.exists() else place
