"""Rows of text files: JSON lists, JSON Lines, tab-separated tables and plain text.

All files are UTF-8; a byte-order mark is dropped. Each row has its position for messages: rows are counted
from 0, as in ``facts.json[7]``, lines from 1, as in an editor. What cannot be read is a :class:`UserError` of
one line that names the file and the row or line.
"""

from __future__ import annotations

import json
import stat
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from harness_rect.errors import UserError

#: Bytes of a text that is read whole, and of a line of one that is read line by line.
LARGEST = 1 << 30
LONGEST_LINE = 64 << 20


@dataclass(frozen=True)
class Row:
    """One row of a file.

    value: the JSON value, or the cells of a table by column name. file: its name in messages. line: the first
    line of the row; None where only its index is known (a JSON list).
    """

    value: Any
    file: str
    index: int
    line: int | None = None

    @property
    def place(self) -> str:
        """``row 3 (line 4)``."""
        return f"row {self.index}" + (f" (line {self.line})" if self.line is not None else "")

    @property
    def where(self) -> str:
        """``facts.jsonl, row 3 (line 4)``."""
        return f"{self.file}, {self.place}"

    def error(self, problem: str) -> UserError:
        """An error about this row, to be raised."""
        return UserError(f"{self.where}: {problem}")

    def object(self) -> dict[str, Any]:
        """The row as a JSON object.

        Raises:
            UserError: if it is something else.
        """
        if not isinstance(self.value, dict):
            raise self.error(f"expected a JSON object, found {kind(self.value)}")
        return self.value


def json_rows(path: Path, name: str = "", hint: str = "") -> list[Row]:
    """All rows of a JSON file: JSON Lines if its name ends in ``.jsonl``, else a list of rows or JSON Lines.

    Args:
        name: of the file, in messages and for its ending; by default its path.
        hint: advice for a malformed file, added to the message.
    """
    name = name or str(path)
    text = "" if name.lower().endswith(".jsonl") else read_text(path, name)
    if text.lstrip().startswith("["):
        return [Row(value, name, i) for i, value in enumerate(parse_json(text, name, hint=hint))]
    try:
        return list(json_lines(path, name, hint))
    except UserError as error:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise error from None
        expected = "expected a list of rows or one row per line"
        raise UserError(f"{name}: holds one JSON object; {expected}") from None  # over several lines


def json_lines(path: Path, name: str = "", hint: str = "") -> Iterator[Row]:
    """Rows of a JSON Lines file, one at a time; blank lines are skipped. Arguments: :func:`json_rows`."""
    name = name or str(path)
    lines = ((number, line) for number, line in read_lines(path, name) if line.strip())
    for index, (number, line) in enumerate(lines):
        if index == 0 and line.lstrip().startswith("["):
            raise UserError(
                f"{name}: begins with [, but a .jsonl file has one object per line; rename a list to .json"
            )
        yield Row(parse_json(line.rstrip("\r\n"), name, number, hint), name, index, number)


def tsv_rows(path: Path, header: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a tab-separated file without quoting; a row with too few or too many cells is empty.

    The csv module would take a lone double quote for the start of a quoted cell, end a row at a carriage
    return and refuse a long cell.

    Args:
        header: column names in place of those in the first line.
    """
    lines = read_lines(path)
    _, first = next(lines, (1, ""))
    names = list(header) if header else first.rstrip("\r\n").split("\t")
    for index, (number, line) in enumerate(row for row in lines if row[1].strip()):
        cells = line.removesuffix("\n").removesuffix("\r").split("\t")
        value = dict(zip(names, cells, strict=True)) if len(cells) == len(names) else {}
        yield Row(value, str(path), index, number)


def paragraphs(path: Path) -> Iterator[str]:
    """Runs of lines between blank lines, ending in ``\\n``."""
    lines: list[str] = []
    for number, line in read_lines(path):
        if "\0" in line:
            raise UserError(f"{path}, line {number}: not UTF-8 text (it has a NUL); save the file as UTF-8")
        if line.strip():
            lines.append(line.replace("\r\n", "\n"))
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def read_lines(path: Path, name: str = "") -> Iterator[tuple[int, str]]:
    """(number from 1, line with its ending) of a text file.

    Only ``\\n`` ends a line: a JSON string may hold U+2028, and a cell of a table a carriage return.
    """
    name, number = name or str(path), 0
    try:
        with _opened(path, name) as file:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{name}, line {number}: longer than {LONGEST_LINE >> 20} MiB")
                yield number, (line.removeprefix(BOM_UTF8) if number == 1 else line).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}, line {number}: not UTF-8 text (byte {error.start} of the line); save the file as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None


def read_text(path: Path, name: str = "", largest: int = LARGEST) -> str:
    """A whole text file, line endings as they are; one of more than ``largest`` bytes is refused."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{name or path}: cannot be read: {error.strerror}") from None
    if size > largest:
        raise UserError(f"{name or path}: larger than {largest >> 20} MiB; is it the right file?")
    return "".join(line for _, line in read_lines(path, name))


def read_bytes(path: Path) -> bytes:
    """A whole file; what is none is refused as by :func:`read_lines`."""
    try:
        with _opened(path, str(path)) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _opened(path: Path, name: str) -> BinaryIO:
    """A file to read; a pipe, which may never end or begin, a device or a folder is refused."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{name}: cannot be read: it is a folder, a pipe or a device; expected a file")
    return path.open("rb")


#: Lists and objects within each other that no format has and that recursive code could not follow.
LEVELS = 100


def parse_json(
    text: str, name: str, line: int = 1, hint: str = "", parse_int: Callable[[str], Any] | None = None
) -> Any:
    """The value of a JSON text that begins in ``line`` of the file ``name``; at most :data:`LEVELS` deep."""
    try:
        value = json.loads(text, parse_int=parse_int)
        if text.count("[") + text.count("{") <= LEVELS or not _deeper(value, LEVELS):
            return value
        problem = f"nested more than {LEVELS} levels deep"
    except json.JSONDecodeError as error:
        line, problem = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deeply
        problem = str(error)
    raise UserError(f"{name}, line {line}: malformed JSON: {problem}" + (f"; {hint}" if hint else ""))


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie more than ``levels`` deep within each other."""
    found = [value]
    for _ in range(levels + 1):
        found = [
            inner
            for outer in found
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not found:
            return False
    return True


def as_text(value: Any, name: str) -> str:
    """``value`` if it is a string that a tokenizer accepts.

    Raises:
        UserError: beginning with ``name``; also for half of a surrogate pair, which JSON can express and
            UTF-8 cannot.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a string, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: half of a surrogate pair at character {error.start}") from None
    return value


def kind(value: object) -> str:
    """The kind of a JSON value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), f"a number ({value})")
