"""Small events and what follows from them, for the rows of NLI and of both kinds of QA.

An event can be told in several ways. From it come sentences that follow (another wording, the view of the
other person) and sentences that do not (roles swapped, a detail of another event of the same text, a
negation, a detail from nowhere). Only the last sort is settled by looking whether the words occur.
"""

from __future__ import annotations

import abc
import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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


POOLS = {"agent": PEOPLE, "other": PEOPLE, "more": PEOPLE, "less": PEOPLE}
POOLS |= {"thing": THINGS, "colour": COLOURS, "place": PLACES}


@dataclass(frozen=True, kw_only=True)
class Event(abc.ABC):
    """What happened, or did not if ``holds`` is false, in one of two wordings."""

    #: Details that a false claim may take from another event of the same sort.
    mixable: ClassVar[tuple[str, ...]] = ()
    holds: bool = True
    second_wording: bool = False

    @abc.abstractmethod
    def sentence(self) -> str:
        """The event in words."""

    @abc.abstractmethod
    def question(self) -> str:
        """Whether it happened, as a question."""

    @abc.abstractmethod
    def queries(self) -> list[tuple[str, str]]:
        """Questions with the answers this event gives."""

    @abc.abstractmethod
    def any_detail(self, rng: random.Random) -> str:
        """The name of a field that a false claim may change."""

    def swapped(self) -> Event | None:
        """The two people in each other's role."""
        return None

    def reworded(self) -> Event:
        return replace(self, second_wording=not self.second_wording)

    def altered(self, story: list[Event], rng: random.Random) -> Event:
        """With a detail the story does not have."""
        name = self.any_detail(rng)
        text = " ".join(event.sentence() for event in story).split()
        detail: dict[str, Any] = {name: rng.choice([word for word in POOLS[name] if word not in text])}
        return replace(self, **detail)

    def mixed(self, event: Event, rng: random.Random) -> Event | None:
        """With one detail of another event, if that is of the same sort."""
        if type(event) is not type(self):
            return None
        details = {name: getattr(event, name) for name in self.mixable}
        names = [name for name, value in details.items() if value != getattr(self, name)]
        if not names:
            return None
        name = rng.choice(names)
        return replace(self, **{name: details[name]})


@dataclass(frozen=True)
class Deal(Event):
    """``agent`` sold/gave/lent a ``thing`` to ``other``; the second wording is the view of ``other``."""

    mixable = ("thing", "agent", "other", "verb")
    verb: tuple[str, ...]
    agent: str
    thing: str
    other: str

    def _parts(self) -> tuple[str, str, str, str, str]:
        past, base, inverse, inverse_base, to, from_ = self.verb
        if self.second_wording:
            return self.other, inverse, inverse_base, from_, self.agent
        return self.agent, past, base, to, self.other

    def sentence(self) -> str:
        first, past, base, link, second = self._parts()
        verb = past if self.holds else f"did not {base}"
        return f"{first} {verb} the {self.thing} {link} {second}"

    def question(self) -> str:
        first, _, base, link, second = self._parts()
        return f"did {first} {base} the {self.thing} {link} {second}"

    def queries(self) -> list[tuple[str, str]]:
        past, base, inverse, inverse_base, to, from_ = self.verb
        if not self.holds:
            return []
        return [
            (f"Who {past} the {self.thing} {to} {self.other}?", self.agent),
            (f"Who {inverse} the {self.thing} {from_} {self.agent}?", self.other),
            (f"What did {self.agent} {base} {to} {self.other}?", f"the {self.thing}"),
            (f"What did {self.other} {inverse_base} {from_} {self.agent}?", f"the {self.thing}"),
        ]

    def any_detail(self, rng: random.Random) -> str:
        return "thing" if rng.random() < 0.5 else rng.choice(("agent", "other"))

    def swapped(self) -> Deal:
        return replace(self, agent=self.other, other=self.agent)


