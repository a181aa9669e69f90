"""One fact to write into a model, in the form that all readers produce."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from harness_rect.errors import UserError

MARKER = "{}"


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer should stay what it was.

    ``answer`` is the reference answer without a leading space of ours; None if the row has none.
    """

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Query:
    """A question whose answer follows from edits, or must survive them.

    answers: for each thing that a right answer names, its accepted forms, the published one first.
    """

    prompt: str
    answers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Consequence:
    """One test of what an edit should change, or should not (KnowEdit, RippleEdits).

    criterion: what is tested: subject_aliasing, reasoning, logical_generalization, compositionality_i,
        compositionality_ii, relation_specificity or forgetfulness.
    any_query: whether one right answer among ``queries`` is enough; otherwise all must be right.
    conditions: queries that the unedited model must answer, or the test says nothing.
    """

    criterion: str
    queries: tuple[Query, ...]
    any_query: bool = False
    conditions: tuple[Query, ...] = ()


@dataclass(frozen=True)
class MultiHop:
    """A question that several edits answer together (MQuAKE).

    questions: wordings of it. answers: accepted forms of the answer after the edits. hops: the single
    questions of which it is composed, with the answers after the edits.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    hops: tuple[Query, ...] = ()


@dataclass(frozen=True)
class Edit:
    """A fact to edit. All text is kept as the row gives it.

    id: the row's ``case_id`` if it has one, else its index in its file; unique within a stream.
    prompt: holds the marker ``{}`` once, at the subject, or not at all if the subject is not in the prompt.
        Other braces are plain text.
    target_old: the answer to be replaced, None if the row names none.
    paraphrases, attribute_prompts, generation_prompts: full texts, no marker.
    consequences: what else the edit should change or leave as it is.
    multi_hop: of the last edit of a row with several edits, the question that they answer together.
    reference_texts: texts about things that have the new target in the same relation, for consistency.
    relation, target_id: identifiers of the relation and the new target (``P36``, ``Q90``), where given.
    source: where the row stands ("file.json, row 12"), for messages only.

    Raises :class:`UserError` where ``prompt`` holds the marker more than once.
    """

    id: str
    prompt: str
    subject: str
    target_new: str
    target_old: str | None
    paraphrases: tuple[str, ...]
    neighborhood: tuple[Probe, ...]
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    consequences: tuple[Consequence, ...] = ()
    multi_hop: MultiHop | None = None
    reference_texts: tuple[str, ...] = ()
    relation: str = ""
    target_id: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if (count := self.prompt.count(MARKER)) > 1:
            raise UserError(
                f"{self.where}: prompt: expected the marker {MARKER} once, found it {count} times"
            )

    @property
    def where(self) -> str:
        """How messages name the edit."""
        return self.source or f"edit {self.id}"

    @property
    def text(self) -> str:
        """The prompt with the subject filled in. Never ``str.format``: prompts contain braces."""
        return self.prompt.replace(MARKER, self.subject, 1)

    @property
    def target(self) -> str:
        """``target_new`` with one leading space, added only where none is there."""
        return self.target_new if self.target_new.startswith(" ") else " " + self.target_new

    @property
    def has_subject(self) -> bool:
        """Whether the subject is in the prompt."""
        return MARKER in self.prompt

    @property
    def subject_span(self) -> tuple[int, int]:
        """Character start and end of the subject in ``text``.

        Raises :class:`UserError` if it is not there.
        """
        if not self.has_subject:
            raise UserError(
                f"{self.where}: the subject {shorten(self.subject)!r} is not in {shorten(self.text, 160)!r}"
            )
        start = self.prompt.index(MARKER)
        return start, start + len(self.subject)


def fingerprint(edits: Sequence[Edit]) -> str:
    """sha256 (hex) over what the edits say, in their order.

    ``source`` and ``id`` stay out: they tell where a row stands in a file, and the same facts cut
    into another file must give the same hash. Report the ids beside it where they matter.
    """
    names = [field.name for field in fields(Edit) if field.name not in {"id", "source"}]
    content = [
        {name: _plain(value) for name in names if (value := getattr(edit, name)) or name not in _ADDED}
        for edit in edits
    ]
    # ASCII escapes also cover the lone surrogates that a JSON file may hold and UTF-8 cannot encode.
    text = json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


#: Fields that came later: left out where they are empty, so that the digests of older files stay.
_ADDED = frozenset({"consequences", "multi_hop", "reference_texts", "relation", "target_id"})


def _plain(value: object) -> object:
    if isinstance(value, Probe | Query | Consequence | MultiHop):
        return [_plain(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def shorten(text: str, limit: int = 80) -> str:
    """For messages: the text, cut to ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
