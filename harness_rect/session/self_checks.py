"""Checks that an evaluation makes of itself: ``config.self_checks`` of a results file.

    weights      the weights that were evaluated are those that the edit report is about
    revert       the original weights, put back, are bit for bit those before editing
    rect_counts  RECT kept exactly as many elements of each update as ``keep`` says
    reliability  the tasks measure what the session measured at the end of the stream

Each has ``passed``, None where it could not be made, and ``about``, what was compared. This module imports no
torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from harness_rect.session.report import EditReport

log = logging.getLogger(__name__)

#: Task -> the metric of the session that is its ``reliability``.
SAME_MEASURE = {"rect_zsre": "reliability", "rect_autoregressive": "reliability_gen"}
#: Largest difference of two means of the same measure. Batches of other sizes round differently, and where
#: 16 bits are computed with, tokens often have equal logits.
ALLOWED, ALLOWED_16_BITS = 0.01, 0.05


class Check(BaseModel):
    """One check; see the module."""

    passed: bool | None
    about: str


def made(checks: Mapping[str, Check]) -> dict[str, Any]:
    """The checks as JSON; those that failed are logged as errors."""
    for name, check in checks.items():
        if check.passed is False:
            log.error("SELF-CHECK FAILED, do not trust these results: %s: %s", name, check.about)
    return {name: check.model_dump() for name, check in checks.items()}


def failed(found: Any) -> list[str]:
    """A line for each failed check of a results file's ``config.self_checks``, of whatever type that is."""
    entries = found.items() if isinstance(found, Mapping) else ()
    return [
        f"self-check {name} failed: {check.get('about')}"
        for name, check in entries
        if isinstance(check, Mapping) and check.get("passed") is False
    ]


def of_weights(report: EditReport, now: Mapping[str, str], unchanged: bool = True) -> Check:
    """Whether the weights ``now`` (name -> sha256) are those of the report.

    Args:
        unchanged: whether all else of the model is as it was after editing.
    """
    edited = _same({name: totals.sha256 for name, totals in report.weights.items()}, now, "after editing")
    if edited.passed is False or unchanged:
        return edited
    return Check(
        passed=False, about="another weight, a module or a hook of the model is not as after editing"
    )


def of_revert(report: EditReport, original: Mapping[str, str]) -> Check:
    """Whether the weights that were put back (name -> sha256) are those before editing."""
    wanted = {name: totals.sha256_unedited for name, totals in report.weights.items()}
    return _same(wanted, original, "before editing")


def _same(wanted: Mapping[str, str | None], found: Mapping[str, str], when: str) -> Check:
    known = {name: sha256 for name, sha256 in wanted.items() if sha256 is not None}
    if not known:
        return Check(passed=None, about=f"the report has no hashes of the weights {when}")
    wrong = [name for name, sha256 in known.items() if found.get(name) != sha256]
    if wrong:
        return Check(
            passed=False, about=f"{len(wrong)} of {len(known)} weights, {wrong[0]} first: not as {when}"
        )
    return Check(passed=True, about=f"{len(known)} weights as {when}, by sha256")


def of_counts(report: EditReport) -> Check:
    """Whether every update has as many elements left as its regularizer keeps."""
    counted = wrong = 0
    first = ""
    for number, step in enumerate(report.steps):
        for name, update in step.weights.items():
            if update.expected_elements is None:
                continue
            counted += 1
            if update.kept_elements != update.expected_elements:
                wrong += 1
                first = first or (
                    f"step {number}, {name}: {update.kept_elements} elements instead of"
                    f" {update.expected_elements}"
                )
    if not counted:
        return Check(passed=None, about="no regularizer with an exact count")
    if wrong:
        return Check(passed=False, about=f"{wrong} of {counted} updates, first {first}")
    return Check(passed=True, about=f"{counted} updates")


def of_reliability(report: EditReport, results: Mapping[str, Any] | None, same_arithmetic: bool) -> Check:
    """Whether tasks and session measured the same reliability.

    Args:
        results: of lm-eval, as far as they are; None outside of an evaluation.
        same_arithmetic: whether both compute with the same precision and kernels.
    """
    wide = not same_arithmetic or any(of.dtype not in (None, "float32") for of in report.weights.values())
    pairs = list(_pairs(report, results or {}))
    if not pairs:
        return Check(
            passed=None, about=f"neither of {', '.join(SAME_MEASURE)} scored the edits of the report"
        )
    allowed = max(ALLOWED_16_BITS, 1 / report.n_edits) if wide else ALLOWED
    return Check(
        passed=all(abs(ours - theirs) <= allowed for _, ours, theirs in pairs),
        about="; ".join(f"{task} {theirs:.4f}, session {ours:.4f}" for task, ours, theirs in pairs)
        + f" (at most {allowed:.4g} apart)",
    )


def _pairs(report: EditReport, results: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(task, the session's mean, the task's) where both are of all edits of the report."""
    for written, scores in results.get("results", {}).items():
        task = written.rpartition("::")[2]  # lm-eval 0.5 puts the group before it
        ours = report.at_the_end.get(SAME_MEASURE.get(task, ""))
        theirs = scores.get("reliability,none")
        counted = results.get("n-samples", {}).get(written, {}).get("effective")
        metadata = results.get("configs", {}).get(written, {}).get("metadata") or {}
        same_edits = metadata.get("edits") in (None, "", report.edits_spec) and counted == report.n_edits
        bare = metadata.get("prompt_context") in (None, "bare")
        if isinstance(ours, float) and isinstance(theirs, float) and same_edits and bare:
            yield task, ours, theirs
