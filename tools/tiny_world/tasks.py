"""Rows for simple versions of the eight tasks, rendered by the YAML files of the suite.

People, things and places of the tasks are none of the world's subjects. Training rows are drawn from the same
makers as test rows; a training row with the prompt of a test row is discarded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from harness_rect.evaluation import data
from tools.tiny_world.scenes import PEOPLE, PLACES, THINGS, claim, events, told
from tools.tiny_world.world import words

TASKS_FOLDER = Path(__file__).parents[2] / "tasks"

Row = dict[str, Any]
Maker = Callable[[random.Random], Row]

# ---------------------------------------------------------------------------------------- reasoning

GOODS = words("apples pears eggs nuts stamps coins shells cards buttons marbles roses cookies")


def reasoning_row(rng: random.Random) -> Row:
    """Two steps of arithmetic. The number asked for is not always the last one of the rationale."""
    who, other = rng.sample(PEOPLE, 2)
    goods = rng.choice(GOODS)
    have, more, less = rng.randint(12, 40), rng.randint(3, 25), rng.randint(2, 9)
    total, left = have + more, have + more - less
    story = f"{who} has {have} {goods}. {other} brings {more} more {goods}. Then {who} loses {less} of them."
    first = f"With those of {other} there are {have} + {more} = {total} {goods}."
    second = f"After the loss {total} - {less} = {left} {goods} are left."
    if rng.random() < 0.5:
        text = rng.choice((f"{first} {second}", f"{second} Before it there were {total} {goods}."))
        return {
            "question": f"{story} How many {goods} are left?",
            "answer": f"{text}\n#### {left}",
        }
    asked = f"How many {goods} were there before the loss?"
    text = rng.choice((first, f"{first} {second}", f"{second} {first}"))
    return {"question": f"{story} {asked}", "answer": f"{text}\n#### {total}"}


# ---------------------------------------------------------------------- nli and the two kinds of qa


def nli_row(rng: random.Random) -> Row:
    story, label = events(rng, 2), rng.randrange(2)
    found = claim(rng, story, follows=label == 0)
    premise = " ".join(map(told, story))
    return {"sentence1": premise, "sentence2": found.event.sentence(), "label": label, "sort": found.sort}


def open_domain_row(rng: random.Random) -> Row:
    while True:
        story = events(rng, 3)
        queries = rng.choice(story).queries()
        if queries:
            break
    question, answer = rng.choice(queries)
    return {"question": question, "answer": [answer], "passage": " ".join(map(told, story))}


def closed_domain_row(rng: random.Random) -> Row:
    story, answer = events(rng, 3), rng.random() < 0.5
    found = claim(rng, story, answer, negations=False)
    passage = " ".join(map(told, story))
    return {"question": found.event.question(), "passage": passage, "answer": answer, "sort": found.sort}


# ----------------------------------------------------------------------------------------- dialogue

VEHICLES = words("bus train tram ferry taxi bike")
HOURS = words("six seven eight nine ten eleven noon")
DISHES = words("soup fish rice pasta salad cake pie stew")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


@dataclass(frozen=True)
class Talk:
    """A dialogue that decides on one thing from a pool and declines others."""

    article: str
    reply: str  # with {} where the thing goes
    settled: str
    declined: tuple[str, ...]
    pool: tuple[str, ...]


def _vehicle(rng: random.Random) -> Talk:
    v, w, x = rng.sample(VEHICLES, 3)
    place = rng.choice(PLACES)
    article = rng.choice(
        (
            f"m : shall we take the {v} or the {w} to the {place} ? f : the {w} is late , not that one .",
            f"m : how do we get to the {place} ? f : not by {w} , it is full . m : by {x} ? "
            f"f : no , by {v} .",
        )
    )
    return Talk(article, "m : then by {}", v, tuple(o for o in (w, x) if f" {o} " in article), VEHICLES)


def _hour(rng: random.Random) -> Talk:
    h, i = rng.sample(HOURS, 2)
    place = rng.choice(PLACES)
    article = rng.choice(
        (
            f"m : do we meet in the {place} at {h} or at {i} ? f : {h} is better .",
            f"f : can you come to the {place} at {i} ? m : not at {i} , at {h} .",
            f"f : the {place} opens at {i} . m : then i come at {h} .",
        )
    )
    return Talk(article, "f : good , at {}", h, (i,), HOURS)


def _meal(rng: random.Random) -> Talk:
    a, b, c, d = rng.sample(DISHES, 4)
    article = rng.choice(
        (
            f"m : we have {b} and {c} . f : i like none of them . m : and {a} ? f : yes , please .",
            f"f : shall i cook {a} or {b} ? m : {a} , please . we had {b} last week .",
            f"m : the {c} and the {d} are cold . f : and the {b} ? m : too salty . f : bring me the {a} .",
        )
    )
    return Talk(article, "m : i bring the {}", a, tuple(o for o in (b, c, d) if f" {o} " in article), DISHES)


def _search(rng: random.Random) -> Talk:
    thing, (a, b, c) = rng.choice(THINGS), rng.sample(PLACES, 3)
    article = rng.choice(
        (
            f"f : where is my {thing} ? m : not in the {b} . f : in the {c} ? m : no . look in the {a} .",
            f"m : did you leave the {thing} in the {b} ? f : no , i came from the {c} . "
            f"m : so it is in the {a} .",
        )
    )
    return Talk(article, "f : so in the {}", a, (b, c), PLACES)


def _present(rng: random.Random) -> Talk:
    (who, other), (a, b) = rng.sample(PEOPLE, 2), rng.sample(THINGS, 2)
    article = rng.choice(
        (
            f"m : who gets the {a} ? f : {who} . m : and {other} ? f : gets the {b} .",
            f"f : the {b} is for {other} . m : and who wants the {a} ? f : that goes to {who} .",
        )
    )
    return Talk(article, f"m : so the {a} is for {{}}", who, (other,), PEOPLE)


def dialogue_row(rng: random.Random) -> Row:
    """Which reply fits. Up to two of the wrong ones name things that the dialogue mentions but declines."""
    talk = rng.choice((_vehicle, _hour, _meal, _search, _present))(rng)
    named = rng.sample(talk.declined, min(len(talk.declined), rng.choices((0, 1, 2), (3, 5, 2))[0]))
    absent = [word for word in talk.pool if word != talk.settled and word not in talk.declined]
    values = [talk.settled, *named, *rng.sample(absent, 3 - len(named))]
    rng.shuffle(values)
    return {
        "article": talk.article,
        "options": [talk.reply.replace("{}", value) for value in values],
        "answers": "ABCD"[values.index(talk.settled)],
        "sort": f"{len(named)} named",
    }


# ------------------------------------------------------------------------------------ summarization


def summarization_row(rng: random.Random) -> Row:
    """Two people agree on one of two proposals; the summary states it."""
    a, b = rng.sample(PEOPLE, 2)
    day, other_day = rng.sample(DAYS, 2)
    place, other_place = rng.sample(PLACES, 2)
    thing = rng.choice(THINGS)
    sort = rng.randrange(4)
    lines: tuple[str, ...]
    if sort == 0:
        lines = (
            f"{a}: Can we meet at the {place} on {other_day}?",
            f"{b}: I am busy then. What about {day}?",
            f"{a}: Yes!",
        )
        summary = f"{a} and {b} will meet at the {place} on {day}."
    elif sort == 1:
        lines = (
            f"{a}: I lost my {thing}.",
            f"{b}: Was it in the {other_place}?",
            f"{a}: No.",
            f"{b}: I saw it in the {place}.",
        )
        summary = f"{a} lost a {thing} and {b} saw it in the {place}."
    elif sort == 2:
        lines = (
            f"{a}: Could you lend me your {thing}?",
            f"{b}: I need it on {other_day}.",
            f"{a}: I only want it on {day}.",
            f"{b}: OK.",
        )
        summary = f"{b} will lend a {thing} to {a} on {day}."
    else:
        lines = (
            f"{a}: Shall I wait at the {other_place}?",
            f"{b}: No, at the {place}. I bring the {thing}.",
            f"{a}: See you {day}.",
        )
        summary = f"{a} will wait at the {place} on {day} and {b} will bring the {thing}."
    return {"dialogue": "\n".join(lines), "summary": summary}


# ---------------------------------------------------------------------------------------------- ner

SURNAMES = words("Berg Hale Stone Frost Lane Moss Wood Dale Reed Marsh Ford Lake Bush Field Hill Rivers")
COUNTRIES = words("France Spain Italy Poland Chile Kenya Japan Peru Cuba Egypt India Norway")
TOWNS = words("Paris Rome Oslo Lima Cairo Madrid Delhi Tokyo Vienna Berlin London Boston")
FIRMS = words("Nortel Alpha Delta Orion Vega Titan Apex Zenith")
FORMS = words("Bank Motors Foods Airlines Press Steel")
PEOPLES = words("French Spanish Italian Polish Kenyan Japanese Cuban Indian Norwegian German")
EVENTS_ = ("Cup", "Open", "Prize", "Festival")
# Names whose type (person, place or company) depends on the sentence.
AMBIGUOUS = words("Jordan Austin Florence Chelsea Lincoln Sydney Madison Carter Wells Ford")


def _person(rng: random.Random) -> str:
    if rng.random() < 0.35:
        return rng.choice(AMBIGUOUS)
    first = rng.choice(PEOPLE)
    return f"{first} {rng.choice(SURNAMES)}" if rng.random() < 0.6 else first


def _place(rng: random.Random) -> str:
    return rng.choice(AMBIGUOUS if rng.random() < 0.35 else rng.choice((COUNTRIES, TOWNS)))


def _firm(rng: random.Random) -> str:
    if rng.random() < 0.35:
        return rng.choice(AMBIGUOUS)
    return rng.choice(FIRMS) + (f" {rng.choice(FORMS)}" if rng.random() < 0.5 else "")


def _other(rng: random.Random) -> str:
    word = rng.choice(PEOPLES)
    return f"{word} {rng.choice(EVENTS_)}" if rng.random() < 0.4 else word


# P, L, O, M stand for names of the four types.
PATTERNS = (
    "P flew to L to meet P .",
    "P of L won the M title in L .",
    "Shares of O fell , said P .",
    "O opened an office in L and L .",
    "The M minister P arrived in L on DAY .",
    "P left O for O last year .",
    "In L , O sold its M branch .",
    "P beat P at the M in L .",
    "O hired P , a M lawyer .",
    "M fans sang for P in L .",
    "The head of O is P .",
    "Rain stopped play in L on DAY .",
    "O and O will build cars in L .",
    "A M court fined O .",
    "On DAY P signed for O .",
    "Police in L arrested a M driver .",
)


def ner_row(rng: random.Random) -> Row:
    makers = {"P": ("PER", _person), "L": ("LOC", _place), "O": ("ORG", _firm), "M": ("MISC", _other)}
    tokens: list[str] = []
    tags: list[str] = []
    used: set[str] = set()
    for word in rng.choice(PATTERNS).split():
        if word not in makers:
            tokens.append(rng.choice(DAYS) if word == "DAY" else word)
            tags.append("O")
            continue
        code, make = makers[word]
        while (name := make(rng)) in used:
            pass
        used.add(name)
        for index, part in enumerate(name.split()):
            tokens.append(part)
            tags.append(("I-" if index else "B-") + code)
    return {"tokens": tokens, "ner_tags": tags}


# ---------------------------------------------------------------------------------------- sentiment

GOOD = words(
    "charming moving funny clever warm bright lovely gripping fresh superb tender brilliant honest elegant"
)
BAD = words("dull clumsy boring stale silly cold tedious hollow noisy dreary weak lazy shallow awful")
ASPECTS = words("plot acting music dialogue ending script cast pace story camera humor direction")
WORKS = words("film movie play show drama series")
DEGREES = ("", "very ", "rather ", "truly ", "quite ")
DENIALS = ("not ", "never ", "hardly ", "far from ")


def praise(rng: random.Random, good: bool) -> str:
    """A positive or negative adjective phrase; about a third are negations of the opposite."""
    if rng.random() < 0.35:
        return rng.choice(DENIALS) + rng.choice(BAD if good else GOOD)
    return rng.choice(DEGREES) + rng.choice(GOOD if good else BAD)


def sentiment_row(rng: random.Random) -> Row:
    """The verdict on the whole counts, whatever is said of a part."""
    good = rng.random() < 0.5
    work, (aspect, second) = rng.choice(WORKS), rng.sample(ASPECTS, 2)
    verdict, against, along = praise(rng, good), praise(rng, not good), praise(rng, good)
    also_against = praise(rng, not good)
    text = rng.choice(
        (
            f"the {aspect} is {against} , but the {work} as a whole is {verdict}",
            f"although the {aspect} is {against} and the {second} {also_against} , the {work} is {verdict}",
            f"a {work} that is {verdict} , even if the {aspect} is {against}",
            f"despite its {against} {second} , this {work} is {verdict}",
            f"the {work} is {verdict} , and its {aspect} is {along}",
            f"its {aspect} is {verdict} and its {second} {along}",
            f"i found the {work} {verdict} , though my friends called it {against}",
        )
    )
    return {"sentence": text, "label": int(good)}


# ------------------------------------------------------------------------------------ all eight tasks


@dataclass(frozen=True)
class Task:
    """``source`` knows the name of the task, of its file, and how a row becomes documents."""

    source: data.Source
    make: Maker
    test_rows: int

    def documents(self, row: Row) -> list[tuple[str, str]]:
        """(prompt, answer as it follows the prompt) of each document of the row, from the task's YAML."""
        config = _config(self.source.task)
        found = []
        for document in self.source.documents(row):
            prompt = _render(config["doc_to_text"], document)
            target = config["doc_to_target"]
            value = document[target] if target in document else _render(target, document)
            answer = value[0] if isinstance(value, list) else value
            found.append((prompt, f" {answer}" if answer else ""))
        return found


