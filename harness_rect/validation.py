"""Pydantic models from what users write, with a wrong value told in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from harness_rect.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """A model of ``values``.

    Raises:
        UserError: one line that names ``where`` and the first wrong key.
    """
    try:
        reading = model.__pydantic_decorators__.field_validators.values()
        own = {name for one in reading if one.info.mode == "before" for name in one.info.fields}
        for name in (model.model_fields.keys() & values.keys()) - own:
            if not _has_booleans(model.model_fields[name].annotation):
                refuse_boolean(values[name], f"{where}: {name}" if where else name)
        return model(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}" if where else first_problem(error)) from None


def refuse_boolean(value: Any, name: str = "") -> Any:
    """``value``, where it is no boolean or list with one: pydantic would take true for the number 1.

    Raises:
        UserError: it is.
    """
    if isinstance(value, bool) or (isinstance(value, list) and any(isinstance(one, bool) for one in value)):
        raise UserError(f"{name}{': ' if name else ''}expected no true or false (got {str(value)[:100]})")
    return value


def _has_booleans(annotation: Any) -> bool:
    """Whether a field may hold true or false, or anything."""
    parts = list(_parts(annotation))
    return not (int in parts or float in parts) or bool in parts or Any in parts


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation as ``key: what is wrong (got ...)``."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in {"missing", "value_error"}:
        got = repr(first["input"])
        message += f" (got {got if len(got) <= 100 else got[:97] + '...'})"
    return f"{key}: {message}" if key else message
