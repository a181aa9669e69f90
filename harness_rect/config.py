"""One validated description of an editing run, the same from model_args, commands, sweeps and Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from harness_rect.errors import UserError, did_you_mean
from harness_rect.methods import METHODS
from harness_rect.regularizers import REGULARIZERS, NoRegularizer, Regularizer, parse_share
from harness_rect.validation import validated


class EditConfig(BaseModel):
    """What to edit, how, and where what is computed on the way is kept.

    The fields, with the fields of the regularizers, are the arguments of ``--model_args``, the commands,
    sweeps and Python; the descriptions are the help texts. A regularizer is given by its name, with its
    settings beside it: ``EditConfig(regularizer="rect", keep=0.4, ...)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(default="rome", description="editing method, or none")
    edits: str | None = Field(
        default=None,
        description="tiny, zsre, counterfact or a .json/.jsonl file, each with an optional [start:stop:step]",
    )
    edit_batch_size: int = Field(
        default=1,
        ge=1,
        description="facts an edit: 1 is instance editing, more is batch editing; edits accumulate",
    )
    regularizer: SerializeAsAny[Regularizer] = Field(
        default=NoRegularizer(), description="what trims each update before it is applied"
    )
    hparams: str | None = Field(
        default=None, description="hyper-parameters: a preset name or a published JSON or YAML file"
    )
    stats: str | None = Field(default=None, description="folder of second moments")
    edit_cache: str | None = Field(
        default=None, description="folder where edit runs are kept and found again, or off"
    )
    edit_seed: int = Field(default=0, ge=0, lt=2**63, description="seed of everything random in editing")

    @model_validator(mode="before")
    @classmethod
    def _regularizer(cls, values: Any) -> Any:
        """Make the regularizer from its name and the settings beside it."""
        if not isinstance(values, Mapping) or isinstance(values.get("regularizer"), Regularizer):
            return values
        rest = {key: value for key, value in values.items() if key not in cls._settings_names()}
        settings = {key: value for key, value in values.items() if key not in rest and value is not None}
        name = rest.pop("regularizer", None)
        return rest | {"regularizer": make_regularizer("none" if name is None else str(name), settings)}

    @staticmethod
    def _settings_names() -> set[str]:
        return {field for kind in REGULARIZERS.values() for field in kind.model_fields}

    @field_validator("method")
    @classmethod
    def _method(cls, name: str) -> str:
        if name not in METHODS and name != "none":
            raise ValueError(f"no editing method {name!r}: {did_you_mean(name, [*METHODS, 'none'])}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> EditConfig:
        if self.method != "none":
            if self.edits is None:
                raise ValueError(
                    "edits= is missing: zsre, counterfact or a .json/.jsonl file, e.g. zsre[0:20]"
                )
            if self.edit_batch_size > 1 and not METHODS[self.method].batches:
                raise ValueError(f"method={self.method} edits one fact at a time; edit_batch_size must be 1")
        return self

    @classmethod
    def from_args(cls, where: str = "model_args", **args: Any) -> EditConfig:
        """Build from loose arguments; ``rect=`` is short for ``regularizer=rect,keep=``, None is not given.

        Raises:
            UserError: one line naming the argument.
        """
        given = {key: value for key, value in args.items() if value is not None}
        if "rect" in given:
            share = parse_share(given.pop("rect"), "rect")
            if {"regularizer", "keep"} & given.keys():
                raise UserError("rect= is short for regularizer=rect,keep=: give one or the other")
            given |= {"regularizer": "rect", "keep": share}
        for key in ("edits", "hparams", "stats", "edit_cache"):
            if key in given:
                given[key] = str(given[key])
        return validated(cls, given, where)


def make_regularizer(name: str, settings: Mapping[str, Any]) -> Regularizer:
    """The regularizer of a name with its settings.

    Raises:
        UserError: there is none of that name, or a setting is missing, wrong, or another regularizer's.
    """
    kind = REGULARIZERS.find(name)
    if "keep" in settings:
        settings = {**settings, "keep": parse_share(settings["keep"], "keep")}
    for setting in settings:
        if setting not in kind.model_fields:
            users = ", ".join(other for other, of in REGULARIZERS.items() if setting in of.model_fields)
            has = "there is no regularizer" if name == "none" else f"regularizer={name} does not use it"
            raise UserError(f"{setting} is given, but {has}: it goes with {users}")
    for setting, field in kind.model_fields.items():
        if field.is_required() and setting not in settings:
            raise UserError(f"regularizer={name} needs {setting}=, {field.description}")
    return validated(kind, settings, "")
