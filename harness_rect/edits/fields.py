"""The fields of a row, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness_rect.edits.keys import hint
from harness_rect.errors import UserError
from harness_rect.io.rows import as_text, kind


@dataclass(frozen=True)
class Fields:
    """The fields of an object in a row. Every method raises UserError.

    where: how messages name the object: ``facts.json, row 3: `` or ``facts.json, row 3: requested_rewrite.``
    """

    values: Mapping[str, Any]
    where: str

    def error(self, name: str, problem: str) -> UserError:
        return UserError(f"{self.where}{name}: {problem}")

    def object(self, name: str) -> Fields:
        """An object within this one."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.error(name, f"expected an object, found {kind(value)}")
        return Fields(value, f"{self.where}{name}.")

    def objects(self, name: str) -> list[Fields]:
        """The objects of a list; none where it is missing or null."""
        value = self.values.get(name)
        if not isinstance(value, list | None):
            raise self.error(name, f"expected a list of objects, found {kind(value)}")
        for index, item in enumerate(value or []):
            if not isinstance(item, dict):
                raise self.error(f"{name}[{index}]", f"expected an object, found {kind(item)}")
        return [Fields(item, f"{self.where}{name}[{i}].") for i, item in enumerate(value or [])]

    def text(self, name: str) -> str:
        """A string that must be there and not blank."""
        value = self.values.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            state = "missing" if value is None else "empty"
            raise self.error(name, f"{state}; expected a non-empty string{hint(self.values, name)}")
        return as_text(value, self.where + name)

    def target(self, name: str) -> str:
        """A string, or an object with the string under ``str``."""
        return self.object(name).text("str") if isinstance(self.values.get(name), dict) else self.text(name)

    def identifier(self, name: str) -> str:
        """A string or number as text; empty where there is none."""
        value = self.values.get(name)
        return str(value) if isinstance(value, str | int) else ""

    def texts(self, *names: str) -> Iterator[str]:
        """Strings and lists of strings under any of the names; null and blank ones are left out."""
        for name in names:
            yield from texts(self.values.get(name), self.where + name)

    def answer(self, *names: str) -> str | None:
        """The first answer under any of the names: see :func:`answer`."""
        found = (answer(self.values.get(name), self.where + name) for name in names)
        return next((text for text in found if text is not None), None)

    def forms(self, *names: str) -> tuple[str, ...]:
        """All accepted forms of one answer under the names: see :func:`forms`."""
        return forms([self.values.get(name) for name in names], self.where + "/".join(names))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def texts(value: Any, name: str) -> list[str]:
    """A string or a list of strings; null and blank ones are left out."""
    found = [as_text(item, name) for item in listed(value) if item is not None]
    return [text for text in found if text.strip()]


def answer(value: Any, name: str) -> str | None:
    """A string, {"str": ...}, or (nested) lists of accepted answers, of which the first counts."""
    while isinstance(value, list | dict):
        value = value.get("str") if isinstance(value, dict) else next(iter(value), None)
    return None if value is None else next(iter(texts(value, name)), None)


def forms(value: Any, name: str) -> tuple[str, ...]:
    """All accepted forms of one answer, each once, in the order in which they are given.

    A string, lists of these nested to any depth, or {"value": string, "aliases": list}; null and blank ones
    are left out.
    """
    if isinstance(value, dict):
        value = [value.get("value"), value.get("aliases")]
    if not isinstance(value, list):
        return tuple(texts(value, name))
    return tuple(dict.fromkeys(form for item in value for form in forms(item, name)))


def paired(prompts: Any, answers: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A prompt with its answer, or two lists of equal length; blank prompts are left out."""
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, list):
        answers = [answers] * len(prompts)
    elif not answers:
        answers = [None] * len(prompts)
    elif len(prompts) == 1:
        answers = [answers]
    if len(prompts) != len(answers):
        raise UserError(f"{name}: {len(prompts)} prompts but {len(answers)} answers")
    for prompt, given in zip(prompts, answers, strict=True):
        for text in texts(prompt, name):
            yield text, given
