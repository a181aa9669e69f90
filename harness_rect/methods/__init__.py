"""Editing methods: each proposes updates of down-projection weights that make a model state new facts.

A method is one file with a frozen hyper-parameter model and a function

    propose(lm, edits, hparams, context) -> Proposal

registered here by name. It changes no weight itself: the session trims, applies and measures.
"""

from __future__ import annotations

from harness_rect.methods.base import Context, LowRank, Method, Proposal
from harness_rect.methods.memit import MEMIT
from harness_rect.methods.rome import R_ROME, ROME

METHODS: dict[str, Method] = {method.name: method for method in (ROME, R_ROME, MEMIT)}

__all__ = ["METHODS", "Context", "LowRank", "Method", "Proposal"]
