"""From what a user names (``zsre``, ``facts.json[0:20]``) to a stream of :class:`Edit`.

The formats of rows are in :mod:`harness_rect.edits.formats`.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, overload

from harness_rect import embedded
from harness_rect.edits.edit import Edit
from harness_rect.edits.fields import Fields
from harness_rect.edits.formats import facts_of
from harness_rect.edits.keys import misspelled
from harness_rect.edits.public import URLS, download
from harness_rect.edits.questions import (
    consequences_of,
    multi_hop_of,
    neighborhood_of,
    paraphrases_of,
)
from harness_rect.edits.subject import mark_subject
from harness_rect.errors import UserError, closest
from harness_rect.io.files import expanded
from harness_rect.io.rows import Row, json_rows

logger = logging.getLogger(__name__)

#: Of the ids in a warning, so many are named.
NAMED = 20


@dataclass(frozen=True)
class EditStream(Sequence[Edit]):
    """The edits a run applies, in order.

    spec: what was asked for. warnings: whole lines. rows: number of rows that they were read from, each of
    one or several edits.
    """

    edits: tuple[Edit, ...]
    spec: str
    warnings: tuple[str, ...] = ()
    rows: int = 0

    def __len__(self) -> int:
        return len(self.edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Edit, ...]: ...
    def __getitem__(self, index: int | slice) -> Edit | tuple[Edit, ...]:
        return self.edits[index]


def load_edits(spec: str | PathLike[str]) -> EditStream:
    """Read the edits that ``spec`` names.

    Things that are merely unusual are listed in ``EditStream.warnings`` and logged.

    Args:
        spec: ``tiny``, the name of a public set (:data:`~harness_rect.edits.public.URLS`) or a path ending
            in .json (a list of rows, or JSON Lines) or .jsonl (JSON Lines); each may be followed by
            ``[start:stop:step]`` with Python's meaning, or by one row number ``[7]``. Rows outside the slice
            are parsed and otherwise ignored.

    Raises:
        UserError: one line that names file, row (from 0, as in the slice) and field.
    """
    if not isinstance(spec, str | PathLike):
        raise UserError(f"edits: expected a name or a path, found {type(spec).__name__}")
    spec = str(spec)
    name, selection = split_spec(spec)
    return _stream(_select(_rows_of(name), selection, spec), spec)


def edits_of(given: Iterable[Mapping[str, Any] | Edit], spec: str = "edits") -> EditStream:
    """The edits of rows in memory, in any of the formats of a file, or of edits that are made already.

    Args:
        given: rows as dicts, ``Edit`` objects, or both.
        spec: what messages call them.

    Raises:
        UserError: there are none, one is wrong, or two ``Edit`` objects have one id.
    """
    if not isinstance(given, Iterable):
        raise UserError(f"{spec}: expected rows, or a name or path, found {type(given).__name__}")
    items = [one if isinstance(one, Edit) else Row(one, spec, i) for i, one in enumerate(given)]
    if not items:
        raise UserError(f"{spec}: no edits are given")
    return _stream(items, spec)


def _stream(items: Sequence[Row | Edit], spec: str) -> EditStream:
    used = {item.id for item in items if isinstance(item, Edit)}
    if len(used) < sum(isinstance(item, Edit) for item in items):
        raise UserError(f"{spec}: two edits have the same id; ids must differ")
    edits: list[Edit] = []
    loosely: list[str] = []
    for item in items:
        for edit, loose in [(item, False)] if isinstance(item, Edit) else _to_edits(item, used):
            edits.append(edit)
            if loose:
                loosely.append(edit.id)
    warnings = (*_warnings(edits, loosely), *_misspelled([item for item in items if isinstance(item, Row)]))
    for line in warnings:
        _log_once(logging.WARNING, f"edits {spec}: {line}")
    for field, what in (("paraphrases", "paraphrases"), ("neighborhood", "neighborhood prompts")):
        if lacking := sum(not getattr(edit, field) for edit in edits):
            _log_once(logging.INFO, f"edits {spec}: {lacking} of {len(edits)} edits have no {what}")
    return EditStream(tuple(edits), spec, warnings, len(items))


@cache
def _log_once(level: int, line: str) -> None:
    """Log a line once per process: the model and both editing tasks read the same edits."""
    logger.log(level, "%s", line)


def split_spec(spec: str) -> tuple[str, slice | None]:
    """The name in a spec and the rows that a trailing ``[...]`` selects; other brackets belong to the name.

    Raises:
        UserError: the brackets hold neither a slice nor a row number.
    """
    spec = spec.strip()
    match = re.fullmatch(r"(.*)\[([^\[\]]*)\]", spec, flags=re.DOTALL)
    if match is None:
        return spec, None
    name, inner = match[1].rstrip(), match[2]
    parts = [part.strip() for part in inner.split(":")]
    numbers = [int(part) if re.fullmatch(r"[+-]?[0-9]{1,18}", part) else None for part in parts]
    readable = all(number is not None or not part for number, part in zip(numbers, parts, strict=True))
    if not readable or len(parts) > 3 or numbers[2:] == [0] or not inner.strip():
        expected = "[start:stop:step] (step not 0) or [row]"
        raise UserError(f"edits={spec}: [{inner}] is not a slice; expected {expected}")
    if len(parts) == 1 and numbers[0] is not None:  # a row out of range selects nothing
        return name, slice(numbers[0], numbers[0] + 1 or None)
    return name, slice(*numbers)


def _select(rows: Sequence[Row], selection: slice | None, spec: str) -> Sequence[Row]:
    chosen = rows if selection is None else rows[selection]
    if not chosen:
        raise UserError(f"edits={spec}: no row selected; the file has {len(rows)} rows")
    return chosen


def _rows_of(name: str) -> list[Row]:
    if name == "tiny":
        return json_rows(embedded.EDITS, "tiny.jsonl")
    if name in URLS:
        path = download(name)
        return json_rows(path, URLS[name].rsplit("/", 1)[-1], hint=f"delete {path} to download it again")
    path = Path(name)
    if path.suffix.lower() not in {".json", ".jsonl"}:
        near = closest(name, URLS)
        meant = f"did you mean {near}?" if near else f"expected tiny, {', '.join(URLS)},"
        raise UserError(f"edits={name}: {meant} or a path ending in .json or .jsonl")
    path = Path(expanded(name))
    if not path.exists():
        raise UserError(f"edits={name}: there is no file {path.absolute()}")
    return json_rows(path, name)


def _to_edits(row: Row, used: set[str]) -> Iterator[tuple[Edit, bool]]:
    """The edits of a row, and whether the subject of each was found only by the looser matching.

    What a row with several facts asks beyond them belongs to its last edit.
    """
    facts = facts_of(row)
    fields = Fields(row.value, f"{row.where}: ")
    place = f"{os.path.basename(row.file)}, {row.place}"
    for i, fact in enumerate(facts):
        several, last = len(facts) > 1, i == len(facts) - 1
        try:
            prompt, subject, loose = mark_subject(fact.prompt, fact.subject)
        except UserError as error:
            raise fields.error(fact.prompt_name, str(error)) from None
        edit = Edit(
            id=_unused_id(row.value.get("case_id"), row.index, f"-{i}" if several else "", used),
            prompt=prompt,
            subject=subject,
            target_new=fact.target_new,
            target_old=fact.target_old,
            paraphrases=fact.paraphrases if several else (*fact.paraphrases, *paraphrases_of(fields)),
            neighborhood=tuple(neighborhood_of(fields, fact.target_old)) if last else (),
            attribute_prompts=tuple(fields.texts("attribute_prompts")) if last else (),
            generation_prompts=tuple(fields.texts("generation_prompts")) if last else (),
            consequences=tuple(consequences_of(fields)) if last else (),
            multi_hop=multi_hop_of(fields) if last else None,
            reference_texts=tuple(fields.texts("attribute_snippets")) if last else (),
            relation=fact.relation,
            target_id=fact.target_id,
            source=f"{place}, {fact.prompt_name.split('.')[0]}" if several else place,
        )
        yield edit, loose


def _misspelled(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each key that no format has and that is nearly one that its rows lack."""
    meant = Counter(pair for row in rows for pair in misspelled(row.value))
    for (key, near), count in sorted(meant.items()):
        yield f"{count} of {len(rows)} rows have a key {key!r}, which is not read; did you mean {near!r}?"


