"""Editing methods: each proposes updates of MLP weights that make a model state new facts.

A method is one file with a frozen hyper-parameter model and a function

    propose(lm, edits, hparams, context) -> Proposal

registered here by name. It changes no weight itself: the session trims, applies and measures.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness_rect.edits import Edit
from harness_rect.edits.edit import MARKER, shorten
from harness_rect.errors import UserError
from harness_rect.methods.alphaedit import ALPHAEDIT
from harness_rect.methods.base import Context, Method, Proposal
from harness_rect.methods.evoedit import EVOEDIT
from harness_rect.methods.ft import FT, FT_L, LOCFT_BF
from harness_rect.methods.kn import KN
from harness_rect.methods.lyaplock import LYAPLOCK
from harness_rect.methods.memit import EMMET, MEMIT
from harness_rect.methods.mend import MEND
from harness_rect.methods.rome import R_ROME, ROME
from harness_rect.methods.ultraedit import ULTRAEDIT
from harness_rect.registry import Registry
from harness_rect.updates import Dense, LowRank

#: Name -> method.
METHODS: Registry[Method] = Registry(
    "editing method",
    "harness_rect.methods",
    (ROME, R_ROME, MEMIT, EMMET, LYAPLOCK, ALPHAEDIT, EVOEDIT, KN, MEND, FT, FT_L, LOCFT_BF, ULTRAEDIT),
    lambda entry: isinstance(entry, Method),
)


def check_edits(method: Method, edits: Sequence[Edit]) -> None:
    """Check that a method can use these edits; needs no model.

    Raises:
        UserError: naming the first row that it cannot use, and what to do.
    """
    if method.at_subject:
        for edit in edits:
            if not edit.has_subject:
                others = ", ".join(name for name in METHODS if not METHODS[name].at_subject)
                raise UserError(
                    f"{edit.where}: the subject {shorten(edit.subject)!r} is not in the prompt"
                    f" {shorten(edit.text)!r}, and {method.name} edits at the subject: put {MARKER} where it"
                    f" stands, leave the row out, or use a method that needs no subject ({others})"
                )
    method.check(edits)


__all__ = ["METHODS", "Context", "Dense", "LowRank", "Method", "Proposal", "check_edits"]