@dataclass(frozen=True)
class Keeping(Event):
    """``agent`` keeps a ``thing`` of a ``colour`` in a ``place``, or does not."""

    mixable = ("place", "agent", "colour")
    agent: str
    thing: str
    colour: str
    place: str

    def sentence(self) -> str:
        if self.second_wording:
            denial = "" if self.holds else "not "
            return f"the {self.colour} {self.thing} of {self.agent} is {denial}in the {self.place}"
        verb = "keeps" if self.holds else "does not keep"
        return f"{self.agent} {verb} a {self.colour} {self.thing} in the {self.place}"

    def question(self) -> str:
        if self.second_wording:
            return f"is the {self.colour} {self.thing} of {self.agent} in the {self.place}"
        return f"does {self.agent} keep a {self.colour} {self.thing} in the {self.place}"

    def queries(self) -> list[tuple[str, str]]:
        found = [(f"What colour is the {self.thing} of {self.agent}?", self.colour)]
        if self.holds:
            found += [
                (f"Where is the {self.thing} of {self.agent}?", f"in the {self.place}"),
                (f"What does {self.agent} keep in the {self.place}?", f"a {self.colour} {self.thing}"),
                (f"Who keeps a {self.thing} in the {self.place}?", self.agent),
            ]
        return found

    def any_detail(self, rng: random.Random) -> str:
        return rng.choice(("agent", "thing", "colour", "place"))


@dataclass(frozen=True)
class Comparison(Event):
    """``more`` is older (taller, ...) than ``less``; the second wording is that ``less`` is younger."""

    order: tuple[str, str]
    more: str
    less: str

    def _parts(self) -> tuple[str, str, str]:
        up, down = self.order
        return (self.less, down, self.more) if self.second_wording else (self.more, up, self.less)

    def sentence(self) -> str:
        first, word, second = self._parts()
        return f"{first} is {'' if self.holds else 'not '}{word} than {second}"

    def question(self) -> str:
        first, word, second = self._parts()
        return f"is {first} {word} than {second}"

    def queries(self) -> list[tuple[str, str]]:
        up, down = self.order
        return [
            (f"Who is {up} than {self.less}?", self.more),
            (f"Who is {down} than {self.more}?", self.less),
        ]

    def any_detail(self, rng: random.Random) -> str:
        return rng.choice(("more", "less"))

    def swapped(self) -> Comparison:
        return replace(self, more=self.less, less=self.more)


def events(rng: random.Random, count: int) -> list[Event]:
    """Two or more events about different people and things.

    At least two are of one sort, so that details can be mixed up, and at least one took place.
    """
    found: list[Event] = []
    while not any(event.holds for event in found):
        people = rng.sample(PEOPLE, 2 * count)
        things, places = rng.sample(THINGS, count), rng.sample(PLACES, count)
        sorts: list[type[Event]] = [rng.choice((Deal, Keeping))] * 2
        sorts += [rng.choice((Deal, Keeping, Comparison)) for _ in range(count - 2)]
        rng.shuffle(sorts)
        found = []
        for index, (sort, thing, place) in enumerate(zip(sorts, things, places, strict=True)):
            a, b = people[2 * index : 2 * index + 2]
            holds, second = rng.random() < 0.7, rng.random() < 0.5
            if sort is Deal:
                found.append(Deal(rng.choice(DEALS), a, thing, b, holds=holds, second_wording=second))
            elif sort is Keeping:
                colour = rng.choice(COLOURS)
                found.append(Keeping(a, thing, colour, place, holds=holds, second_wording=second))
            else:
                found.append(Comparison(rng.choice(ORDERS), a, b, second_wording=second))
    return found


def passage(story: list[Event]) -> str:
    """The events as sentences with a capital and a full stop."""
    sentences = [event.sentence() for event in story]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def claim(rng: random.Random, story: list[Event], follows: bool, negations: bool = True) -> tuple[Event, str]:
    """A claim that the story supports or not, and its sort.

    ``negations``: whether the claim may itself be a denial (a question may not).
    """
    while True:
        index = rng.randrange(len(story))
        event = story[index]
        if not negations and not event.holds:
            # Asked about what did not happen: the answer is no.
            if follows:
                continue
            return replace(_maybe_reworded(rng, event), holds=True), "denied"
        if follows:
            new = _maybe_reworded(rng, event)
            return new, "same" if new == event else "reworded"
        others = story[:index] + story[index + 1 :]
        sort = rng.choices(("absent", "negated", "swapped", "mixed"), (8, 6 if negations else 0, 4, 4))[0]
        if sort == "negated":
            return _maybe_reworded(rng, replace(event, holds=not event.holds)), sort
        changed: Event | None
        if sort == "absent":
            changed = event.altered(story, rng)
        elif sort == "swapped":
            changed = event.swapped()
        else:
            changed = event.mixed(rng.choice(others), rng)
        if changed is not None and event.holds:  # if not, the claim is neither true nor false
            return _maybe_reworded(rng, changed), sort


def _maybe_reworded(rng: random.Random, event: Event) -> Event:
    return event.reworded() if rng.random() < 0.5 else event
