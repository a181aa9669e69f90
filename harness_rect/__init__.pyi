"""The public names of the package, for type checkers and editors; __init__.py imports them when used."""

from harness_rect import embedded as embedded
from harness_rect.api import compare as compare
from harness_rect.api import edit as edit
from harness_rect.api import report as report
from harness_rect.config import EditConfig as EditConfig
from harness_rect.edits import Edit as Edit
from harness_rect.edits import load_edits as load_edits
from harness_rect.errors import UserError as UserError
from harness_rect.experiments import analysis as analysis
from harness_rect.session.report import EditReport as EditReport
from harness_rect.session.stream import EditSession as EditSession

__version__: str
__all__ = [
    "Edit",
    "EditConfig",
    "EditReport",
    "EditSession",
    "UserError",
    "analysis",
    "compare",
    "edit",
    "embedded",
    "load_edits",
    "report",
]
