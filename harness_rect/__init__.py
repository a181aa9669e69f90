"""harness-rect: knowledge editing measured by EleutherAI's lm-evaluation-harness.

This file is imported whenever lm-eval is (see `_autoload`), so it must stay tiny.
"""

import os as _os

__version__ = "0.1.0"

# `model_wrappers/` and `tasks/` lie beside this package in a source checkout and inside it in a wheel. The
# real path, because an editable install reaches the package through a link (see hatch_build.py).
_here = _os.path.dirname(_os.path.realpath(__file__))
if not _os.path.isdir(_os.path.join(_here, "tasks")):
    __path__.append(_os.path.dirname(_here))
