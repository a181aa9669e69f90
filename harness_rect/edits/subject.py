"""Where the subject of an edit stands in its prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from harness_rect.edits.edit import MARKER, shorten
from harness_rect.errors import UserError

#: Typographic quotes and dashes, which data sets and models write in several ways.
_TYPEWRITER = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
_AROUND = " \t\n.,;:!?'\"\u2018\u2019\u201c\u201d\u00ab\u00bb"
_ARTICLE = re.compile(r"(?:the|an?)\s+", flags=re.IGNORECASE)
_POSSESSIVE = re.compile(r"['\u2019]s$", flags=re.IGNORECASE)


def mark_subject(prompt: str, subject: str) -> tuple[str, str, bool]:
    """Put the marker where the subject stands: (prompt with one marker, subject, matched loosely).

    A prompt that holds ``{}`` once is marked already. Otherwise the FIRST occurrence of the subject
    becomes the marker, later ones stay text. One that ends within a character (``e`` before a combining
    accent) is none. If there is no exact one, the subject is looked for

    1. without the white space around it, up to white space within it and Unicode composition (NFC);
    2. as whole words, also up to case, and typographic quotes and dashes;
    3. as in 2, without an article before it and a possessive ending, punctuation or quotes around it.

    What is returned as the subject is then the text as it stands in the prompt. If it is not found, both are
    returned as they are.

    Raises :class:`UserError` if the prompt holds more than one ``{}``.
    """
    # A subject that itself holds {} ("dict{}") must not pass for a marker.
    at = _find_exactly(prompt, subject)
    if prompt.count(MARKER) == 1 and not (MARKER in subject and at is not None):
        return prompt, subject, False
    loose = MARKER not in prompt and at is None
    if loose:
        span = _find_loosely(prompt, subject.strip())
        if span is None:
            return prompt, subject, False
        start, end = span
        prompt, subject = prompt[:start] + MARKER + prompt[end:], prompt[start:end]
    elif at is not None and (MARKER in subject or MARKER not in prompt):
        prompt = prompt[:at] + MARKER + prompt[at + len(subject) :]
    if (count := prompt.count(MARKER)) != 1:
        raise UserError(f"expected one {MARKER}, at the subject, found {count} in {shorten(prompt, 160)!r}")
    return prompt, subject, loose


def _find_exactly(prompt: str, subject: str) -> int | None:
    at = prompt.find(subject)
    while at >= 0:
        after = prompt[at + len(subject) :][:1]
        if not (after and _joins(subject, after)):
            return at
        at = prompt.find(subject, at + 1)
    return None


def _find_loosely(prompt: str, subject: str) -> tuple[int, int] | None:
    """Upper and lower case are let go last, so that " US" is not found at the start of "us of US"."""
    found = _find(prompt, subject, str, within_words=True) or _find(prompt, subject, _without_case)
    core = _core(subject)
    if found or not core:
        return found
    return _find(prompt, core, str) or _find(prompt, core, _without_case)


def _core(subject: str) -> str:
    """The subject without article, possessive ending and punctuation around it; empty if nothing is left."""
    bare = subject.strip(_AROUND)
    if article := _ARTICLE.match(bare):
        bare = bare[article.end() :]
    bare = _POSSESSIVE.sub("", bare).strip(_AROUND)
    return "" if _ARTICLE.fullmatch(bare + " ") else bare


def _without_case(text: str) -> str:
    return text.translate(_TYPEWRITER).casefold()


def _find(
    prompt: str, subject: str, fold: Callable[[str], str], within_words: bool = False
) -> tuple[int, int] | None:
    """Search composed and folded text, and give back a span of the text as it is.

    Composing and folding change lengths, so both work on single characters with what combines with
    them, and a match must begin and end between two of these.
    """
    starts: dict[int, int] = {}  # offset in the folded text -> offset in the prompt
    folded, offset = "", 0
    for piece in _characters(prompt):
        starts[len(folded)] = offset
        folded += fold(_composed(piece))
        offset += len(piece)
    starts[len(folded)] = offset
    wanted = "".join(fold(_composed(piece)) for piece in _characters(subject))
    at = folded.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        whole = within_words or not (_splits_a_word(folded, at) or _splits_a_word(folded, end))
        if at in starts and end in starts and whole:
            return starts[at], starts[end]
        at = folded.find(wanted, at + 1)
    return None


def _composed(piece: str) -> str:
    return " " if piece.isspace() else unicodedata.normalize("NFC", piece)


def _splits_a_word(text: str, at: int) -> bool:
    """Whether a place lies between two letters or digits; scripts without case have no spaces to go by."""
    return 0 < at < len(text) and all(c.isdigit() or c.lower() != c.upper() for c in text[at - 1 : at + 1])


def _characters(text: str) -> list[str]:
    """Characters with what combines with them, and runs of white space."""
    pieces: list[str] = []
    for char in text:
        if pieces and (_joins(pieces[-1], char) or (char.isspace() and pieces[-1].isspace())):
            pieces[-1] += char
        else:
            pieces.append(char)
    return pieces


def _joins(text: str, char: str) -> bool:
    """Whether a character is a part of the one before it, as a reader sees them."""
    # Hangul letters combine without being marked as combining: there composing has to be tried.
    shorter, longer = (len(unicodedata.normalize("NFC", one)) for one in (text, text + char))
    return unicodedata.combining(char) > 0 or shorter == longer
