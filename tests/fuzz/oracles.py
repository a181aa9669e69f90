"""What is accepted is right: it is compared with what Python's json and numpy read in the same file."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness_rect.edits import Edit
from harness_rect.edits.readers import edits_of
from harness_rect.moments.second_moment import SecondMoment

#: Slices that select something.
SLICES = {"": slice(None), "[0:2]": slice(0, 2), "[::-1]": slice(None, None, -1)}


def check_edits(edits: Sequence[Edit], path: Path, selection: str) -> None:
    """The edits are those of the rows, and every text is one that a row has."""
    text = path.read_bytes().decode("utf-8-sig")
    listed = text.lstrip().startswith("[")
    rows = json.loads(text) if listed else [json.loads(line) for line in text.split("\n") if line.strip()]
    rows = rows[SLICES[selection]]
    assert [replace(edit, id="", source="") for edit in edits] == [
        replace(edit, id="", source="") for edit in edits_of(rows)
    ]
    there = "\x00".join(_strings(rows))
    for edit in edits:
        probes = [text for probe in edit.neighborhood for text in (probe.prompt, probe.answer)]
        for one in (edit.subject, edit.target_new, edit.target_old, *edit.paraphrases, *probes):
            assert (one or "") in there, one
        assert edit.prompt in there or edit.text in there, edit.prompt


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def check_moment(found: SecondMoment, path: Path) -> None:
    total = found.total.numpy()
    with np.load(path) as arrays:
        assert np.array_equal(total, arrays["mom2.mom2"].astype(total.dtype))
        assert found.count == int(arrays["mom2.count"])


def with_scores_checked(run: Callable[[], int]) -> int:
    """Run ``compare --format json``: every score that it shows is the one in the results file."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        status = run()
    for row in json.loads(shown.getvalue())["rows"] if status == 0 else ():
        for side in ("base", "other"):
            # Python refuses to read whole numbers of thousands of digits.
            results = json.loads(Path(row[f"{side}_file"]).read_bytes(), parse_int=float)
            entries = (results.get(part, {}).get(row["task"], {}) for part in ("results", "groups"))
            key = f"{row['metric']},{row['filter']}"
            assert row[f"score_{side}"] in [entry.get(key) for entry in entries], (row, side)
    return status
