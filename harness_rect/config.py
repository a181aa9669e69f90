"""The arguments of an editing run: declared once, validated in one place.

The fields of :class:`EditConfig` and the fields of the registered regularizers are the arguments of
``--model_args``, of ``harness-rect edit``, of a sweep's entries and of Python.
:func:`declared_arguments` lists them with their help texts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from harness_rect.errors import UserError, did_you_mean
from harness_rect.io.files import expanded
from harness_rect.methods import METHODS
from harness_rect.regularizers import REGULARIZERS, NoRegularizer, Regularizer, parse_share
from harness_rect.validation import validated

if TYPE_CHECKING:
    from typing_extensions import Self

#: A name or path; paths and numbers are taken as their text.
Text = Annotated[str | None, BeforeValidator(lambda value: value if value is None else str(value))]


def _path(value: Any) -> Any:
    return value if value is None else expanded(str(value))


#: A path, or a name in its place, with ``~`` replaced.
PathText = Annotated[str | None, BeforeValidator(_path)]
#: A name, or whether at all.
ChatTemplateName = Annotated[
    bool | str,
    BeforeValidator(lambda value: {"true": True, "false": False}.get(str(value).lower(), value)),
]

#: How the session measures edits.
Measured = Literal["teacher_forced", "generated"]


class EditConfig(BaseModel):
    """What to edit and how, and where finished runs are kept.

    A regularizer is given by its name, with its settings beside it:
    ``EditConfig(regularizer="rect", keep=0.4, ...)``. The texts below the fields are their help texts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: str = "rome"
    """editing method"""
    edits: Text = None
    """facts to edit: tiny, a public set (zsre, counterfact, qaedit, knowedit, rippleedits, mquake, ...) or a
    .json/.jsonl file, each with an optional [start:stop:step]"""
    edit_batch_size: int = Field(default=1, ge=1, lt=2**31)
    """facts edited together; the edits of all batches accumulate"""
    regularizer: SerializeAsAny[Regularizer] = NoRegularizer()
    """what is applied to each update before it is added to the weight"""
    hparams: PathText = None
    """hyper-parameters: a preset name, or a JSON or YAML file as published for the method; otherwise the
    preset of the model's family is used"""
    stats: PathText = None
    """folder of second moments; otherwise they are computed and kept in the user's cache"""
    edit_cache: PathText = None
    """folder where finished edit runs are kept and found again, or off; otherwise the user's cache"""
    edit_seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of all random choices in editing"""
    measure: Measured = "teacher_forced"
    """how each edit is measured: teacher_forced, or generated for generated answers besides"""
    apply_chat_template: ChatTemplateName = False
    """edit in a chat, by the tokenizer's chat template: true, or the name of one of several; under lm_eval
    its option of this name"""
    system_instruction: Text = None
    """the system's turn of that chat; under lm_eval its option of this name"""

    @model_validator(mode="before")
    @classmethod
    def _regularizer(cls, values: Any) -> Any:
        """Make the regularizer from its name and the settings beside it."""
        if not isinstance(values, Mapping) or isinstance(values.get("regularizer"), Regularizer):
            return values
        names = settings().keys()
        rest = {key: value for key, value in values.items() if key not in names}
        given = {key: value for key, value in values.items() if key in names and value is not None}
        name = rest.pop("regularizer", None)
        return rest | {"regularizer": make_regularizer("none" if name is None else str(name), given)}

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
                example = "zsre, counterfact or a .json/.jsonl file, e.g. zsre[0:20]"
                raise ValueError(f"edits= is missing: {example}")
            if self.edit_batch_size > 1 and not METHODS[self.method].batches:
                raise ValueError(f"method={self.method} edits one fact at a time; edit_batch_size must be 1")
        return self

    @classmethod
    def from_args(cls, where: str = "model_args", **args: Any) -> Self:
        """Make one from arguments; ``rect`` is short for ``regularizer=rect,keep=``, None means not given.

        Raises:
            UserError: one line naming the argument.
        """
        given = {key: value for key, value in args.items() if value is not None}
        if "rect" in given:
            share = parse_share(given.pop("rect"), "rect")
            if {"regularizer", "keep"} & given.keys():
                raise UserError("rect= is short for regularizer=rect,keep=: give one or the other")
            given |= {"regularizer": "rect", "keep": share}
        return validated(cls, given, where)


