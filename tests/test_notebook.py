"""The notebook of examples/ runs from its first cell to its last, with less of everything."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebook")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "frontier.ipynb"
SMALLER = {"orders: 3": "orders: 1", "checkpoints: [0, 4]": "checkpoints: [0, 1]", "limit: 10": "limit: 2"}


def test_the_notebook_goes_from_a_model_to_the_frontier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, 4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    for old, new in SMALLER.items():
        [cell] = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    assert "Ability against edits over strengths" in (tmp_path / "frontier.html").read_text(encoding="utf-8")
    [table] = [
        o.data["text/plain"]
        for c in notebook.cells
        for o in c.get("outputs", [])
        if "data" in o and "ability" in o.data.get("text/plain", "")
    ]
    assert [line.split()[1] for line in table.splitlines()[1:]] == ["none", "rect", "rect", "scale", "scale"]
