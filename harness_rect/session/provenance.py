"""What was done to a model before it was loaded: the edit report beside its weights says it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from harness_rect.errors import UserError
from harness_rect.fingerprint import model_fingerprint
from harness_rect.io.rows import parse_json, read_text
from harness_rect.session.report import BESIDE, EditReport
from harness_rect.session.weights import sha256_of

log = logging.getLogger(__name__)

#: In place of everything that no report says.
UNKNOWN = "unknown"
#: Fields of a report -> their names in the provenance.
FIELDS = {
    "model": "base",
    "model_fingerprint": "base_fingerprint",
    **{name: name for name in ("method", "n_edits", "edits_spec", "edits_sha256", "edit_batch_size")},
    **{name: name for name in ("regularizer", "run", "replay_of", "harness_rect")},
}


def report_beside(source: str, revision: str = "main", subfolder: str = "") -> EditReport | None:
    """The edit report beside the weights in a folder or a repository of the hub.

    None if there is none, or, with a warning, if it is not as harness-rect writes it.
    """
    path = Path(source, subfolder, BESIDE)
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, BESIDE, revision=revision, subfolder=subfolder or None))
        except (HfHubHTTPError, OSError, ValueError):  # not there, no network, no name of the hub
            return None
    if not path.exists():
        return None
    try:
        content = parse_json(read_text(path), str(path))
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected an object")
        return EditReport.read(content, str(path))
    except UserError as problem:
        log.warning("%s; what was done to the model counts as unknown", problem)
        return None


def described(report: EditReport | None) -> dict[str, Any] | str:
    """What a report says of the edits, for a results file: under :data:`FIELDS`, or unknown."""
    if report is None:
        return UNKNOWN
    given = {name: getattr(report, field) for field, name in FIELDS.items()}
    found = {name: UNKNOWN if value is None else value for name, value in given.items()}
    found["regularizer_settings"] = report.settings
    if report.delta_of is not None:
        found["base"] = report.delta_of
    if report.provenance is not None:  # the base had been edited, too
        found["provenance"] = report.provenance
    return found


def as_written(model: nn.Module, report: EditReport | None) -> bool | str:
    """Whether a model has the edited weights that were written with a report; unknown in another dtype."""
    if report is None or not report.weights_sha256:
        return UNKNOWN
    parameters = dict(model.named_parameters())
    same = True
    for name, expected in report.weights_sha256.items():
        weight, totals = parameters.get(name), report.weights.get(name)
        if weight is None or totals is None or weight.device.type == "meta":
            return UNKNOWN
        if str(weight.dtype) != f"torch.{totals.dtype}":
            return UNKNOWN
        same &= sha256_of(weight) == expected
    return same


@torch.no_grad()
def add_differences(model: nn.Module, source: str, report: EditReport, **where: Any) -> bool | str:
    """Add a checkpoint of differences to the base model that its report names.

    Args:
        source: folder or repository with the differences. where: further arguments of ``from_pretrained``.

    Returns:
        what :func:`as_written` says of the differences.

    Raises:
        UserError: the model is not the one whose edits the differences are.
    """
    dtype = next(model.parameters()).dtype
    recorded = {totals.dtype for totals in report.weights.values()}
    if recorded == {str(dtype).removeprefix("torch.")} and (
        model_fingerprint(model) != report.model_fingerprint
    ):
        raise UserError(
            f"pretrained={source}: holds differences from other weights than {report.delta_of} has;"
            f" pretrained=BASE,delta={source} adds them to another model"
        )
    differences = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **where)
    for name in report.weights:
        weight = model.get_parameter(name)
        if weight.device.type == "meta":
            raise UserError(f"pretrained={source}: holds differences in {name}, which must not be offloaded")
        weight.add_(differences.get_parameter(name).to(weight))
    return as_written(differences, report)
