"""Edits made by hand, files of rows, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness_rect.edits import Edit, load_edits
from harness_rect.errors import UserError

Row = dict[str, Any]


def plain(index: int = 0, **changes: Any) -> Row:
    return {"prompt": "{} grows on", "subject": f"Plant {index}", "target_new": "rocks", **changes}


def edit_of(prompt: str, subject: str = "Ann", target: str = "x", **more: Any) -> Edit:
    given_fields: Row = {"id": "0", "target_old": None, "paraphrases": (), "neighborhood": (), **more}
    return Edit(prompt=prompt, subject=subject, target_new=target, **given_fields)


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *rows: Any) -> tuple[Edit, ...]:
    return load_edits(write(tmp_path / "one.json", list(rows))).edits


def read_one(tmp_path: Path, row: Any) -> Edit:
    (edit,) = read(tmp_path, row)
    return edit


def message(spec: str) -> str:
    """What is said of edits that are refused, in one line."""
    with pytest.raises(UserError) as caught:
        load_edits(spec)
    text = str(caught.value)
    assert "\n" not in text
    return text
