"""One validated description of an editing run, the same from ``--model_args``, a command line and Python."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness_rect.errors import UserError
from harness_rect.methods import METHODS
from harness_rect.regularizers import NEEDS_KEEP, RECT_CONVENTIONS, REGULARIZERS

Model = TypeVar("Model", bound=BaseModel)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" where a known name is close, else the list of known names."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"


def parse_share(value: object, name: str) -> float:
    """A share in [0, 1] from 0.4, "0.4" or "40%".

    Raises:
        UserError: for anything else; 40 without a percent sign is refused, not guessed.
    """
    text = str(value).strip()
    percent = text.endswith("%")
    try:
        share = float(text.rstrip("% ")) / (100 if percent else 1)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise UserError(
            f"{name}={text}: expected a share from 0 to 1 such as 0.4, or a percentage such as 40%"
        )
    return share


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Validate ``values`` and turn pydantic's report into one line naming the first wrong key."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in {"missing", "value_error"} else f" (got {first['input']!r})"
        raise UserError(": ".join(filter(None, (where, key, message + got)))) from None


class EditConfig(BaseModel):
    """What to edit, how, and where its by-products live. Field meanings: the table in the README.

    ``keep`` is the share of an update that the regularizer keeps; None exactly when it does not use one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "rome"
    edits: str | None = None
    edit_batch_size: int = Field(default=1, ge=1)
    regularizer: str = "none"
    keep: float | None = Field(default=None, ge=0, le=1)
    rect_convention: str = "paper"
    hparams: str | None = None
    stats: str | None = None
    edit_cache: str | None = None
    edit_seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("method")
    @classmethod
    def _method(cls, name: str) -> str:
        if name not in METHODS and name != "none":
            raise ValueError(f"no editing method {name!r}: {did_you_mean(name, [*METHODS, 'none'])}")
        return name

    @field_validator("regularizer")
    @classmethod
    def _regularizer(cls, name: str) -> str:
        if name not in REGULARIZERS:
            raise ValueError(f"no regularizer {name!r}: {did_you_mean(name, REGULARIZERS)}")
        return name

    @field_validator("rect_convention")
    @classmethod
    def _convention(cls, name: str) -> str:
        if name not in RECT_CONVENTIONS:
            raise ValueError(f"no convention {name!r}: {did_you_mean(name, RECT_CONVENTIONS)}")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> EditConfig:
        needs = NEEDS_KEEP[self.regularizer]
        if needs and self.keep is None:
            raise ValueError(f"regularizer={self.regularizer} needs keep=, the share of the update to keep")
        if not needs and self.keep is not None:
            users = ", ".join(name for name, uses in NEEDS_KEEP.items() if uses)
            reason = (
                "no regularizer"
                if self.regularizer == "none"
                else f"regularizer={self.regularizer} uses none"
            )
            raise ValueError(f"keep is given, but {reason}: it goes with {users}")
        if self.rect_convention != "paper" and self.regularizer != "rect":
            raise ValueError(
                f"rect_convention={self.rect_convention} is given, but the regularizer is not rect"
            )
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
        elif "keep" in given:
            given["keep"] = parse_share(given["keep"], "keep")
        for key in ("edits", "hparams", "stats", "edit_cache"):
            if key in given:
                given[key] = str(given[key])
        return validated(cls, given, where)
