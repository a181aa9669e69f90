"""From what a user names (``zsre``, ``facts.json[0:20]``) to a stream of :class:`Edit`.

Four published row shapes are read, told apart row by row:

* CounterFact: ``requested_rewrite`` with prompt, subject, target_new, target_true;
* ZsRE: ``src``, ``subject``, ``alt``, with ``pred``, ``rephrase``, ``loc``, ``loc_ans``;
* EasyEdit's flat rows: ``prompt``, ``subject``, ``target_new``, with ``rephrase_prompt``,
  ``locality_prompt`` and ``locality_ground_truth``, or the nested ``locality`` of its later data;
* plain rows: ``prompt``, ``subject``, ``target_new`` and any of the optional fields above.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from harness_rect import embedded
from harness_rect.edits.edit import Edit, Probe, mark_subject, shorten
from harness_rect.errors import UserError

logger = logging.getLogger(__name__)

URLS = {
    "zsre": "https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
    "zsre_train": "https://rome.baulab.info/data/dsets/zsre_mend_train.json",
    "counterfact": "https://rome.baulab.info/data/dsets/counterfact.json",
}
_PARAPHRASE_FIELDS = ("paraphrase_prompts", "paraphrases", "rephrase_prompts", "rephrase_prompt", "rephrase")
_OLD_TARGET_FIELDS = ("target_true", "ground_truth", "target_old", "pred")
_PROBE_ANSWER_FIELDS = ("ground_truth", "answer", "target")


@dataclass(frozen=True)
class EditStream(Sequence[Edit]):
    """The edits a run applies, in order. ``spec`` is what was asked for; ``warnings`` are whole lines."""

    edits: tuple[Edit, ...]
    spec: str
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Edit, ...]: ...
    def __getitem__(self, index: int | slice) -> Edit | tuple[Edit, ...]:
        return self.edits[index]


def load_edits(spec: str) -> EditStream:
    """Read the edits that ``spec`` names.

    spec: ``zsre``, ``zsre_train``, ``counterfact``, ``tiny`` or a path ending in .json (a list of rows, or
    JSON Lines) or .jsonl (JSON Lines); each may be followed by ``[start:stop:step]`` with Python's meaning,
    or by one row number ``[7]``. Rows outside the slice are parsed but not looked into.

    Raises :class:`UserError`, one line naming file, row (from 0, as in the slice) and field, for
    whatever cannot be read. Things that are merely odd end up in ``EditStream.warnings`` and the log.
    """
    name, selection = _split_spec(spec)
    rows = _select(_rows_of(name), selection, spec)
    used: set[str] = set()
    edits: list[Edit] = []
    loosely: list[str] = []
    for row in rows:
        edit, loose = _to_edit(row, used)
        edits.append(edit)
        if loose:
            loosely.append(edit.id)
    warnings = tuple(_warnings(edits, loosely))
    for line in warnings:
        _say(logging.WARNING, f"edits {spec}: {line}")
    for field, lacking in (
        ("paraphrases", sum(not edit.paraphrases for edit in edits)),
        ("neighborhood prompts", sum(not edit.neighborhood for edit in edits)),
    ):
        if lacking:
            _say(logging.INFO, f"edits {spec}: {lacking} of {len(edits)} rows have no {field}")
    return EditStream(tuple(edits), spec, warnings)


_said: set[str] = set()


def _say(level: int, line: str) -> None:
    """Log a line once a process: the model and both editing tasks read the same edits."""
    if line not in _said:
        _said.add(line)
        logger.log(level, "%s", line)


# --- what was asked for -------------------------------------------------------------------------


def _split_spec(spec: str) -> tuple[str, slice | int | None]:
    """Part a trailing ``[...]`` from the name; brackets earlier on belong to the path."""
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
        raise UserError(f"edits={spec}: [{inner}] is no slice; expected {expected}")
    if len(parts) == 1:
        return name, numbers[0]
    return name, slice(*numbers)


def _select(rows: Sequence[_Row], selection: slice | int | None, spec: str) -> Sequence[_Row]:
    if isinstance(selection, int):
        chosen = rows[selection : selection + 1 or None]  # a slice, so that out of range is empty
    else:
        chosen = rows[selection] if selection is not None else rows
    if not chosen:
        raise UserError(f"edits={spec}: no row selected; the file has {len(rows)} rows")
    return chosen


def _rows_of(name: str) -> list[_Row]:
    if name == "tiny":
        return _parse(embedded.EDITS, "tiny", lines_only=True)
    if name in URLS:
        return _parse(_download(name), URLS[name].rsplit("/", 1)[-1], lines_only=False)
    path = Path(name).expanduser()
    ending = path.suffix.lower()
    if ending not in {".json", ".jsonl"}:
        raise UserError(f"edits={name}: expected tiny, zsre, counterfact or a path ending in .json or .jsonl")
    if not path.is_file():
        raise UserError(f"edits={name}: there is no file {path.absolute()}")
    return _parse(path, name, lines_only=ending == ".jsonl")


def _download(name: str) -> Path:
    """The public file in the cache of ``datasets``, fetched on first use.

    Only the download is left to ``datasets``: its JSON loader goes through Arrow, which gives all rows
    one schema. Without the etag a cached file is found with no request at all, so offline works.
    """
    from datasets import DownloadConfig, DownloadManager

    url = URLS[name]
    try:
        return Path(DownloadManager(download_config=DownloadConfig(use_etag=False)).download(url))
    except Exception as error:  # what comes out depends on the HTTP stack below: aiohttp, httpx, OSError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"edits={name}: not in the cache and could not be downloaded ({shorten(reason, 160)}); "
            f"download {url} by hand and give the file: edits=PATH"
        ) from error


# --- files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One parsed row and where it stands; ``line`` counts from 1 and is known for JSON Lines only."""

    value: Any
    file: str
    index: int
    line: int | None = None

    @property
    def place(self) -> str:
        return f"row {self.index}" + (f" (line {self.line})" if self.line is not None else "")

    def error(self, field: str, problem: str) -> UserError:
        return UserError(f"{self.file} {self.place}: {field}: {problem}")


