"""Pydantic models from what users write, with a wrong value told in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from harness_rect.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """A model of ``values``.

    Raises:
        UserError: one line that names ``where`` and the first wrong key.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}" if where else first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation as ``key: what is wrong (got ...)``."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in {"missing", "value_error"}:
        got = repr(first["input"])
        message += f" (got {got if len(got) <= 100 else got[:97] + '...'})"
    return f"{key}: {message}" if key else message
