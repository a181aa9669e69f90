"""Rows of files: what is read, how rows are named, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness_rect.errors import UserError
from harness_rect.io import rows
from harness_rect.io.rows import as_text, json_lines, json_rows, paragraphs, tsv_rows


def test_json_lines_keep_their_place_past_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff\r\n{"a": "x\u2028y"}\r\n\r\n{"a": 2}'.encode())
    rows = json_rows(path)
    assert [row.value for row in rows] == [{"a": "x\u2028y"}, {"a": 2}]
    assert rows[1].where == f"{path}, row 1 (line 4)"
    assert str(rows[1].error("odd")) == f"{path}, row 1 (line 4): odd"


@pytest.mark.parametrize("text", ['\ufeff [{"a": 1},\n 2]', '{"a": 1}\n2\n'])
def test_a_json_file_holds_a_list_or_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    rows = json_rows(path, "given.json")
    assert [row.value for row in rows] == [{"a": 1}, 2]
    assert rows[0].object() == {"a": 1}
    with pytest.raises(UserError, match=r"given\.json, row 1.*: expected a JSON object, found a number"):
        rows[1].object()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"a": 1},\n {"b": }]', "a.json, line 2: malformed JSON: Expecting value at column 8"),
        ("a.jsonl", b'{"a": 1}\n\n{"b": }\n', "a.jsonl, line 3: malformed JSON"),
        ("a.jsonl", b'{"a": 1}\r\n{"b": \r\n', "a.jsonl, line 2: malformed JSON"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl: begins with \\[, but a .jsonl file has one object per line"),
        ("a.json", b'{\n "rows": [1]\n}', "a.json: holds one JSON object; expected a list"),
        ("a.json", b"[" * 100_000, "a.json, line 1: malformed JSON"),
        ("a.json", b'{"a": 1}\n{"b": \xff}', "a.json, line 2: not UTF-8 text \\(byte 6 of the line\\)"),
        ("gone.json", None, "gone.json: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as error:
        json_rows(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_malformed_file_comes_with_the_hint(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"; download it again$"):
        list(json_lines(tmp_path / "a.jsonl", hint="download it again"))


def test_tables_know_no_quotes_and_keep_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'a\tb\r\n"x\ty\r\n\none\rtwo\t \nlone\n1\t2\t3\n')
    rows = list(tsv_rows(path))
    assert [row.value for row in rows] == [{"a": '"x', "b": "y"}, {"a": "one\rtwo", "b": " "}, {}, {}]
    assert [(row.index, row.line) for row in rows] == [(0, 2), (1, 4), (2, 5), (3, 6)]
    assert next(tsv_rows(path, header=("p", "q"))).value == {"p": '"x', "q": "y"}
    path.write_bytes(b"")
    assert list(tsv_rows(path)) == []


def test_paragraphs_end_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffOne\r\nstill one\n\n \nTwo é\n".encode())
    assert list(paragraphs(path)) == ["One\nstill one\n", "Two é\n"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "expected a string, found a number"),
        (True, "found true/false"),
        (None, "found null"),
        ([], "found a list"),
        ("ab\ud800", "half of a surrogate pair at character 2"),
    ],
)
def test_text_is_a_string_that_utf_8_can_encode(value: object, problem: str) -> None:
    assert as_text("é", "name") == "é"
    with pytest.raises(UserError, match=f"name: .*{problem}"):
        as_text(value, "name")


def test_a_file_or_a_line_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = tmp_path / "sparse.json"
    with sparse.open("wb") as file:
        file.truncate(rows.LARGEST + 1)
    with pytest.raises(UserError, match="larger than 1024 MiB"):
        json_rows(sparse)
    monkeypatch.setattr(rows, "LONGEST_LINE", 10)
    (tmp_path / "long.jsonl").write_text("{}\n" + " " * 11)
    with pytest.raises(UserError, match="line 2: longer than"):
        list(json_lines(tmp_path / "long.jsonl"))
