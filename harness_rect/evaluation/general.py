"""Scoring of the eight general tasks, after Gu et al. 2024 (evaluation scripts) without their mistakes.

Each task has pure functions of (gold, output), and below them the ``process_results`` that lm-eval calls with
a document (see ``harness_rect.evaluation.data``) and a list holding the one output. It returns one value for
each metric of the task's YAML; ``score`` repeats the headline metric. Only what the model generated is
scored, never the prompt.

Values are averaged by lm-eval's ``mean``, so that it can give standard errors; the two NER metrics are ratios
of sums (:mod:`harness_rect.evaluation.aggregations`), for which lm-eval reports no standard error.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from harness_rect.answers import mentions

Doc = Mapping[str, Any]

# --------------------------------------------------------------------------------------------- reasoning


def reasoning(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the output contains the number after ``#### `` in the answer, commas aside (1,600 is 1600)."""
    number = doc["answer"].split("#### ")[1].replace(",", "").strip()
    value = float(number in results[0].replace(",", ""))
    return {"solve_rate": value, "score": value}


# ------------------------------------------------------------------------- answers that parse, or do not
# `acc` counts an answer that does not parse as wrong; `valid_rate` is the share that parses.


def yes_or_no(output: str) -> bool | None:
    """True for an output that is exactly "yes", False for "no", else None.

    The scripts want " yes" with its leading space. Some tokenizers (Llama's) lose that space when a
    continuation is decoded on its own, hence the strip.
    """
    return {"yes": True, "no": False}.get(output.strip().casefold())


def _judged(valid: bool, correct: bool) -> dict[str, float]:
    return {"acc": float(correct), "valid_rate": float(valid), "score": float(correct)}


def _one_word(doc: Doc, output: str, words: tuple[str, str]) -> dict[str, float]:
    """An output with exactly one of the words, in any case, parses; the label is the right one's index."""
    found = [word for word in words if word in output.casefold()]
    return _judged(len(found) == 1, found == [words[doc["label"]]])


def nli(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    return _one_word(doc, results[0], ("true", "false"))


def sentiment(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    return _one_word(doc, results[0], ("negative", "positive"))


def closed_domain_qa(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    answer = yes_or_no(results[0])
    return _judged(answer is not None, answer is doc["answer"])


def dialogue(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Recall4@1: the gold letter is in the output; an output with any of A, B, C, D parses."""
    output = results[0]
    return _judged(any(letter in output for letter in "ABCD"), doc["answers"] in output)


# ------------------------------------------------------------------------------------------- open domain


def open_domain_qa(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether some run of whole words of the normalised output equals a normalised answer.

    An answer that normalises to nothing ("The") never matches. One example counts once at most.
    """
    value = float(any(mentions(results[0], answer) for answer in doc["answers"]))
    return {"em": value, "score": value}


# ----------------------------------------------------------------------------------------- summarization


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # pulls in nltk; only this task needs it

    # No stemming: the scripts' `rouge` package does none.
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def rouge_scores(summary: str, output: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measures of the output and, as ``rouge``, their mean.

    Computed by the ``rouge_score`` package (lower-cased words, punctuation ignored, n-grams counted); the
    scripts' ``rouge`` package splits at white space only, so its numbers differ a little.
    """
    f = {name: float(score.fmeasure) for name, score in _rouge_scorer().score(summary, output).items()}
    return {"rouge": sum(f.values()) / len(f), **f}


def summarization(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    values = rouge_scores(doc["summary"], results[0])
    return {**values, "score": values["rouge"]}


# --------------------------------------------------------------------------------------------------- NER


def _entity_key(text: str) -> str:
    # Both sides lose trailing punctuation, or a gold "U.S." could never be matched.
    return " ".join(text.split()).rstrip(string.punctuation + " ")


def listed_entities(output: str) -> list[str]:
    """The entities an output lists: its first line that is not blank, split at ``,``, ``;`` and "and".

    Each is stripped of white space and trailing punctuation. An entity with a comma or "and" inside its name
    cannot be distinguished from two and is never matched.
    """
    line = output.strip().split("\n")[0]
    keys = (_entity_key(piece) for piece in re.split(r"[,;]|(?<!\S)and(?!\S)", line))
    return [key for key in keys if key]


def entity_counts(gold: Iterable[str], output: str) -> tuple[int, int, int]:
    """``(matched, predicted, gold)`` of one sentence and entity type; repeated names match one by one."""
    wanted = Counter(map(_entity_key, gold))
    listed = Counter(listed_entities(output))
    return (wanted & listed).total(), listed.total(), wanted.total()


def ner(doc: Doc, results: Sequence[str]) -> dict[str, tuple[Any, int, int]]:
    gold, output = doc["entities"], results[0]
    counts = entity_counts(gold, output)
    found = sum(entity in output for entity in gold)
    return {"f1": counts, "recall_macro": (doc["entity_type"], found, len(gold)), "score": counts}