def _unused_id(case_id: object, index: int, ending: str, used: set[str]) -> str:
    has_one = isinstance(case_id, (int, str)) and not isinstance(case_id, bool) and str(case_id).strip()
    name = base = f"{case_id if has_one else index}{ending}"
    count = 1
    while name in used:
        count += 1
        name = f"{base}#{count}"
    used.add(name)
    return name


def _warnings(edits: Sequence[Edit], loosely: Sequence[str]) -> Iterator[str]:
    total = len(edits)
    targets: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    repeats: list[str] = []
    for edit in edits:
        known = targets[edit.subject, edit.prompt]
        if edit.target in known:
            repeats.append(edit.id)
        known.add(edit.target)
    conflicts = [edit.id for edit in edits if len(targets[edit.subject, edit.prompt]) > 1]
    same = [e.id for e in edits if e.target_old is not None and e.target_new.strip() == e.target_old.strip()]
    without = [edit.id for edit in edits if not edit.has_subject]
    for ids, what in (
        (repeats, "repeat an earlier one (same subject, prompt and target)"),
        (conflicts, "set a subject and prompt to different targets"),
        (same, "have a target equal to the old one"),
        (loosely, "have a subject found only by ignoring white space, Unicode form, case or punctuation"),
        (without, "have a subject that is not in their prompt (methods that edit there refuse them)"),
    ):
        if ids:
            more = ", ..." if len(ids) > NAMED else ""
            yield f"{len(ids)} of {total} edits {what}: {', '.join(ids[:NAMED])}{more}"
