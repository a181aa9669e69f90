"""Editing methods: each proposes updates of MLP weights that make a model state new facts.

A method is one file with a frozen hyper-parameter model and a function

    propose(lm, edits, hparams, context) -> Proposal

registered here by name. It changes no weight itself: the session trims, applies and measures.
"""

from __future__ import annotations

from harness_rect.methods.alphaedit import ALPHAEDIT
from harness_rect.methods.base import Context, Method, Proposal
from harness_rect.methods.ft import FT, FT_L, LOCFT_BF
from harness_rect.methods.kn import KN
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
    (ROME, R_ROME, MEMIT, EMMET, ALPHAEDIT, KN, MEND, FT, FT_L, LOCFT_BF, ULTRAEDIT),
    lambda entry: isinstance(entry, Method),
)

__all__ = ["METHODS", "Context", "Dense", "LowRank", "Method", "Proposal"]