TASKS = (
    Task(data.SOURCES["rect_reasoning"], reasoning_row, 200),
    Task(data.SOURCES["rect_nli"], nli_row, 200),
    Task(data.SOURCES["rect_open_domain_qa"], open_domain_row, 200),
    Task(data.SOURCES["rect_closed_domain_qa"], closed_domain_row, 200),
    Task(data.SOURCES["rect_dialogue"], dialogue_row, 200),
    Task(data.SOURCES["rect_summarization"], summarization_row, 100),
    Task(data.SOURCES["rect_ner"], ner_row, 60),
    Task(data.SOURCES["rect_sentiment"], sentiment_row, 200),
)


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's task files without calling what their !function tags name."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))
_environment = Environment(keep_trailing_newline=True)
_template = cache(_environment.from_string)


@cache
def _config(task: str) -> dict[str, Any]:
    return yaml.load((TASKS_FOLDER / f"{task}.yaml").read_text(encoding="utf-8"), Loader=_Loader)


def _render(template: str, document: Row) -> str:
    return _template(template).render(**document)


def test_rows(task: Task, seed: int) -> list[Row]:
    """The held-out rows of a task; no prompt twice."""
    rng = random.Random(f"test {task.source.task} {seed}")
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < task.test_rows:
        row = task.make(rng)
        prompt = task.documents(row)[0][0]
        if prompt not in seen:
            seen.add(prompt)
            rows.append(row)
    return rows


# What a row is about: with it in sight, its question has been seen.
_TEXT_FIELDS = ("question", "sentence1", "passage", "article", "dialogue", "sentence")


def test_texts(seed: int) -> list[str]:
    """The texts of all test rows: what no training document may hold."""
    texts: set[str] = set()
    for task in TASKS:
        for row in test_rows(task, seed):
            if task.source.task == "rect_ner":
                texts.update(document["text"] for document in task.source.documents(row))
            else:
                fields = ("passage",) if "passage" in row else _TEXT_FIELDS
                texts.update(row[field] for field in fields if field in row)
    return sorted(texts)
