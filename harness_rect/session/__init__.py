"""Editing a model by a stream of facts: see :class:`~harness_rect.session.stream.EditSession`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness_rect.session.stream import EditSession

__all__ = ["EditSession"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers when they are needed; ``session.report`` is read without them."""
    if name == "EditSession":
        from harness_rect.session.stream import EditSession

        return EditSession
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
