"""Editing a model by a stream of facts: see :class:`~harness_rect.session.stream.EditSession`."""

from harness_rect.session.checkpoint import check_output, check_parent, save_checkpoint
from harness_rect.session.runs import EditCache
from harness_rect.session.stream import EditSession, check_edits

__all__ = ["EditCache", "EditSession", "check_edits", "check_output", "check_parent", "save_checkpoint"]
