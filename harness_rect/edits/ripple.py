"""The edits of RippleEdits (Cohen et al. 2024, arXiv 2307.12976): whole sentences, taken apart.

A row names subject, relation and target by identifiers, and its sentence is the relation's wording with the
subject's label, then the target's label and a full stop. The files hold no label of the subject, and their
authors looked labels up in Wikidata. Here the subject is what stands where the relation's wording has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness_rect.edits.edit import MARKER, shorten
from harness_rect.edits.fields import Fields, listed

#: Relations that are not worded "The name of the (relation) of {} is".
_WORDINGS = {
    "AWARD_RECEIVED": "The name of the award {} won is",
    "CAPITAL": "The name of the capital city of {} is",
    "CAPITAL_OF": "The name of the country which {} is the capital of is",
    "CAST_MEMBER": "The names of the cast members of {} are",
    "CONTINENT": "The name of the continent which {} is part of is",
    "COUNTRY": "The name of the country which {} is associated with is",
    "CURRENCY": "The name of the currency in {} is",
    "ETHNIC_GROUP": "The name of the ethnic group which {} is associated with is",
    "FOLLOWED_BY": "{} is followed by",
    "FOLLOWS": "{} follows",
    "IS_ALIVE": "Is {} still alive?",
    "LEAGUE": "The name of the league which {} plays in is",
    "LIKELY_ANTHEM": "The name of the anthem that is most likely to be performed in {} is",
    "MEMBER_OF_SPORTS_TEAM": "The name of the sports team which {} is a member of is",
    "NATIVE_LANGUAGE": "The mother tongue of {} is",
    "NUMBER_OF_CHILDREN": "The number of children {} has is",
    "POSITION_HELD": "The name of the position held by {} is",
    "RELIGION": "The name of the religion which {} is associated with is",
    "SEX_OR_GENDER": "The gender of {} is",
    "SIBLING": "The names of the siblings of {} are",
}
#: Relations worded "The (relation) of {} is".
_WITHOUT_NAME = (
    *("DATE_OF_BIRTH", "DATE_OF_DEATH", "EYE_COLOR", "OCCUPATION", "OFFICIAL_LANGUAGE", "PLACE_OF_BIRTH"),
    *("PLACE_OF_BURIAL", "PLACE_OF_DEATH", "SEXUAL_ORIENTATION"),
)


#: What holds the fact that is replaced, in the files and in their description.
_OLD = ("original_fact", "previous_fact")


def split_sentence(edit: Fields, row: Mapping[str, Any]) -> tuple[str, str, str, str | None]:
    """Take the sentence of an edit apart.

    Args:
        edit: the row's ``edit``. Labels given in it as ``subject`` and ``target`` are used instead of the
            relation's wording.
        row: the whole row, whose queries have labels of the target.

    Returns:
        prompt, subject, new target, and old target or None.

    Raises:
        UserError: the sentence cannot be taken apart, or can be in several ways.
    """
    sentence, relation = edit.text("prompt").strip().removesuffix("."), edit.text("relation")
    old = next((edit.object(name).text("prompt") for name in _OLD if edit.values.get(name)), "").strip()
    if edit.values.get("subject") and edit.values.get("target"):
        subject, target = edit.text("subject"), edit.text("target")
        splits = (
            [(sentence.removesuffix(target).rstrip(), subject, target)] if sentence.endswith(target) else []
        )
    else:
        splits = list(_splits(sentence, wording(relation)))
        if len(splits) > 1:
            labels = set(_labels(edit.values.get("target_id"), row))
            splits = [split for split in splits if split[2] in labels] or splits
        if len(splits) > 1:
            # Both facts begin with the same subject: the longest beginning that they share has all of it.
            splits = [split for split in splits if old.startswith(_stem(split))][-1:] or splits
    if len(splits) != 1:
        how_many = "several ways" if splits else "no way"
        raise edit.error(
            "prompt",
            f"{how_many} to take {shorten(sentence, 160)!r} apart into the wording of {relation}, a subject"
            " and a target; give the labels of subject and target as edit.subject and edit.target",
        )
    prompt, subject, target = splits[0]
    stem = _stem(splits[0])
    before = old.removeprefix(stem).removesuffix(".").strip() if old.startswith(stem) else ""
    return prompt, subject, target, before or None


def wording(relation: str) -> str:
    """The wording of a relation up to its target, with the marker at the subject."""
    words = relation.lower().replace("_", " ")
    if relation in _WITHOUT_NAME:
        return f"The {words} of {MARKER} is"
    return _WORDINGS.get(relation, f"The name of the {words} of {MARKER} is")


def _stem(split: tuple[str, str, str]) -> str:
    return split[0].replace(MARKER, split[1], 1) + " "


def _splits(sentence: str, wording: str) -> Iterator[tuple[str, str, str]]:
    """(wording, subject, target) for each place at which the subject may end."""
    before, after = wording.split(MARKER)
    rest, at = sentence.removeprefix(before), 0
    while sentence.startswith(before) and (at := rest.find(f"{after} ", at + 1)) > 0:
        if target := rest[at + len(after) :].strip():
            yield wording, rest[:at], target


def _labels(identifier: Any, row: Mapping[str, Any]) -> Iterator[Any]:
    """The labels that the queries of a row have of a thing."""
    tests = [test for tests in row.values() for test in listed(tests) if isinstance(test, dict)]
    for query in (query for test in tests for query in listed(test.get("test_queries"))):
        if isinstance(query, dict):
            things = query.get("second_hop_target_ids") or query.get("target_ids")
            for thing, answer in zip(listed(things), listed(query.get("answers")), strict=False):
                if thing == identifier and isinstance(answer, dict):
                    yield answer.get("value")
