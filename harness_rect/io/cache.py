"""The cache folder for finished work: ``$HARNESS_RECT_CACHE``, else the user's cache folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from platformdirs import user_cache_path

from harness_rect.errors import UserError
from harness_rect.io.files import expanded

#: Environment variable with the folder.
ROOT = "HARNESS_RECT_CACHE"
#: Environment variable with the most that a cache of edit runs may take, and the value where it is not set.
LIMIT, USUAL_LIMIT = "HARNESS_RECT_CACHE_SIZE", "10GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cached work (``edits``, ``stats``); not created here.

    Raises:
        UserError: the environment variable is no path.
    """
    root = os.environ.get(ROOT)
    if not root:
        return user_cache_path("harness-rect") / kind
    try:
        return Path(expanded(root)) / kind
    except UserError as error:
        raise UserError(f"{ROOT}={root}: {error}") from None


def size_limit() -> int | None:
    """Bytes that a cache of edit runs may take; None for off.

    Raises:
        UserError: the environment variable is neither a size nor off.
    """
    text = os.environ.get(LIMIT) or USUAL_LIMIT
    return None if text == "off" else parse_size(text, f"{LIMIT}={text}", ", or off")


def parse_size(text: str, where: str, otherwise: str = "") -> int:
    """Bytes of "10GB", "500 MB" or "1000000".

    Args:
        where: it was read, for messages. otherwise: what may be given instead, for messages.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise UserError(f"{where}: expected a size such as 500MB or 10GB{otherwise}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def human(size: float) -> str:
    """A size as "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