class ModelArguments(EditConfig):
    """The arguments of ``edited_hf`` beside those of lm-eval's ``hf``."""

    data: Text = None
    """where the tasks read their rows: hub, tiny or a folder; otherwise tiny for an embedded model and hub
    for others"""
    save_edited: PathText = None
    """folder for the edited checkpoint"""
    judge: Text = None
    """address of an OpenAI-compatible endpoint that also grades the answers of rect_autoregressive"""
    judge_model: Text = None
    """the judge's model"""

    @field_validator("data")
    @classmethod
    def _data(cls, data: str | None) -> str | None:
        if data not in (None, "hub", "tiny", "") and not Path(expanded(data)).is_dir():
            raise ValueError(f"expected hub, tiny or a folder that exists, found {data}")
        return data


#: Other arguments of the model class and the commands, whose names a setting cannot have.
TAKEN = {*ModelArguments.model_fields, "rect", "pretrained", "model", "device", "dtype", "seed", "output"}


def make_regularizer(name: str, given: Mapping[str, Any]) -> Regularizer:
    """The regularizer of a name with the settings that are given.

    Raises:
        UserError: there is none of that name, or a setting is missing, wrong, or another regularizer's.
    """
    kind = REGULARIZERS.find(name)
    refuse_settings(kind, TAKEN)
    if "keep" in given:
        given = {**given, "keep": parse_share(given["keep"], "keep")}
    for setting in given:
        if setting not in kind.model_fields:
            has = "there is no regularizer" if name == "none" else f"regularizer={name} does not use it"
            where = ", ".join(settings().get(setting, ["none"]))
            raise UserError(f"{setting} is given, but {has}: it goes with {where}")
    for setting, field in kind.model_fields.items():
        if field.is_required() and setting not in given:
            raise UserError(f"regularizer={name} needs {setting}=, {field.description}")
    return validated(kind, given, "")


def refuse_settings(kind: type[Regularizer], taken: Collection[str]) -> None:
    """Raise UserError if a setting of a regularizer has the name of another argument."""
    for setting in kind.model_fields:
        if setting in taken:
            raise UserError(
                f"regularizer={kind.name} cannot be used: its setting {setting} has the name of another"
                " argument; its package must rename it"
            )


def settings() -> dict[str, dict[str, FieldInfo]]:
    """Setting -> {regularizer: its field}, of all registered regularizers."""
    found: dict[str, dict[str, FieldInfo]] = {}
    for name, kind in REGULARIZERS.items():
        for setting, field in kind.model_fields.items():
            if setting not in TAKEN:
                found.setdefault(setting, {})[name] = field
    return found


@dataclass(frozen=True)
class Argument:
    """One argument of an editing run.

    Attributes:
        type: int, float or str; what a command line converts it to. Settings of regularizers are str.
        default: the value where it is not given; None where that depends on other arguments.
        help: its help text, without the default.
    """

    name: str
    type: type
    default: Any
    help: str


def declared_arguments(of: type[EditConfig] = EditConfig) -> dict[str, Argument]:
    """All arguments of an editing run by name, with the settings of other packages' regularizers."""
    found: list[Argument] = []
    for name, field in of.model_fields.items():
        text = " ".join((field.description or "").split())
        if name == "regularizer":
            found += [
                Argument("rect", str, None, RECT),
                Argument(name, str, field.default.name, f"{text}: {', '.join(REGULARIZERS)}"),
                *(_setting(setting, users) for setting, users in settings().items()),
            ]
            continue
        if name == "method":
            text = f"{text}: {', '.join(METHODS)}, none"
        found.append(Argument(name, int if field.annotation is int else str, field.default, text))
    return {argument.name: argument for argument in found}


#: Help text of the one argument that is short for others.
RECT = "share of each update that RECT keeps: 0.4 or 40%; short for regularizer=rect,keep=0.4"


def _setting(name: str, users: Mapping[str, FieldInfo]) -> Argument:
    """A setting of one or several regularizers; those that describe it alike are named together."""
    by_text: dict[str, list[str]] = {}
    for user, field in users.items():
        by_text.setdefault(field.description or name, []).append(user)
    text = "; ".join(f"{text} ({', '.join(names)})" for text, names in by_text.items())
    defaults = {None if field.is_required() else field.default for field in users.values()}
    return Argument(name, str, defaults.pop() if len(defaults) == 1 else None, text)
