"""Training documents: facts, task rows with their answers, drills, and prose.

A document is a list of pieces, each a text and whether it is an answer: the loss counts answers in full and
the rest a little (see train.py). Small models stay at chance for long where two things have to be compared
(NLI, yes/no questions, choices). The drills give them the same comparisons in short form, many to a document,
and pure copying comes first: PHASES says when what is frequent.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from math import inf
from typing import NamedTuple

from tools.tiny_world.scenes import COLOURS, ORDERS, PEOPLE, PLACES, THINGS, Event, claim, events, passage
from tools.tiny_world.tasks import TASKS, WORDS, dialogue_row, opinion, sentiment_row, test_texts
from tools.tiny_world.world import Fact, World

Piece = tuple[str, bool]
Document = list[Piece]


class Phase(NamedTuple):
    """What documents are drawn up to a step: ``shares`` in the order of SORTS, ``tasks`` in that of TASKS."""

    until: float
    shares: tuple[float, ...]
    tasks: tuple[float, ...]
    drills: str


SORTS = ("copies", "drills", "facts", "prose", "rows")
# Shares count documents. One skill after the other is learned in far fewer steps than all of them at once:
# copying, then comparing in its barest forms, then comparing as the tasks need it, then the tasks.
PHASES = (
    Phase(250, (66, 0, 16, 3, 15), (1, 1, 2, 1, 1, 2, 2, 1), "bare"),
    Phase(700, (8, 46, 18, 3, 25), (1, 2, 2, 2, 2, 1, 2, 2), "bare"),
    Phase(2400, (2, 42, 15, 3, 38), (1, 4, 2, 4, 4, 1, 2, 2), "all"),
    Phase(4000, (2, 16, 20, 3, 59), (1, 4, 2, 4, 4, 1, 2, 2), "all"),
    # Choosing a letter is learned last: with the rate up again, mostly that, then everything once more.
    Phase(4600, (2, 55, 15, 3, 25), (1, 2, 2, 2, 8, 1, 2, 2), "choosing"),
    Phase(5200, (2, 20, 20, 3, 55), (1, 4, 2, 4, 6, 1, 2, 2), "all"),
    # For rect-tiny-llama, which by then copies and recalls but does not compare.
    Phase(5900, (4, 70, 12, 2, 12), (1, 2, 2, 2, 2, 1, 2, 2), "bare"),
    Phase(6700, (2, 50, 14, 3, 31), (1, 4, 2, 4, 6, 1, 2, 2), "all"),
    Phase(7000, (2, 55, 15, 3, 25), (1, 2, 2, 2, 8, 1, 2, 2), "choosing"),
    Phase(inf, (2, 20, 20, 3, 55), (1, 4, 2, 4, 6, 1, 2, 2), "all"),
)


class Corpus:
    """An endless source of documents; what is drawn depends on the random generator and the progress only."""

    def __init__(self, world: World, test_seed: int) -> None:
        self.world = world
        self._held_out = test_texts(test_seed)

    def document(self, rng: random.Random, step: int) -> Document:
        """A document as it may come in a step of training; none holds the text of a test row."""
        phase = next(phase for phase in PHASES if step < phase.until)
        while True:
            document = self._document(rng, phase)
            text = "".join(piece for piece, _ in document)
            if not any(held_out in text for held_out in self._held_out):
                return document

    def _document(self, rng: random.Random, phase: Phase) -> Document:
        sort = rng.choices(SORTS, phase.shares)[0]
        if sort == "copies":
            return rng.choice(COPIES)(rng)
        if sort == "drills":
            return rng.choice(DRILLS[phase.drills])(rng)
        if sort == "facts":
            return self._facts(rng)
        if sort == "prose":
            return [(prose(rng), False)]
        task = rng.choices(TASKS, phase.tasks)[0]
        prompt, answer = rng.choice(task.documents(task.make(rng)))
        return [(prompt, False), (answer, True)]

    def _facts(self, rng: random.Random) -> Document:
        return rng.choices((self._one_fact, self._profile, self._mixed_facts), (4, 3, 3))[0](rng)

    def _one_fact(self, rng: random.Random) -> Document:
        """One fact, often after other text."""
        fact = rng.choice(self.world.facts)
        roll = rng.random()
        wording = rng.choice(fact.trained)
        if roll < 0.4:
            return _fact(fact, wording)
        if roll < 0.6 and wording >= 3:
            return [("nq question: ", False), *_fact(fact, wording)]
        return [(prefix(rng) + " ", False), *_fact(fact, wording)]

    def _profile(self, rng: random.Random) -> Document:
        """Several facts of one subject."""
        subject = rng.choice(self.world.subjects)
        facts = list(self.world.facts_of[subject])
        rng.shuffle(facts)
        kind = subject.kind
        pieces: Document = []
        if rng.random() < 0.5:
            verb, _, name = kind.article.partition(" ")
            pieces += [(f"{subject.name} is {verb}", False), (f" {name}", True), (". ", False)]
        elif rng.random() < 0.3:
            pieces.append((prefix(rng) + " ", False))
        return pieces + _one_after_another(rng, facts[: rng.randint(2, len(facts))])

    def _mixed_facts(self, rng: random.Random) -> Document:
        """Facts of different subjects, half the time of one relation."""
        facts = rng.sample(self.world.facts, 3)
        if rng.random() < 0.5:
            relation = facts[0].relation
            facts = rng.sample([fact for fact in self.world.facts if fact.relation is relation], 3)
        return _one_after_another(rng, facts)


def _fact(fact: Fact, wording: int) -> Document:
    return [(fact.prompt(wording), False), (f" {fact.object}", True), (".", False)]


def _one_after_another(rng: random.Random, facts: list[Fact]) -> Document:
    """The facts in any of their trained wordings, with spaces between them."""
    pieces: Document = []
    for fact in facts:
        pieces += [*_fact(fact, rng.choice(fact.trained)), (" ", False)]
    return pieces[:-1]


def prose(rng: random.Random) -> str:
    """A few sentences without facts, with varied beginnings."""
    return " ".join(_sentence(rng) for _ in range(rng.randint(1, 3)))


def _sentence(rng: random.Random) -> str:
    event, other = (event.sentence() for event in events(rng, 2))
    review = sentiment_row(rng)["sentence"].replace(" ,", ",")
    thing, place, colour = rng.choice(THINGS), rng.choice(PLACES), rng.choice(COLOURS)
    up, down = rng.choice(ORDERS)
    a, b = rng.sample(PEOPLE, 2)
    return rng.choice(
        (
            passage(events(rng, 2)[:1]),
            f"Because {event}, {other}.",
            f"Because the {thing} is {colour}, {a} likes it.",
            f"Therefore {event}.",
            f"Therefore the {thing} is in the {place}.",
            f"I think that {event}.",
            f"I saw the {colour} {thing} in the {place}.",
            f"You know that {a} is {up} than {b}.",
            f"You can ask {a} why the {thing} is {colour}.",
            f"The {thing} in the {place} is {colour}.",
            f"The {up} of the two is {a}, the {down} is {b}.",
            f"{review[0].upper()}{review[1:]}.",
        )
    )


def prefix(rng: random.Random) -> str:
    """Text to stand before a fact: a sentence, or the beginning of one, cut anywhere."""
    words = prose(rng).split()
    return " ".join(words[: rng.randint(1, 12)]).rstrip(".,?") + "."


NOUNS = (*PEOPLE, *THINGS, *PLACES, *COLOURS)


def _repetition(rng: random.Random) -> Document:
    """A row of words, twice."""
    words = rng.sample(NOUNS, rng.randint(3, 14))
    if rng.random() < 0.3:
        words.insert(0, prefix(rng))
    rest = " " + " ".join(words[1:]) + "."
    return [(f"{words[0]}{rest} {words[0]}", False), (rest, True)]


def _lookup(rng: random.Random) -> Document:
    """Pairs; then the second word of each, asked for by the first."""
    size = rng.randint(2, 7)
    pairs = list(zip(rng.sample(PEOPLE, size), rng.sample((*THINGS, *PLACES), size), strict=True))
    if rng.random() < 0.5:
        pairs = [(b, a) for a, b in pairs]
    link, stop = rng.choice(((":", "."), (" has", ","), ("", ","), (" the", ".")))
    pieces: Document = [(" ".join(f"{a}{link} {b}{stop}" for a, b in pairs), False)]
    rng.shuffle(pairs)
    for a, b in pairs:
        pieces += [(f" {a}{link}", False), (f" {b}", True), (stop, False)]
    return pieces


COPIES: tuple[Callable[[random.Random], Document], ...] = (_repetition, _lookup)


def _membership(rng: random.Random) -> Document:
    """Seen before: yes or no, each word asked once."""
    pool = rng.choice((THINGS, PLACES, PEOPLE, COLOURS))
    words = rng.sample(pool, min(len(pool), rng.choice((6, 10, 16))))
    there, absent = words[: len(words) // 2], words[len(words) // 2 :]
    pieces: Document = [(" ".join(there) + ".", False)]
    for word in rng.sample(words, len(words)):
        pieces += [(f" {word}?", False), (" no" if word in absent else " yes", True)]
    return pieces


def _all_seen(rng: random.Random) -> Document:
    """Seen before, all of them: yes or no, or True or False."""
    words = rng.sample(NOUNS, rng.randint(4, 9))
    others = [word for word in NOUNS if word not in words]
    rng.shuffle(others)
    question, mark, yes, no = rng.choice(
        (
            ("", "?", " yes", " no"),
            (" question:", ". answer:", " yes", " no"),
            (" entails the", ". True or False? answer:", " True", " False"),
        )
    )
    pieces: Document = [(" ".join(words) + ".", False)]
    for _ in range(6):
        asked = rng.sample(words, rng.randint(1, 4))
        seen = rng.random() < 0.5
        if not seen:
            asked[rng.randrange(len(asked))] = others.pop()
        pieces += [(f"{question} {' '.join(asked)}{mark}", False), (yes if seen else no, True)]
    return pieces


def _options(texts: list[str]) -> str:
    return "".join(f"({letter}){text}" for letter, text in zip("ABCD", texts, strict=True))


def _named_option(rng: random.Random) -> Document:
    """Which option was named: a letter; named after the options, or long before the answer."""
    words = rng.sample(rng.choice((THINGS, PLACES, PEOPLE)), 4)
    start = rng.choice(("the ", "m : the ", "f : so in the ", "m : i bring the ", "m : then by "))
    choices = f" Answer Chioces: {_options([start + word for word in words])}"
    asked = " A: Among A through D, the answer is"
    if rng.random() < 0.4:
        pieces: Document = [(f"Q: Which choice is correct?{choices}", False)]
        for i in rng.sample(range(4), 4):
            pieces += [(f" {start}{words[i]} .{asked}", False), (f" {'ABCD'[i]}", True), (".", False)]
        return pieces
    i = rng.randrange(4)
    named = rng.choice((words[i], f"{start}{words[i]}", f"f : well . {start}{words[i]}"))
    return [(f"Q: {named} . Which choice is correct?{choices}{asked}", False), (f" {'ABCD'[i]}", True)]


def _letters(rng: random.Random) -> Document:
    """Which option, for all four: letters. The options are as long as replies in a dialogue, or shorter."""
    words = rng.sample(rng.choice((THINGS, PLACES, PEOPLE, WORDS["dishes"])), 4)
    start = rng.choice(("the ", "m : the ", "f : so in the ", "m : so i bring the ", "m : so at the "))
    pieces: Document = [(f"Answer Chioces: {_options([start + word for word in words])} A:", False)]
    for i in rng.sample(range(4), 4):
        pieces += [(f" the {words[i]} is", False), (f" {'ABCD'[i]}", True), (".", False)]
    return pieces


def _yes_or_no(rng: random.Random, wording: Callable[[Event], str]) -> Document:
    """Several claims about one passage, as questions or in the words of the passage."""
    story = events(rng, rng.randint(2, 3))
    pieces: Document = [(f"passage: {passage(story)}", False)]
    for _ in range(6):
        answer = rng.random() < 0.5
        text = wording(claim(rng, story, answer, negations=False)[0])
        pieces += [(f" question: {text}. answer:", False), (" yes" if answer else " no", True)]
    return pieces


_questions = partial(_yes_or_no, wording=lambda event: event.question())
_statements = partial(_yes_or_no, wording=lambda event: event.sentence())


def _entailments(rng: random.Random) -> Document:
    """Several hypotheses on one premise."""
    story = events(rng, 2)
    pieces: Document = [(passage(story), False)]
    for _ in range(6):
        follows = rng.random() < 0.5
        hypothesis = claim(rng, story, follows)[0].sentence()
        pieces += [(f" entails the {hypothesis}. True or False? answer:", False)]
        pieces += [(" True" if follows else " False", True)]
    return pieces


def _searches(rng: random.Random) -> Document:
    """Several open questions on one passage."""
    story = events(rng, 3)
    queries = [query for event in story for query in event.queries()]
    pieces: Document = [(f"Passage: {passage(story)}", False)]
    for question, answer in rng.sample(queries, min(4, len(queries))):
        pieces += [(f" Question: {question}", False), (f" {answer}", True)]
    return pieces


def _choices(rng: random.Random) -> Document:
    """A dialogue whose replies are offered twice, in two orders; half the time it has the reply itself."""
    row = dialogue_row(rng)
    options, right = list(row["options"]), row["options"]["ABCD".index(row["answers"])]
    article = f"{row['article']} {right} ." if rng.random() < 0.5 else row["article"]
    pieces: Document = [(f"Q: {article} Which choice is correct?", False)]
    for _ in range(2):
        pieces += [(f" Answer Chioces: {_options(options)} A: Among A through D, the answer is", False)]
        pieces += [(f" {'ABCD'[options.index(right)]}", True)]
        rng.shuffle(options)
    return pieces


def _opinions(rng: random.Random) -> Document:
    """Short texts with their sentiment."""
    pieces: Document = []
    for _ in range(5):
        good = rng.random() < 0.5
        part, whole = rng.choice(WORDS["aspects"]), rng.choice(WORDS["works"])
        text = rng.choice(
            (
                opinion(rng, good),
                f"the {part} is {opinion(rng, good)}",
                f"the {part} is {opinion(rng, not good)} , but the {whole} is {opinion(rng, good)}",
            )
        )
        start = " text:" if pieces else "text:"
        pieces += [(f"{start} {text} answer:", False), (" positive" if good else " negative", True)]
    return pieces


_BARE = (_membership, _all_seen, _named_option, _named_option, _letters, _opinions)
_TASK_LIKE = (_choices, _choices, _questions, _questions, _statements, _entailments, _entailments, _searches)

DRILLS: dict[str, tuple[Callable[[random.Random], Document], ...]] = {
    "bare": _BARE,
    "all": (*_BARE, *_TASK_LIKE),
    "choosing": (*(_named_option, _letters, _choices) * 3, _questions, _statements, _entailments),
}
