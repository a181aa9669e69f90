"""Edits: what is to be written into a model, and the readers of the files that hold it."""

from __future__ import annotations

from harness_rect.edits.edit import Consequence, Edit, MultiHop, Probe, Query, fingerprint
from harness_rect.edits.readers import EditStream, edits_of, load_edits

__all__ = [
    "Consequence",
    "Edit",
    "EditStream",
    "MultiHop",
    "Probe",
    "Query",
    "edits_of",
    "fingerprint",
    "load_edits",
]
