"""The row formats of published edit sets, each read by one function into the same fields.

A format is an entry of :data:`FORMATS`: a test of whether a row has it, and a function that finds the fact in
the row. The first format that a row has reads it, so one file may mix them. Paraphrases and locality prompts
are read from every row by the names that any of the sets gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness_rect.edits.edit import Probe, shorten
from harness_rect.errors import UserError
from harness_rect.io.rows import Row, as_text, kind

_OLD_TARGETS = ("target_true", "ground_truth", "target_old", "pred")
_PARAPHRASES = ("paraphrase_prompts", "paraphrases", "rephrase_prompts", "rephrase_prompt", "rephrase")
_PROBE_ANSWERS = ("ground_truth", "answer", "target")


@dataclass(frozen=True)
class Fields:
    """The fields of an object in a row, checked as they are read. Every method raises UserError.

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

    def text(self, name: str) -> str:
        """A string that must be there and not blank."""
        value = self.values.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            state = "missing" if value is None else "empty"
            raise self.error(name, f"{state}; expected a non-empty string")
        return as_text(value, self.where + name)

    def target(self, name: str) -> str:
        """A string, or an object with the string under ``str``."""
        return self.object(name).text("str") if isinstance(self.values.get(name), dict) else self.text(name)

    def texts(self, *names: str) -> Iterator[str]:
        """Strings and lists of strings under any of the names; null and blank ones are left out."""
        for name in names:
            yield from _texts(self.values.get(name), self.where + name)

    def answer(self, *names: str) -> str | None:
        """The first answer under any of the names: see :func:`_answer`."""
        found = (_answer(self.values.get(name), self.where + name) for name in names)
        return next((answer for answer in found if answer is not None), None)


class Fact(NamedTuple):
    """prompt: with or without the marker at the subject. prompt_name: of its field, for messages."""

    prompt: str
    prompt_name: str
    subject: str
    target_new: str
    target_old: str | None


class Format(NamedTuple):
    """keys: what its rows have, for messages. fits: whether a row has this format."""

    keys: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], Fact]


def _counterfact(row: Fields) -> Fact:
    """CounterFact: the fact in an object of its own."""
    return _plain(row.object("requested_rewrite"))._replace(prompt_name="requested_rewrite.prompt")


def _zsre(row: Fields) -> Fact:
    """ZsRE in the form of MEND and ROME."""
    return Fact(row.text("src"), "src", row.text("subject"), row.target("alt"), row.answer("pred"))


def _plain(row: Fields) -> Fact:
    """EasyEdit's flat rows, and rows written by hand."""
    old = row.answer(*_OLD_TARGETS)
    return Fact(row.text("prompt"), "prompt", row.text("subject"), row.target("target_new"), old)


FORMATS = (
    Format("requested_rewrite", lambda row: "requested_rewrite" in row, _counterfact),
    Format("src + subject + alt", lambda row: "src" in row and ("alt" in row or "prompt" not in row), _zsre),
    Format("prompt + subject + target_new", lambda row: "prompt" in row, _plain),
)


def fact_of(row: Row) -> Fact:
    """The fact of a row, by the first format that the row has."""
    values = row.object()
    for format in FORMATS:
        if format.fits(values):
            return format.read(Fields(values, f"{row.where}: "))
    keys = shorten(", ".join(map(repr, values)) or "none", 300)
    expected = ", or ".join(format.keys for format in FORMATS)
    raise row.error(f"unknown row format; expected {expected}; the keys are: {keys}")


def paraphrases_of(row: Fields) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.texts(*_PARAPHRASES)))


def neighborhood_of(row: Fields, old: str | None) -> Iterator[Probe]:
    """All locality prompts of a row.

    Args:
        old: the fact's old target, which CounterFact's neighborhood prompts share.
    """
    get = row.values.get
    yield from _probes(get("loc"), get("loc_ans"), f"{row.where}loc")
    name = f"{row.where}neighborhood_prompts"
    for item in _listed(get("neighborhood_prompts")):
        if isinstance(item, dict):
            yield from _probe_object(item, name)
        else:
            yield from (Probe(text, old) for text in _texts(item, name))
    yield from _probes(get("locality_prompt"), get("locality_ground_truth"), f"{row.where}locality_prompt")
    groups = get("locality")
    if groups is not None and not isinstance(groups, dict):
        raise row.error("locality", f"expected an object of groups, found {kind(groups)}")
    for group, items in (groups or {}).items():
        name = f"locality {group!r}"
        for item in _listed(items):
            if not isinstance(item, dict | None):
                raise row.error(name, f"expected prompt and ground_truth, found {kind(item)}")
            yield from _probe_object(item or {}, row.where + name)


def _probe_object(item: Mapping[str, Any], name: str) -> Iterator[Probe]:
    answer = next((item[key] for key in _PROBE_ANSWERS if key in item), None)
    return _probes(item.get("prompt"), answer, name)


def _probes(prompts: Any, answers: Any, name: str) -> Iterator[Probe]:
    """A prompt with its answer (of several accepted ones the first), or two lists of equal length."""
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
    for prompt, answer in zip(prompts, answers, strict=True):
        for text in _texts(prompt, name):
            yield Probe(text, _answer(answer, f"{name} (its answer)"))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts(value: Any, name: str) -> list[str]:
    """A string or a list of strings; null and blank ones are left out."""
    found = [as_text(item, name) for item in _listed(value) if item is not None]
    return [text for text in found if text.strip()]


def _answer(value: Any, name: str) -> str | None:
    """A string, {"str": ...}, or (nested) lists of accepted answers, of which the first counts."""
    while isinstance(value, list | dict):
        value = value.get("str") if isinstance(value, dict) else next(iter(value), None)
    return None if value is None else next(iter(_texts(value, name)), None)
