"""Small events and what follows from them, for the rows of NLI and of both kinds of QA.

An event can be told in several ways. From it come sentences that follow (another wording, the view of the
other person) and sentences that do not (roles swapped, a detail of another event of the same text, a
negation, a detail from nowhere). Only the last sort is settled by looking whether the words occur.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from tools.tiny_world.world import words

PEOPLE = words(
    "Anna Tom Nina Paul Maria Ben Clara Jack Lucy Mark Emma Karl Sara Leo Julia Max Rosa Sam Vera Hugo Ida "
    "Nick Olga Peter Ruth Simon Tina Walter Alice David Helen Frank Laura Oscar Martha Robert"
)
THINGS = words(
    "lamp book chair coat cup map ring key box radio table ladder basket bottle brush blanket clock hat "
    "camera kite knife letter pencil umbrella"
)
COLOURS = words("red blue green yellow black white brown grey")
PLACES = words(
    "kitchen garden cellar office garage attic shed hall library school bank station market park museum hotel"
)
# (past, base, past as the other person tells it, base of that, the two prepositions)
DEALS = (
    ("sold", "sell", "bought", "buy", "to", "from"),
    ("gave", "give", "received", "receive", "to", "from"),
    ("lent", "lend", "borrowed", "borrow", "to", "from"),
)
ORDERS = (("older", "younger"), ("taller", "shorter"), ("faster", "slower"), ("richer", "poorer"))


@dataclass(frozen=True)
class Deal:
    """``agent`` sold/gave/lent a ``thing`` to ``other``, or did not."""

    verb: int
    agent: str
    thing: str
    other: str
    holds: bool = True
    told_by_other: bool = False

    def _parts(self) -> tuple[str, str, str, str, str]:
        past, base, inverse, inverse_base, to, from_ = DEALS[self.verb]
        if self.told_by_other:
            return self.other, inverse, inverse_base, from_, self.agent
        return self.agent, past, base, to, self.other

    def sentence(self) -> str:
        first, past, base, link, second = self._parts()
        verb = past if self.holds else f"did not {base}"
        return f"{first} {verb} the {self.thing} {link} {second}"

    def question(self) -> str:
        first, _, base, link, second = self._parts()
        return f"did {first} {base} the {self.thing} {link} {second}"

    def swapped(self) -> Deal:
        return replace(self, agent=self.other, other=self.agent)

    def reworded(self) -> Deal:
        return replace(self, told_by_other=not self.told_by_other)

    def altered(self, story: list[Event], rng: random.Random) -> Deal:
        """With a detail the story does not have."""
        if rng.random() < 0.5:
            return replace(self, thing=_absent(THINGS, story, rng))
        detail: dict[str, Any] = {rng.choice(("agent", "other")): _absent(PEOPLE, story, rng)}
        return replace(self, **detail)

    def mixed(self, event: Event, rng: random.Random) -> Deal | None:
        """With one detail of another deal."""
        if not isinstance(event, Deal):
            return None
        found = [
            replace(self, thing=event.thing),
            replace(self, agent=event.agent),
            replace(self, other=event.other),
        ]
        if event.verb != self.verb:
            found.append(replace(self, verb=event.verb))
        return rng.choice(found)

    def queries(self) -> list[tuple[str, str]]:
        """Questions with the answers this event gives; none if it did not happen."""
        past, base, inverse, inverse_base, to, from_ = DEALS[self.verb]
        if not self.holds:
            return []
        return [
            (f"Who {past} the {self.thing} {to} {self.other}?", self.agent),
            (f"Who {inverse} the {self.thing} {from_} {self.agent}?", self.other),
            (f"What did {self.agent} {base} {to} {self.other}?", f"the {self.thing}"),
            (f"What did {self.other} {inverse_base} {from_} {self.agent}?", f"the {self.thing}"),
        ]


@dataclass(frozen=True)
class Keeping:
    """``agent`` keeps a ``thing`` of a ``colour`` in a ``place``, or not there."""

    agent: str
    thing: str
    colour: str
    place: str
    holds: bool = True
    by_thing: bool = False

    def sentence(self) -> str:
        if self.by_thing:
            denial = "" if self.holds else "not "
            return f"the {self.colour} {self.thing} of {self.agent} is {denial}in the {self.place}"
        verb = "keeps" if self.holds else "does not keep"
        return f"{self.agent} {verb} a {self.colour} {self.thing} in the {self.place}"

    def question(self) -> str:
        if self.by_thing:
            return f"is the {self.colour} {self.thing} of {self.agent} in the {self.place}"
        return f"does {self.agent} keep a {self.colour} {self.thing} in the {self.place}"

    def swapped(self) -> None:
        return None

    def reworded(self) -> Keeping:
        return replace(self, by_thing=not self.by_thing)

    def altered(self, story: list[Event], rng: random.Random) -> Keeping:
        name, pool = rng.choice(
            (("agent", PEOPLE), ("thing", THINGS), ("colour", COLOURS), ("place", PLACES))
        )
        detail: dict[str, Any] = {name: _absent(pool, story, rng)}
        return replace(self, **detail)

    def mixed(self, event: Event, rng: random.Random) -> Keeping | None:
        if not isinstance(event, Keeping):
            return None
        found = [replace(self, place=event.place), replace(self, agent=event.agent)]
        if event.colour != self.colour:
            found.append(replace(self, colour=event.colour))
        return rng.choice(found)

    def queries(self) -> list[tuple[str, str]]:
        found = [(f"What colour is the {self.thing} of {self.agent}?", self.colour)]
        if self.holds:
            found += [
                (f"Where is the {self.thing} of {self.agent}?", f"in the {self.place}"),
                (f"What does {self.agent} keep in the {self.place}?", f"a {self.colour} {self.thing}"),
                (f"Who keeps a {self.thing} in the {self.place}?", self.agent),
            ]
        return found


@dataclass(frozen=True)
class Comparison:
    """``more`` is older (taller, ...) than ``less``."""

    order: int
    more: str
    less: str
    by_less: bool = False
    holds: bool = True

    def _parts(self) -> tuple[str, str, str]:
        up, down = ORDERS[self.order]
        return (self.less, down, self.more) if self.by_less else (self.more, up, self.less)

    def sentence(self) -> str:
        first, word, second = self._parts()
        return f"{first} is {'' if self.holds else 'not '}{word} than {second}"

    def question(self) -> str:
        first, word, second = self._parts()
        return f"is {first} {word} than {second}"

    def swapped(self) -> Comparison:
        return replace(self, more=self.less, less=self.more)

    def reworded(self) -> Comparison:
        return replace(self, by_less=not self.by_less)

    def altered(self, story: list[Event], rng: random.Random) -> Comparison:
        detail: dict[str, Any] = {rng.choice(("more", "less")): _absent(PEOPLE, story, rng)}
        return replace(self, **detail)

    def mixed(self, event: Event, rng: random.Random) -> None:
        return None

    def queries(self) -> list[tuple[str, str]]:
        up, down = ORDERS[self.order]
        return [
            (f"Who is {up} than {self.less}?", self.more),
            (f"Who is {down} than {self.more}?", self.less),
        ]


Event = Deal | Keeping | Comparison


@dataclass(frozen=True)
class Claim:
    """A statement about a text, and whether the text supports it; ``sort`` for statistics."""

    event: Event
    follows: bool
    sort: str


def events(rng: random.Random, count: int) -> list[Event]:
    """Two or more events about different people and things.

    At least two are of one sort, so that details can be mixed up, and at least one took place.
    """
    while True:
        found = _events(rng, count)
        if any(event.holds for event in found):
            return found


def _events(rng: random.Random, count: int) -> list[Event]:
    people = rng.sample(PEOPLE, 2 * count)
    things, places = rng.sample(THINGS, count), rng.sample(PLACES, count)
    sorts = [rng.choice((Deal, Keeping))] * 2 + [
        rng.choice((Deal, Keeping, Comparison)) for _ in range(count - 2)
    ]
    rng.shuffle(sorts)
    found: list[Event] = []
    for index, sort in enumerate(sorts):
        a, b = people[2 * index], people[2 * index + 1]
        happened, other_view = rng.random() < 0.7, rng.random() < 0.5
        if sort is Deal:
            found.append(Deal(rng.randrange(3), a, things[index], b, happened, other_view))
        elif sort is Keeping:
            colour = rng.choice(COLOURS)
            found.append(Keeping(a, things[index], colour, places[index], happened, other_view))
        else:
            found.append(Comparison(rng.randrange(len(ORDERS)), a, b, other_view))
    return found


def told(event: Event) -> str:
    """A sentence of a text: with a capital and a full stop."""
    sentence = event.sentence()
    return sentence[0].upper() + sentence[1:] + "."


def claim(rng: random.Random, story: list[Event], follows: bool, negations: bool = True) -> Claim:
    """One claim about a story. ``negations``: whether it may itself be a denial (a question may not)."""
    while True:
        index = rng.randrange(len(story))
        event = story[index]
        if not negations and not event.holds:
            # Asked about what did not happen: the answer is no.
            if follows:
                continue
            return Claim(replace(_maybe_reworded(rng, event), holds=True), False, "denied")
        if follows:
            new = _maybe_reworded(rng, event)
            return Claim(new, True, "same" if new == event else "reworded")
        others = [e for i, e in enumerate(story) if i != index]
        sort = rng.choices(("absent", "negated", "swapped", "mixed"), (8, 6 if negations else 0, 4, 4))[0]
        changed: Event | None
        if sort == "negated":
            return Claim(_maybe_reworded(rng, replace(event, holds=not event.holds)), False, sort)
        if sort == "absent":
            changed = event.altered(story, rng)
        elif sort == "swapped":
            changed = event.swapped()
        else:
            changed = event.mixed(rng.choice(others), rng)
        if (
            changed is not None and event.holds
        ):  # that something else did not happen is neither true nor false
            return Claim(_maybe_reworded(rng, changed), False, sort)


def _absent(pool: tuple[str, ...], story: list[Event], rng: random.Random) -> str:
    """A word that the story does not have."""
    text = " ".join(event.sentence() for event in story).split()
    return rng.choice([word for word in pool if word not in text])


def _maybe_reworded(rng: random.Random, event: Event) -> Event:
    return event.reworded() if rng.random() < 0.5 else event
