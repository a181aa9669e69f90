"""Generated answers: what the published generation metric compares (arXiv 2502.11177)."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

#: Where a generated answer ends, beside the end of text.
STOPS = (".", "\n")
#: The most tokens that are generated for an answer.
MAX_NEW_TOKENS = 50

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Answer(str):
    """What a model generated, cut at the first stop.

    Attributes:
        ended: whether the model ended it, by a stop or the end-of-text token, and not the limit of tokens.
    """

    ended: bool

    def __new__(cls, text: str, ended: bool) -> Answer:
        answer = super().__new__(cls, text)
        answer.ended = ended
        return answer

    def __getnewargs__(self) -> tuple[str, bool]:  # type: ignore[override]
        return str(self), self.ended

    def split(self, *args: object, **named: object) -> list[str]:
        """As ``str.split``; what stands before a separator has ended there."""
        parts = super().split(*args, **named)  # type: ignore[arg-type]
        last = len(parts) - 1
        return [Answer(part, i < last or self.ended) for i, part in enumerate(parts)]

    def lstrip(self, *args: str | None) -> Answer:
        return Answer(super().lstrip(*args), self.ended)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an, the, white space collapsed."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def cut(text: str, stops: Iterable[str] = STOPS) -> str:
    """The text before the first of ``stops``."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def same_answer(generated: str, target: str) -> bool:
    """Whether two texts are the same once normalised."""
    return normalise(generated) == normalise(target)


def mentions(text: str, phrase: str) -> bool:
    """Whether the words of a phrase stand in a text one after the other, both normalised."""
    words = normalise(phrase)
    return bool(words) and f" {words} " in f" {normalise(text)} "


def begins_with(text: str, phrase: str) -> bool:
    """Whether a text begins with the words of a phrase, both normalised."""
    words = normalise(phrase)
    return bool(words) and f"{normalise(text)} ".startswith(f"{words} ")
