"""The edit report: what was done to a model by which edits, as a schema with a version.

It is ``config.edit`` of a results file and the content of ``edit_report.json``. Everything that writes or
reads a report does so through :class:`EditReport`. This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from harness_rect.session.base_model import BaseArguments
from harness_rect.validation import validated

#: Version of the schema. Reports of version 0 have no ``schema_version`` and no ``regularizer_settings``.
SCHEMA_VERSION = 1

#: Metric -> value in [0, 1]; None where it was not finite. A metric without prompts is absent.
Metrics = dict[str, float | None]
#: When an edit is measured: before it, right after it, and at the end of the stream.
When = Literal["before", "after", "end"]


#: The name of the file beside a checkpoint.
BESIDE = "edit_report.json"


class _Part(BaseModel):
    """Unknown fields are ignored, so that reports of later additions still read."""

    model_config = ConfigDict(extra="ignore")


class UpdateStatistics(_Part):
    """The update of one weight in one step.

    Attributes:
        update_norm: Frobenius norm of the proposed update.
        applied_norm: the same after the regularizer; None if the update was not finite.
        weight_norm: of the weight just before the step.
        kept: share of the update's elements that are not zero after the regularizer.
        changed: share of the stored elements that changed; rounding can make it smaller than ``kept``.
        finite: whether update and result are finite.
        kept_elements, expected_elements: how many elements are not zero after the regularizer, and how many
            should be; only where the regularizer keeps an exact number.
    """

    update_norm: float | None = None
    applied_norm: float | None = None
    weight_norm: float | None = None
    kept: float | None = None
    changed: float | None = None
    finite: bool = True
    kept_elements: int | None = None
    expected_elements: int | None = None


class StepRecord(_Part):
    """One step of the stream.

    Attributes:
        edits: ids of the edits made together.
        applied: False if an update was not finite or all edits were skipped; then no weight was changed.
        weights: statistics of each updated weight.
        conditions: of the linear systems that were solved, by what they are; see docs/numerics.md.
        seconds: time to compute and apply the updates.
        measuring_seconds: time to measure the edits before and after.
    """

    edits: list[str]
    applied: bool = True
    weights: dict[str, UpdateStatistics] = {}
    conditions: dict[str, float | None] = {}
    seconds: float | None = None
    measuring_seconds: float | None = None


class EditRecord(_Part):
    """One edit: its metrics before, right after and at the end of the stream.

    Attributes:
        search: numbers that the method reports of its search.
        flags: what went wrong: skipped, not_finite, no_change, no_gain.
    """

    id: str
    subject: str | None = None
    target: str | None = None
    before: Metrics = {}
    after: Metrics = {}
    search: dict[str, Any] = {}
    flags: list[str] = []
    end: Metrics = {}

    def metrics(self, when: When) -> Metrics:
        found: Metrics = getattr(self, when)
        return found


class WeightTotals(_Part):
    """How far one weight is from the unedited one; see :func:`harness_rect.weight_change.weight_change`.

    Attributes:
        sha256, sha256_unedited: of the weight's bits, row by row, after editing and before.
    """

    manhattan_distance: float | None = None
    frobenius_distance: float | None = None
    changed: float | None = None
    share_over: dict[str, float] = {}
    delta_histogram: list[int] = []
    heat_map: list[list[float | None]] = []
    dtype: str | None = None
    sha256: str | None = None
    sha256_unedited: str | None = None


class EditReport(_Part):
    """What was done to a model. Fields that a file does not have are None or empty.

    Attributes:
        method: name of the editing method, or none.
        hparams: resolved hyper-parameters, with the context templates used.
        keep, rect_convention: the settings of these names, None where the regularizer has none.
        regularizer_settings: all settings; read them by :attr:`settings`.
        measure: teacher_forced, or generated where the metrics with the suffix ``_gen`` are measured too.
        chat_template_sha, chat_template_args, system_instruction: how prompts were put to the model, None
            where as they are; see :class:`~harness_rect.models.prompt_format.PromptFormat`.
        code_sha256: digest of the editing code; see :mod:`harness_rect.code_digest`.
        second_moments: layer -> sha256 of the second moments used.
        second_moments_origin: layer -> file, tokens and sha256.
        processes: how many shared the value searches, where there were several.
        computed_on: device, threads and processor; with others the weights can differ, see docs/numerics.md.
        run: digest of everything that determines the edited weights; names the kept run.
        replay_of: the kept run of which this is a part, or the same with another regularizer; such a report
            has no metrics after editing.
        delta_of: the base model, where the checkpoint beside the report holds differences from it.
        delta_of_arguments: by which it is loaded, beside its name, where there are any.
        provenance: what was known of the model before these edits, where it had been edited already.
        weights_sha256: edited weight -> sha256 of its elements in the checkpoint beside the report.
        from_cache: whether the run was kept and found again.
        seconds: time that the session took for all of it, from the cache or not.
        flagged: flag -> ids of the edits that have it.
        prompts_too_long: number of prompts left out because the model cannot read them.
        conditions: the largest of all steps.
        right_after_each_edit, at_the_end, before_each_edit: metrics averaged over the edits.
        versions: package -> version.
    """

    schema_version: int = 0
    method: str
    hparams: dict[str, Any] = {}
    edits_sha256: str | None = None
    edit_ids: list[str] = []
    edit_batch_size: int = 1
    regularizer: str = "none"
    keep: float | None = None
    rect_convention: str | None = None
    regularizer_settings: dict[str, Any] | None = None
    edit_seed: int | None = None
    measure: str | None = None
    model_fingerprint: str | None = None
    chat_template_sha: str | None = None
    chat_template_args: dict[str, Any] | None = None
    system_instruction: str | None = None
    token_ids_sha256: str | None = None
    second_moments: dict[str, str] | None = None
    harness_rect: str | None = None
    code_sha256: str | None = None
    model: str | None = None
    hparams_origin: str | None = None
    edits_spec: str | None = None
    edit_warnings: list[str] = []
    second_moments_origin: dict[str, dict[str, Any]] | None = None
    processes: int | None = None
    computed_on: dict[str, str | int] | None = None
    run: str | None = None
    replay_of: str | None = None
    delta_of: str | None = None
    delta_of_arguments: BaseArguments | None = None
    provenance: dict[str, Any] | None = None
    weights_sha256: dict[str, str] = {}
    from_cache: bool = False
    seconds: float | None = None
    n_edits: int = 0
    flagged: dict[str, list[str]] = {}
    prompts_too_long: int = 0
    right_after_each_edit: Metrics = {}
    at_the_end: Metrics = {}
    before_each_edit: Metrics = {}
    conditions: dict[str, float | None] = {}
    weights: dict[str, WeightTotals] = {}
    seconds_per_edit: float | None = None
    edits: list[EditRecord] = []
    steps: list[StepRecord] = []
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _known(self) -> EditReport:
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(
                f"schema_version {self.schema_version} is newer than {SCHEMA_VERSION}, which this"
                " harness-rect reads: install a newer one"
            )
        if self.method != "none" and "n_edits" not in self.model_fields_set:
            raise ValueError(f"n_edits: Field required with method {self.method}")
        return self

    @classmethod
    def read(cls, mapping: Mapping[str, Any], where: str = "edit report") -> EditReport:
        """The report of a JSON object: of this version, of an older one, or with fields missing.

        Raises:
            UserError: a field is missing without which the rest means nothing, or has the wrong type; one
                line that names ``where`` and the field.
        """
        return validated(cls, mapping, where)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the regularizer, whatever the report's version."""
        if self.regularizer_settings is not None:
            return self.regularizer_settings
        named = {"keep": self.keep, "rect_convention": self.rect_convention}
        return {name: value for name, value in named.items() if value is not None}

    def averages(self, when: When) -> Metrics:
        """Metrics averaged over the edits."""
        return {
            "before": self.before_each_edit,
            "after": self.right_after_each_edit,
            "end": self.at_the_end,
        }[when]

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON types; numbers that JSON does not have become None."""
        text = self.model_dump_json(exclude_unset=True)
        return json.loads(text, parse_constant=lambda nan: None)

    def to_json(self) -> str:
        """The text of ``edit_report.json``."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


#: The report of a model that was not edited.
UNEDITED = EditReport(method="none")
