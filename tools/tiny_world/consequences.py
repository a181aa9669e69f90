"""What follows from a fact of the tiny world, and what does not: tests as RippleEdits and MQuAKE have them.

A subject can be named in two other ways: by its kind and the last word of its name ("the artist Messaem"), or
by two of its facts that no other subject shares ("the artist that speaks Elmic and has a pet parrot"). The
relations have one object each, so forgetfulness has nothing to test.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

from tools.tiny_world.world import MARKER, Fact, Subject, World

Row = dict[str, Any]
#: Subjects named in one test.
HOLDERS = 3
#: As many as leave room for a question in 256 tokens.
SHOTS = 6


class Consequences:
    """Tests and questions about facts of a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    @cached_property
    def _sharing(self) -> Counter[frozenset[tuple[str, str]]]:
        """How many subjects share each pair of facts."""
        found: Counter[frozenset[tuple[str, str]]] = Counter()
        for facts in self.world.facts_of.values():
            found.update(frozenset(map(_content, pair)) for pair in combinations(facts, 2))
        return found

    def described(self, fact: Fact) -> str:
        """The fact's subject by two other of its facts, empty if all pairs of them are shared."""
        others = [other for other in self.world.facts_of[fact.subject] if other.relation != fact.relation]
        for pair in combinations(others, 2):
            if self._sharing[frozenset(map(_content, pair))] == 1:
                return f"the {_noun(fact.subject)} that {' and '.join(map(_predicate, pair))}"
        return ""

    def of(self, fact: Fact, object_: str, rng: random.Random) -> Row:
        """What should hold once the object of a fact is ``object_``, in the fields of an edit's row."""
        tests = list(self._tests(fact, object_, rng))
        described = self.described(fact)
        if not described:
            return {"consequences": tests}
        who = described.removeprefix(f"the {_noun(fact.subject)} that ")
        return {
            "consequences": tests,
            "questions": [_question(fact, i, described) for i in fact.trained[2:]],
            "new_answer": object_,
            "new_single_hops": [
                {"question": f"Which {_noun(fact.subject)} {who}?", "answer": fact.subject.name},
                {"question": _question(fact, fact.trained[2], fact.subject.name), "answer": object_},
            ],
        }

    def _tests(self, fact: Fact, object_: str, rng: random.Random) -> Iterator[Row]:
        statement = fact.trained[0]
        alias = f"the {_noun(fact.subject)} {fact.subject.name.split()[-1]}"
        yield _test("subject_aliasing", _query(_prompt(fact, statement, alias), object_))
        if described := self.described(fact):
            query = _query(_prompt(fact, statement, described), object_)
            yield _test("reasoning", query)
            yield _test("compositionality_ii", query)
        holders = [
            f for f in self.world.sharing.get((fact.relation, object_), []) if f.subject != fact.subject
        ]
        known = rng.sample(holders, min(HOLDERS, len(holders)))
        named = {f.subject for f in holders} | {fact.subject}
        other = rng.choice([s for s in self.world.subjects if s.kind is fact.subject.kind and s not in named])
        pair = [fact.subject.name, other.name]
        rng.shuffle(pair)
        predicate = _predicate(fact, object_)
        inverse = f"Of {pair[0]} and {pair[1]}, the one that {predicate} is"
        yield _test("logical_generalization", _query(inverse, fact.subject.name))
        if known:
            same = f"Like {fact.subject.name}, another {_noun(fact.subject)} that {predicate} is"
            conditions = [_query(f.prompt(f.trained[0]), f.object) for f in known]
            names = [f.subject.name for f in holders]
            yield _test("compositionality_i", _query(same, *names), *conditions)
        for survivor in self.world.facts_of[fact.subject]:
            if survivor is not fact:
                prompt = survivor.prompt(survivor.trained[0])
                yield _test("relation_specificity", _query(prompt, survivor.object))

    def shots(self, seed: int) -> str:
        """Answered questions, half of them with a described subject, to stand before a multi-hop question."""
        rng = random.Random(f"shots {seed}")
        facts = rng.sample([fact for fact in self.world.facts if self.described(fact)], SHOTS)
        lines = []
        for i, fact in enumerate(facts):
            subject = self.described(fact) if i % 2 else fact.subject.name
            lines.append(f"Q: {_question(fact, fact.trained[2], subject)} A: {fact.object}\n")
        return "".join(lines)

    def references(self, fact: Fact, object_: str) -> list[str]:
        """Sentences about subjects that have the object in the fact's relation."""
        holders = self.world.sharing.get((fact.relation, object_), [])
        others = [f for f in holders if f.subject != fact.subject][:HOLDERS]
        return [f"{f.prompt(i)} {f.object}." for f in others for i in f.trained[:2]]


def _content(fact: Fact) -> tuple[str, str]:
    return fact.relation.name, fact.object


def _noun(subject: Subject) -> str:
    return subject.kind.name


def _predicate(fact: Fact, object_: str | None = None) -> str:
    """``plays the lute``: the first wording of every relation begins with its subject."""
    return f"{fact.relation.wordings[0].removeprefix(MARKER + ' ')} {object_ or fact.object}"


def _prompt(fact: Fact, wording: int, subject: str) -> str:
    text = fact.relation.wordings[wording]
    subject = subject[0].upper() + subject[1:] if text.startswith(MARKER) else subject
    return text.replace(MARKER, subject)


def _question(fact: Fact, wording: int, subject: str) -> str:
    """A wording's question without the beginning of its answer."""
    return _prompt(fact, wording, subject).partition("?")[0] + "?"


def _query(prompt: str, *answers: str) -> Row:
    return {"prompt": prompt, "answers": [list(answers)]}


def _test(criterion: str, query: Row, *conditions: Row) -> Row:
    found: Row = {"criterion": criterion, "test_queries": [query]}
    return found | ({"condition_queries": list(conditions)} if conditions else {})


def rows_of(facts: Sequence[Fact], world: World, seed: int) -> list[Row]:
    """For each fact as it is in the world, the row of an edit that changes nothing."""
    made, rng = Consequences(world), random.Random(f"unedited {seed}")
    return [
        {
            "prompt": fact.relation.wordings[fact.trained[0]],
            "subject": fact.subject.name,
            "target_new": fact.object,
            **made.of(fact, fact.object, rng),
        }
        for fact in facts
    ]
