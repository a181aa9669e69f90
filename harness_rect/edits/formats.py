"""The row formats of published edit sets, each read by one function into the facts that a row edits.

A format is an entry of :data:`FORMATS`: a test of whether a row has it, and a function that finds the facts
in the row. The first format that a row has reads it, so one file may mix them. What a row asks beyond its
edit (paraphrases, locality, consequences) is read by :mod:`harness_rect.edits.questions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness_rect.edits.edit import shorten
from harness_rect.edits.fields import Fields
from harness_rect.edits.keys import OLD_TARGETS, misspelled
from harness_rect.edits.ripple import split_sentence
from harness_rect.io.rows import Row


@dataclass(frozen=True)
class Fact:
    """One fact to edit.

    prompt: with or without the marker at the subject. prompt_name: of its field, for messages.
    paraphrases: of this fact alone, where a row has several facts.
    """

    prompt: str
    prompt_name: str
    subject: str
    target_new: str
    target_old: str | None
    relation: str = ""
    target_id: str = ""
    paraphrases: tuple[str, ...] = ()


class Format(NamedTuple):
    """keys: what its rows have, for messages. fits: whether a row has this format."""

    keys: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Fields], list[Fact]]


def _counterfact(row: Fields) -> list[Fact]:
    """CounterFact: the fact in an object of its own. MQuAKE: several of them."""
    edits = row.values["requested_rewrite"]
    if not isinstance(edits, list):
        return [_fact(row.object("requested_rewrite"), "requested_rewrite.")]
    if not edits:
        raise row.error("requested_rewrite", "expected an object or a list of objects, found an empty list")
    facts = row.objects("requested_rewrite")
    return [_fact(fact, f"requested_rewrite[{i}].") for i, fact in enumerate(facts)]


def _zsre(row: Fields) -> list[Fact]:
    """ZsRE in the form of MEND and ROME."""
    return [Fact(row.text("src"), "src", row.text("subject"), row.target("alt"), row.answer("pred"))]


def _ripple_edits(row: Fields) -> list[Fact]:
    """RippleEdits: the edit as a sentence."""
    edit = row.object("edit")
    prompt, subject, target, old = split_sentence(edit, row.values)
    names = edit.identifier("relation"), edit.identifier("target_id")
    return [Fact(prompt, "edit.prompt", subject, target, old, *names)]


def _wikibio(row: Fields) -> list[Fact]:
    """KnowEdit's WikiBio: a passage and the sentence that is to follow it."""
    return [Fact(row.text("text"), "text", row.text("concept"), row.target("labels"), None)]


def _plain(row: Fields) -> list[Fact]:
    """EasyEdit's flat rows, KnowEdit, QAEdit (where the target is ``target``), and rows written by hand."""
    is_qaedit = "target" in row.values and "target_new" not in row.values
    return [_fact(row, target="target" if is_qaedit else "target_new")]


def _fact(row: Fields, within: str = "", target: str = "target_new") -> Fact:
    new = row.values.get(target)
    return Fact(
        prompt=row.text("prompt"),
        prompt_name=f"{within}prompt",
        subject=row.text("subject"),
        target_new=row.target(target),
        target_old=row.answer(*OLD_TARGETS),
        relation=row.identifier("relation_id"),
        target_id=row.object(target).identifier("id") if isinstance(new, dict) else "",
        paraphrases=tuple(row.texts("question")) if within else (),
    )


FORMATS = (
    Format("requested_rewrite", lambda row: "requested_rewrite" in row, _counterfact),
    Format("edit", lambda row: isinstance(row.get("edit"), dict), _ripple_edits),
    Format("src + subject + alt", lambda row: "src" in row and ("alt" in row or "prompt" not in row), _zsre),
    Format("concept + text + labels", lambda row: {"concept", "labels"} <= row.keys(), _wikibio),
    Format("prompt + subject + target_new", lambda row: "prompt" in row, _plain),
)


def facts_of(row: Row) -> list[Fact]:
    """The facts of a row, by the first format that the row has."""
    values = row.object()
    for format in FORMATS:
        if format.fits(values):
            return format.read(Fields(values, f"{row.where}: "))
    keys = shorten(", ".join(map(repr, values)) or "none", 300)
    expected = ", or ".join(format.keys for format in FORMATS)
    meant = "".join(f"; found {name!r}: did you mean {near!r}?" for name, near in sorted(misspelled(values)))
    raise row.error(f"unknown row format; expected {expected}; the keys are: {keys}{meant}")
