"""The option of the commands about kept runs; imported without transformers, whose import takes seconds."""

from __future__ import annotations

import argparse

from harness_rect.errors import UserError
from harness_rect.session.runs import EditCache


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--edit-cache", metavar="DIR", help="folder of kept runs (default: the user's cache)")


def cache_of(arguments: argparse.Namespace) -> EditCache:
    """The cache that the option names.

    Raises:
        UserError: none is.
    """
    cache = EditCache.from_spec(arguments.edit_cache)
    if cache is None:
        raise UserError("--edit-cache off: expected a folder")
    return cache
