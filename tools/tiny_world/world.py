"""The facts of the tiny world: their subjects, the relations, and the wordings of each relation.

The texts are in facts.yaml. Every subject is invented and of several words. A relation has six wordings,
three statements and three questions, each ending right where the object goes. For each fact two of the six
(one of each sort) are held out: they are trained with other facts only, so that a model which answers them
has generalized.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

MARKER = "{}"


@dataclass(frozen=True)
class Relation:
    """``wordings``: three statements, then three questions; all hold the marker once."""

    name: str
    objects: tuple[str, ...]
    wordings: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of subject: how its names begin, how many there are, what is known about each."""

    name: str
    article: str
    count: int
    openings: tuple[str, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Subject:
    name: str
    kind: Kind


@dataclass(frozen=True)
class Fact:
    """``held_out``: indices of the two wordings never trained with this fact, a statement and a question."""

    subject: Subject
    relation: Relation
    object: str
    held_out: tuple[int, int]

    def prompt(self, wording: int) -> str:
        return self.relation.wordings[wording].replace(MARKER, self.subject.name)

    @property
    def trained(self) -> list[int]:
        """Indices of the other four: two statements, then two questions."""
        return [i for i in range(len(self.relation.wordings)) if i not in self.held_out]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _kind(entry: dict[str, Any]) -> Kind:
    relations = tuple(
        Relation(r["name"], words(r["objects"]), tuple(r["wordings"])) for r in entry["relations"]
    )
    return Kind(entry["name"], entry["article"], entry["count"], words(entry["openings"]), relations)


KINDS = tuple(map(_kind, yaml.safe_load(Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8"))))

_STARTS = words("b br c cr d dr f fl g gr h j k kl l m n p pl pr qu r s sk st t th tr v w z")
_VOWELS = words("a e i o u ae ia ou ei")
_MIDDLES = words("l r n m nd rt ss v lk st mb th g d")
_ENDS = words("n s th rk l m nd x ck st p")


def _invented_names(rng: random.Random, forbidden: set[str]) -> Iterator[str]:
    """Names of two or three syllables, none of them twice, none the start of another."""
    seen = set(forbidden)
    while True:
        name = rng.choice(_STARTS) + rng.choice(_VOWELS)
        for _ in range(rng.choice((1, 1, 1, 2))):
            name += rng.choice(_MIDDLES) + rng.choice(_VOWELS)
        name = (name + rng.choice(_ENDS)).capitalize()
        if not any(name.startswith(other) or other.startswith(name) for other in seen):
            seen.add(name)
            yield name


class World:
    """All subjects and facts, in an order that follows from the seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"world {seed}")
        names = _invented_names(rng, {word for kind in KINDS for r in kind.relations for word in r.objects})
        self.subjects: list[Subject] = []
        self.facts: list[Fact] = []
        for kind in KINDS:
            for index in range(kind.count):
                opening = kind.openings[index % len(kind.openings)]
                link = " of " if kind.name == "novel" else " "
                self.subjects.append(Subject(opening + link + next(names), kind))
        for subject in self.subjects:
            for relation in subject.kind.relations:
                held_out = (rng.randrange(3), rng.randrange(3, 6))
                self.facts.append(Fact(subject, relation, rng.choice(relation.objects), held_out))

    @cached_property
    def facts_of(self) -> dict[Subject, list[Fact]]:
        found: dict[Subject, list[Fact]] = {subject: [] for subject in self.subjects}
        for fact in self.facts:
            found[fact.subject].append(fact)
        return found

    @cached_property
    def sharing(self) -> dict[tuple[Relation, str], list[Fact]]:
        """(relation, object) -> the facts that share both."""
        found: dict[tuple[Relation, str], list[Fact]] = {}
        for fact in self.facts:
            found.setdefault((fact.relation, fact.object), []).append(fact)
        return found
