"""The cache folder for finished work: ``$HARNESS_RECT_CACHE``, else the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cached work (``edits``, ``stats``); not created here."""
    root = os.environ.get("HARNESS_RECT_CACHE")
    return (Path(root) if root else user_cache_path("harness-rect")) / kind