def _parse(path: Path, shown: str, *, lines_only: bool) -> list[_Row]:
    """All rows of a file. ``shown`` is how messages call it (a cached file has only a hash for a name)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 text (byte {error.start}); expected JSON in UTF-8") from error
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from error
    if text.lstrip().startswith("["):
        if lines_only:
            raise UserError(
                f"{shown}: begins with [, but .jsonl means one row a line; a list goes into .json"
            )
        values = _loads(text, shown, path, first_line=1)
        return [_Row(value, shown, index) for index, value in enumerate(values)]
    if not lines_only and _is_spread_object(text):
        raise UserError(f"{shown}: holds one JSON object; expected a list of rows or one row a line")
    rows: list[_Row] = []
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_Row(_loads(line, shown, path, first_line=number), shown, len(rows), number))
    return rows


def _loads(text: str, shown: str, path: Path, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, problem = first_line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deeply
        line, problem = first_line, str(error)
    hint = "" if shown.endswith(path.name) else f"; delete {path} to download it again"
    raise UserError(f"{shown} line {line}: malformed JSON: {problem}{hint}")


def _is_spread_object(text: str) -> bool:
    """Whether the text is one object over several lines, which would only confuse as JSON Lines."""
    if not re.match(r"\s*\{[^\n]*\n\s*\S", text):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# --- rows ---------------------------------------------------------------------------------------


def _to_edit(row: _Row, used: set[str]) -> tuple[Edit, bool]:
    """The row as an Edit, and whether its subject was found only by the looser matching."""
    data = row.value
    if not isinstance(data, dict):
        raise UserError(f"{row.file} {row.place}: expected an object, found {_kind(data)}")
    core, prefix, prompt_field, target_field, old_fields = _shape(row, data)
    prompt = _required(row, core, prompt_field, prefix)
    subject = _required(row, core, "subject", prefix)
    target = core.get(target_field)
    if isinstance(target, dict):
        target = _required(row, target, "str", f"{prefix}{target_field}.")
    else:
        target = _required(row, core, target_field, prefix)
    try:
        marked, subject, loose = mark_subject(prompt, subject)
    except UserError as error:
        raise row.error(prefix + prompt_field, str(error)) from None
    answers = (_answer(row, core.get(field), prefix + field) for field in old_fields)
    old = next((answer for answer in answers if answer is not None), None)
    edit = Edit(
        id=_unused_id(data.get("case_id"), row.index, used),
        prompt=marked,
        subject=subject,
        target_new=target,
        target_old=old,
        paraphrases=tuple(dict.fromkeys(t for f in _PARAPHRASE_FIELDS for t in _texts(row, data.get(f), f))),
        neighborhood=tuple(_neighborhood(row, data, old)),
        attribute_prompts=tuple(_texts(row, data.get("attribute_prompts"), "attribute_prompts")),
        generation_prompts=tuple(_texts(row, data.get("generation_prompts"), "generation_prompts")),
        source=f"{os.path.basename(row.file)} {row.place}",
    )
    return edit, loose


def _shape(row: _Row, data: dict[str, Any]) -> tuple[dict[str, Any], str, str, str, tuple[str, ...]]:
    """Where a row keeps its fact: the object, its name as a prefix, and the names of the fields in it."""
    if "requested_rewrite" in data:
        rewrite = data["requested_rewrite"]
        if not isinstance(rewrite, dict):
            raise row.error("requested_rewrite", f"expected an object, found {_kind(rewrite)}")
        return rewrite, "requested_rewrite.", "prompt", "target_new", _OLD_TARGET_FIELDS
    if "src" in data and ("alt" in data or "prompt" not in data):
        return data, "", "src", "alt", ("pred",)
    if "prompt" in data:
        return data, "", "prompt", "target_new", _OLD_TARGET_FIELDS
    keys = ", ".join(map(repr, data)) or "none"
    raise UserError(
        f"{row.file} {row.place}: unknown row format; expected requested_rewrite, or src + subject + alt, or "
        f"prompt + subject + target_new; the keys are: {shorten(keys, 300)}"
    )


def _unused_id(case_id: object, index: int, used: set[str]) -> str:
    has_one = isinstance(case_id, (int, str)) and not isinstance(case_id, bool) and str(case_id).strip()
    base = str(case_id) if has_one else str(index)
    name, count = base, 1
    while name in used:
        count += 1
        name = f"{base}#{count}"
    used.add(name)
    return name


def _neighborhood(row: _Row, data: dict[str, Any], old: str | None) -> Iterator[Probe]:
    yield from _probes(row, data.get("loc"), data.get("loc_ans"), "loc")
    near = data.get("neighborhood_prompts")
    for item in near if isinstance(near, list) else [near]:
        if isinstance(item, dict):
            yield from _probe_object(row, item, "neighborhood_prompts")
        else:  # CounterFact's neighbours share the old answer
            yield from (Probe(text, old) for text in _texts(row, item, "neighborhood_prompts"))
    yield from _probes(row, data.get("locality_prompt"), data.get("locality_ground_truth"), "locality_prompt")
    groups = data.get("locality")
    if groups is not None and not isinstance(groups, dict):
        raise row.error("locality", f"expected an object of groups, found {_kind(groups)}")
    for name, group in (groups or {}).items():
        for item in group if isinstance(group, list) else [group]:
            if item is None:
                continue
            if not isinstance(item, dict):
                raise row.error(
                    f"locality {name!r}", f"expected prompt and ground_truth, found {_kind(item)}"
                )
            yield from _probe_object(row, item, f"locality {name!r}")


def _probe_object(row: _Row, item: dict[str, Any], field: str) -> Iterator[Probe]:
    answer = next((item[key] for key in _PROBE_ANSWER_FIELDS if key in item), None)
    return _probes(row, item.get("prompt"), answer, field)


def _probes(row: _Row, prompts: Any, answers: Any, field: str) -> Iterator[Probe]:
    """A prompt with its answer (or a list of accepted ones: the first counts), or lists of both, in step."""
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, list):
        answers = [answers] * len(prompts)
    elif not answers:
        answers = [None] * len(prompts)
    elif len(prompts) == 1:
        answers = [answers]
    if len(prompts) != len(answers):
        raise row.error(field, f"{len(prompts)} prompts but {len(answers)} answers")
    for prompt, answer in zip(prompts, answers, strict=True):
        for text in _texts(row, prompt, field):
            yield Probe(text, _answer(row, answer, f"{field} (its answer)"))


# --- values -------------------------------------------------------------------------------------


def _required(row: _Row, data: Mapping[str, Any], field: str, prefix: str = "") -> str:
    value = data.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        state = "missing" if value is None else "empty"
        raise row.error(prefix + field, f"{state}; expected a non-empty string")
    return _text(row, value, prefix + field)


def _text(row: _Row, value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise row.error(field, f"expected a string, found {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # tokenizers refuse these, and much later
        raise row.error(field, f"half of a surrogate pair at character {error.start}") from None
    return value


def _texts(row: _Row, value: Any, field: str) -> list[str]:
    """A string or a list of strings; null and blank ones are left out."""
    items = value if isinstance(value, list) else [value]
    found = [_text(row, item, field) for item in items if item is not None]
    return [text for text in found if text.strip()]


def _answer(row: _Row, value: Any, field: str) -> str | None:
    """A string, {"str": ...}, or (nested) lists of accepted answers, of which the first counts."""
    while isinstance(value, (list, dict)):
        value = value.get("str") if isinstance(value, dict) else next(iter(value), None)
    if value is None:
        return None
    text = _text(row, value, field)
    return text if text.strip() else None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), f"a number ({value})")


# --- what is odd --------------------------------------------------------------------------------


def _warnings(edits: Sequence[Edit], loosely: Sequence[str]) -> Iterator[str]:
    total = len(edits)
    times: Counter[tuple[str, str, str]] = Counter()
    targets: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    repeats: list[str] = []
    for edit in edits:
        times[edit.subject, edit.prompt, edit.target] += 1
        if times[edit.subject, edit.prompt, edit.target] > 1:
            repeats.append(edit.id)
        targets[edit.subject, edit.prompt].add(edit.target)
    conflicts = [edit.id for edit in edits if len(targets[edit.subject, edit.prompt]) > 1]
    same = [e.id for e in edits if e.target_old is not None and e.target_new.strip() == e.target_old.strip()]
    for ids, what in (
        (repeats, "repeat an earlier one (same subject, prompt and target)"),
        (conflicts, "set a subject and prompt to different targets"),
        (same, "have a target equal to the old one"),
        (loosely, "have a subject found only by ignoring white space, Unicode form or case"),
    ):
        if ids:
            more = ", ..." if len(ids) > 5 else ""
            yield f"{len(ids)} of {total} edits {what}: {', '.join(ids[:5])}{more}"
