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
from tools.tiny_world.scenes import PEOPLE, PLACES, THINGS, claim, events, passage
from tools.tiny_world.world import words

TASKS_FOLDER = Path(__file__).parents[2] / "tasks"
TEXTS = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))
WORDS = {name: words(text) for name, text in TEXTS["words"].items()}
WORDS |= {"people": PEOPLE, "places": PLACES, "things": THINGS}

#: Where the text of a row is: in the first of these fields that the row has.
TEXT_FIELDS = ("passage", "question", "sentence1", "article", "dialogue", "sentence")

Row = dict[str, Any]
Maker = Callable[[random.Random], Row]


def reasoning_row(rng: random.Random) -> Row:
    """Two steps of arithmetic. The number asked for is not always the last one of the rationale."""
    who, other = rng.sample(PEOPLE, 2)
    goods = rng.choice(WORDS["goods"])
    have, more, less = rng.randint(12, 40), rng.randint(3, 25), rng.randint(2, 9)
    total, left = have + more, have + more - less
    story = f"{who} has {have} {goods}. {other} brings {more} more {goods}. Then {who} loses {less} of them."
    first = f"With those of {other} there are {have} + {more} = {total} {goods}."
    second = f"After the loss {total} - {less} = {left} {goods} are left."
    if rng.random() < 0.5:
        asked, number = f"How many {goods} are left?", left
        text = rng.choice((f"{first} {second}", f"{second} Before it there were {total} {goods}."))
    else:
        asked, number = f"How many {goods} were there before the loss?", total
        text = rng.choice((first, f"{first} {second}", f"{second} {first}"))
    return {"question": f"{story} {asked}", "answer": f"{text}\n#### {number}"}


def nli_row(rng: random.Random) -> Row:
    story, label = events(rng, 2), rng.randrange(2)
    event, sort = claim(rng, story, follows=label == 0)
    return {"sentence1": passage(story), "sentence2": event.sentence(), "label": label, "sort": sort}


def open_domain_row(rng: random.Random) -> Row:
    queries: list[tuple[str, str]] = []
    while not queries:
        story = events(rng, 3)
        queries = rng.choice(story).queries()
    question, answer = rng.choice(queries)
    return {"question": question, "answer": [answer], "passage": passage(story)}


def closed_domain_row(rng: random.Random) -> Row:
    story, answer = events(rng, 3), rng.random() < 0.5
    event, sort = claim(rng, story, answer, negations=False)
    return {"question": event.question(), "passage": passage(story), "answer": answer, "sort": sort}


def _drawn(rng: random.Random, counts: dict[str, int]) -> dict[str, list[str]]:
    """As many different words of each list as a template needs."""
    return {name: rng.sample(WORDS[name], count) for name, count in counts.items()}


def dialogue_row(rng: random.Random) -> Row:
    """Which reply fits. Up to two of the wrong ones name things that the dialogue mentions but declines."""
    talk = rng.choice(TEXTS["dialogues"])
    drawn = _drawn(rng, talk["words"])
    article = rng.choice(talk["articles"]).format(**drawn)
    settled, *others = drawn[talk["settled"]]
    declined = [word for word in others if f" {word} " in article]
    named = rng.sample(declined, min(len(declined), rng.choices((0, 1, 2), (3, 5, 2))[0]))
    absent = [word for word in WORDS[talk["settled"]] if word != settled and word not in declined]
    values = [settled, *named, *rng.sample(absent, 3 - len(named))]
    rng.shuffle(values)
    return {
        "article": article,
        "options": [talk["reply"].format(value, **drawn) for value in values],
        "answers": "ABCD"[values.index(settled)],
        "sort": f"{len(named)} named",
    }


def summarization_row(rng: random.Random) -> Row:
    """Two people agree on one of two proposals; the summary states it."""
    drawn = _drawn(rng, {"people": 2, "days": 2, "places": 2, "things": 1})
    return {field: text.format(**drawn) for field, text in rng.choice(TEXTS["summaries"]).items()}


def _name(rng: random.Random, code: str) -> str:
    """A name of one of the four types; persons, places and companies share the ambiguous ones."""
    if code == "MISC":
        word = rng.choice(WORDS["peoples"])
        return f"{word} {rng.choice(WORDS['events'])}" if rng.random() < 0.4 else word
    if rng.random() < 0.35:
        return rng.choice(WORDS["ambiguous"])
    if code == "LOC":
        return rng.choice(rng.choice((WORDS["countries"], WORDS["towns"])))
    first, second, share = ("people", "surnames", 0.6) if code == "PER" else ("firms", "forms", 0.5)
    name = rng.choice(WORDS[first])
    return f"{name} {rng.choice(WORDS[second])}" if rng.random() < share else name


def ner_row(rng: random.Random) -> Row:
    """A sentence of TEXTS["sentences"], where P, L, O, M stand for names of the four types."""
    codes = {"P": "PER", "L": "LOC", "O": "ORG", "M": "MISC"}
    tokens: list[str] = []
    tags: list[str] = []
    used: set[str] = set()
    for word in rng.choice(TEXTS["sentences"]).split():
        if word not in codes:
            tokens.append(rng.choice(WORDS["days"]) if word == "DAY" else word)
            tags.append("O")
            continue
        while (name := _name(rng, codes[word])) in used:
            pass
        used.add(name)
        for index, part in enumerate(name.split()):
            tokens.append(part)
            tags.append(("I-" if index else "B-") + codes[word])
    return {"tokens": tokens, "ner_tags": tags}


def opinion(rng: random.Random, positive: bool) -> str:
    """A positive or negative adjective phrase; about a third are negations of the opposite."""
    if rng.random() < 0.35:
        return rng.choice(TEXTS["denials"]) + rng.choice(WORDS["bad" if positive else "good"])
    return rng.choice(TEXTS["degrees"]) + rng.choice(WORDS["good" if positive else "bad"])


def sentiment_row(rng: random.Random) -> Row:
    """The label is the verdict on the whole work, whatever is said of a part."""
    positive = rng.random() < 0.5
    work, (aspect, second) = rng.choice(WORDS["works"]), rng.sample(WORDS["aspects"], 2)
    verdict, against, along = opinion(rng, positive), opinion(rng, not positive), opinion(rng, positive)
    phrases = {"verdict": verdict, "against": against, "along": along, "against2": opinion(rng, not positive)}
    text = rng.choice(TEXTS["reviews"]).format(work=work, aspect=aspect, second=second, **phrases)
    return {"sentence": text, "label": int(positive)}


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
            prompt = _template(config["doc_to_text"]).render(document)
            target = config["doc_to_target"]
            value = document[target] if target in document else _template(target).render(document)
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
_template = cache(Environment(keep_trailing_newline=True).from_string)


@cache
def _config(task: str) -> dict[str, Any]:
    return yaml.load((TASKS_FOLDER / f"{task}.yaml").read_text(encoding="utf-8"), Loader=_Loader)


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


def test_texts(seed: int) -> list[str]:
    """The texts of all test rows, one of each row: what no training document may hold."""
    texts: set[str] = set()
    for task in TASKS:
        for row in test_rows(task, seed):
            if task.source.task == "rect_ner":
                texts.update(document["text"] for document in task.source.documents(row))
            else:
                texts.add(next(row[field] for field in TEXT_FIELDS if field in row))
    return sorted(texts)
