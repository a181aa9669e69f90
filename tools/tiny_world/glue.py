"""Rows for the GLUE suite, from the tiny world. The classes take turns.

No model was trained on the suite's prompts. What the rows are about was trained: reviews, events and what
follows from them, facts. The rows were made after the training and are not held out from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.tiny_world.scenes import events, passage
from tools.tiny_world.tasks import Row, nli_row, sentiment_row
from tools.tiny_world.world import World

#: Ten for shots and the hundred that are used, in whole turns of two and of four classes.
ROWS = 112


def _sst(rng: random.Random, world: World, label: int) -> Row:
    return _with_label(lambda: sentiment_row(rng), label)


def _mrpc(rng: random.Random, world: World, label: int) -> Row:
    """An event in its other wording, or with another detail."""
    story = events(rng, 2)
    event = story[0]
    other = event.reworded() if label else event.altered(story, rng)
    return {"sentence1": passage([event]), "sentence2": passage([other]), "label": label}


def _cola(rng: random.Random, world: World, label: int) -> Row:
    """A sentence, or its words from the last to the first."""
    words = events(rng, 2)[0].sentence().split()
    text = " ".join(words if label else reversed(words))
    return {"sentence": f"{text[0].upper()}{text[1:]}.", "label": label}


def _entailment(rng: random.Random, world: World, label: int) -> Row:
    row = _with_label(lambda: nli_row(rng), label)
    return {name: row[name] for name in ("sentence1", "sentence2", "label")}


def _mmlu(rng: random.Random, world: World, label: int) -> Row:
    """A fact with three other objects of its relation."""
    fact = rng.choice(world.facts)
    question = fact.prompt(rng.choice(fact.trained[2:]))
    choices = rng.sample([word for word in fact.relation.objects if word != fact.object], 3)
    choices.insert(label, fact.object)
    return {"question": question[: question.index("?") + 1], "choices": choices, "answer": label}


def _with_label(make: Callable[[], Row], label: int) -> Row:
    while (row := make())["label"] != label:
        pass
    return row


#: Task -> number of classes, and what makes a row of one of them.
MAKERS: dict[str, tuple[int, Callable[[random.Random, World, int], Row]]] = {
    "rect_glue_sst": (2, _sst),
    "rect_glue_mrpc": (2, _mrpc),
    "rect_glue_cola": (2, _cola),
    "rect_glue_rte": (2, _entailment),
    "rect_glue_nli": (2, _entailment),
    "rect_glue_mmlu": (4, _mmlu),
}


def glue_rows(task: str, world: World, seed: int) -> list[Row]:
    """The rows of a task, no two of them alike."""
    classes, make = MAKERS[task]
    rng = random.Random(f"{task} {seed}")
    rows: list[Row] = []
    while len(rows) < ROWS:
        row = make(rng, world, len(rows) % classes)
        if row not in rows:
            rows.append(row)
    return rows
