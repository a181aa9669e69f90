"""A table as text for a paper: Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

_UNICODE = str.maketrans({"−": "-", "≥": ">=", "≤": "<="})


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """GitHub's Markdown; a vertical bar within a cell is escaped."""
    cells = [[_line(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return tabulate(cells[1:], cells[0], tablefmt="github", disable_numparse=True)


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of booktabs, all special characters escaped."""
    cells = [[_line(cell).translate(_UNICODE) for cell in row] for row in (header, *rows)]
    return tabulate(cells[1:], cells[0], tablefmt="latex_booktabs", disable_numparse=True)


def _line(cell: str) -> str:
    return " ".join(str(cell).split())
