"""The files of the embedded world: task rows, edits in two forms, text for second moments."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from harness_rect.evaluation.catalogue import TASKS as CATALOGUE
from harness_rect.evaluation.editing.consistency import FREQUENCIES, VOCABULARY
from harness_rect.evaluation.editing.multihop import SHOTS
from tools.tiny_world.consequences import Consequences
from tools.tiny_world.corpus import Corpus
from tools.tiny_world.glue import MAKERS, glue_rows
from tools.tiny_world.tasks import TASKS, test_rows
from tools.tiny_world.world import Fact, World

Row = dict[str, Any]
NEIGHBOURS = 5


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_task_rows(folder: Path, world: World, seed: int) -> None:
    for task in TASKS:
        write_jsonl(folder / task.source.file, test_rows(task, seed))
    for name in MAKERS:
        write_jsonl(folder / CATALOGUE[name].file, glue_rows(name, world, seed))
    (folder / SHOTS).write_text(Consequences(world).shots(seed), encoding="utf-8")


def edit_rows(world: World, seed: int) -> tuple[list[Row], list[Row]]:
    """Every fact as an edit, in ZsRE form and in CounterFact form, in one shuffled order.

    The edit prompt is a wording trained with the fact, the paraphrases are the two that are not. The new
    object is another one of the same relation. The neighbours share relation and old object. Beside the
    fields of either form there is `same_subject`: what else is known of the subject, to see if it survives.
    The ZsRE form also has what follows from the edit, and texts about its new object.
    """
    rng = random.Random(f"edits {seed}")
    facts = list(world.facts)
    rng.shuffle(facts)
    rows = [_edit(world, fact, number, rng) for number, fact in enumerate(facts)]
    made, further = Consequences(world), random.Random(f"consequences {seed}")
    for fact, (zsre, counterfact) in zip(facts, rows, strict=True):
        zsre |= {
            "generation_prompts": counterfact["generation_prompts"],
            "attribute_snippets": made.references(fact, zsre["alt"]),
            **made.of(fact, zsre["alt"], further),
        }
    return [zsre for zsre, _ in rows], [counterfact for _, counterfact in rows]


def _edit(world: World, fact: Fact, number: int, rng: random.Random) -> tuple[Row, Row]:
    new = rng.choice([word for word in fact.relation.objects if word != fact.object])
    statements, questions = fact.trained[:2], fact.trained[2:]
    question, statement = rng.choice(questions), rng.choice(statements)
    held_statement, held_question = fact.held_out
    elsewhere = rng.choice([f for f in world.facts if f.relation is not fact.relation])
    away = rng.choice(elsewhere.trained[2:])
    same_subject = [
        {"prompt": other.prompt(rng.choice(other.trained)), "answer": other.object}
        for other in world.facts_of[fact.subject]
        if other is not fact
    ]
    near = [f for f in world.sharing[fact.relation, fact.object] if f is not fact]
    rng.shuffle(near)
    neighbours = [f.prompt(rng.choice(f.trained[:2])) for f in near[:NEIGHBOURS]]
    holders = [f for f in world.sharing.get((fact.relation, new), []) if f.subject is not fact.subject]
    rng.shuffle(holders)
    attributes = [f.prompt(rng.choice(f.trained[:2])) for f in holders[:NEIGHBOURS]]
    subject = fact.subject.name
    zsre = {
        "subject": subject,
        "src": fact.prompt(question),
        "pred": fact.object,
        "rephrase": fact.prompt(held_question),
        "alt": new,
        "answers": [fact.object],
        "loc": f"nq question: {elsewhere.prompt(away)}",
        "loc_ans": elsewhere.object,
        "cond": f"{fact.object} >> {new} || {fact.prompt(question)}",
        "case_id": number,
        "paraphrases": [fact.prompt(held_statement), fact.prompt(held_question)],
        "neighborhood_prompts": neighbours,
        "same_subject": same_subject,
    }
    name = fact.relation.name
    counterfact: Row = {
        "case_id": number,
        "requested_rewrite": {
            "prompt": fact.relation.wordings[statement],
            "relation_id": name,
            "target_new": {"str": new, "id": f"{name}/{new}"},
            "target_true": {"str": fact.object, "id": f"{name}/{fact.object}"},
            "subject": subject,
        },
        "paraphrase_prompts": [fact.prompt(held_statement), fact.prompt(held_question)],
        "neighborhood_prompts": neighbours,
        "attribute_prompts": attributes,
        "generation_prompts": [fact.prompt(i) for i in statements],
        "same_subject": same_subject,
    }
    return zsre, counterfact


def write_corpus(path: Path, corpus: Corpus, seed: int, step: int, documents: int = 4000) -> None:
    """A sample of the training text, one document a line, for second moments."""
    rng = random.Random(f"text {seed}")
    texts = ("".join(text for text, _ in corpus.document(rng, step)) for _ in range(documents))
    path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts), encoding="utf-8")


def write_word_frequencies(folder: Path, corpus: Corpus, seed: int, step: int, documents: int = 2000) -> None:
    """Inverse document frequencies of the words of training text, in the form of ROME's two files."""
    rng = random.Random(f"words {seed}")
    texts = ["".join(text for text, _ in corpus.document(rng, step)) for _ in range(documents)]
    vectorizer = TfidfVectorizer().fit(texts)
    words = {word: int(index) for word, index in sorted(vectorizer.vocabulary_.items())}
    (folder / VOCABULARY).write_text(json.dumps(words) + "\n", encoding="utf-8")
    np.save(folder / FREQUENCIES, vectorizer.idf_.round(6))


def write_drift_text(path: Path, corpus: Corpus, seed: int, step: int, words: int = 1000) -> None:
    """About so many words of the same kind, drawn for this file alone, for rect_drift."""
    rng = random.Random(f"drift {seed}")
    texts: list[str] = []
    while sum(len(text.split()) for text in texts) < words:
        texts.append("".join(text for text, _ in corpus.document(rng, step)).replace("\n", " "))
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
