"""Scoring of the GLUE suite that later work on editing reports (AlphaEdit, Fang et al. 2025: ``glue_eval``).

An answer is a class: that of the first label word in the output, -1 if there is none. A label word is a whole
word ("no" is not in "know", nor in "no-one"), where the published code looks for it anywhere in the text. The
metrics are taken over classes; see :func:`harness_rect.evaluation.aggregations.weighted_f1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness_rect.evaluation.general import Doc

#: The class of an answer that cannot be read.
UNREAD = -1

#: A word that is no part of another one: "no" but not the "no" of "know", "no-one" or "no's".
_ALONE = r"(?<!\w)(?<!\w['’-])({})(?!['’-]?\w)"


def word_reader(classes: Mapping[str, int]) -> Callable[[str], int]:
    """output -> the class of the first of some words in it, in any case; :data:`UNREAD` without one.

    Args:
        classes: lower-case word -> class.
    """
    pattern = re.compile(_ALONE.format("|".join(classes)), re.IGNORECASE)

    def read(output: str) -> int:
        found = pattern.search(output)
        return classes[found[1].lower()] if found else UNREAD

    return read


sentiment_class = word_reader({"negative": 0, "positive": 1})
yes_class = word_reader({"no": 0, "yes": 1})
#: As GLUE counts RTE's classes: 0 is entailment. The published code has it the other way round.
entailment_class = word_reader({"true": 0, "false": 1})

_LETTER = re.compile(_ALONE.format("[A-D]") + r"(?! +\w)")


def choice_class(output: str) -> int:
    """0 to 3 for the first capital A to D that no word follows ("A dog" is no answer), else -1."""
    found = _LETTER.search(output)
    return "ABCD".index(found[1]) if found else UNREAD


def _scored(gold: int, predicted: int) -> dict[str, Any]:
    classes = (gold, predicted)
    right, read = float(predicted == gold), float(predicted != UNREAD)
    return {"f1_weighted": classes, "acc": right, "valid_rate": read, "score": classes}


def sentiment(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    return _scored(doc["label"], sentiment_class(results[0]))


def yes_or_no(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    return _scored(doc["label"], yes_class(results[0]))


def entailment(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    return _scored(doc["label"], entailment_class(results[0]))


def choice(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    return _scored(doc["answer"], choice_class(results[0]))
